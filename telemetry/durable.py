"""Files that are whole or absent at every moment, and survive a power cut once the call that made them has returned.

Written under a hidden name, synced, renamed; then the directory is synced, which holds the name.
"""

from __future__ import annotations

import json
import os
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path


class _Summed:
    """A file being written, and the checksum of what has gone into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0

    closed = False

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()


def put_file(target: Path, write: Any) -> tuple[int, int]:
    """Write a file so that `target` is whole or absent at every moment; its size in bytes, and their checksum."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            summed = _Summed(file)
            write(summed)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)
    return size, summed.crc32


def put_json(target: Path, document: dict[str, Any]) -> None:
    """Put a JSON file in place whole and durably (OSError if it cannot be)."""
    put_file(target, lambda file: file.write(json.dumps(document, separators=(",", ":")).encode()))


def make_durable_directory(directory: Path, *, below: Path) -> None:
    """Make `directory` and have each new name in it survive a power cut, down from `below`."""
    directory.mkdir(parents=True, exist_ok=True)
    for parent in directory.parents:
        sync_directory(parent)
        if parent == below:
            break


def sync_directory(directory: Path) -> None:
    """Have the names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Some network filesystems refuse to sync directories; the file itself is synced by then.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
