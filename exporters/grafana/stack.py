"""Writing Prometheus' and Grafana's files for a user's store: what `lmt stack` does.

The files are those of the directory `stack` beside this module, which work as they are. Two things are filled in: where
runs announce themselves, if that is elsewhere, and the commands in the README. A file that is there already and differs
is never overwritten unless that is asked for, and then nothing is written at all.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from lm_telemetry.errors import StoreError

SOURCE = Path(__file__).parent / "stack"
TARGETS = "prometheus/targets"
"""Where runs announce themselves, unless told otherwise."""

_FILES, _FOLDERS = 0o644, 0o755
"""Modes of what is written: the servers in the containers are other users."""

_OWN_TARGETS = "targets/*.json"
_OWN_MOUNT = "      - ./prometheus:/etc/prometheus:ro\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What was written where."""

    directory: Path
    """absolute path of the stack"""
    targets: Path
    """absolute path of the directory in which runs announce themselves"""
    written: tuple[str, ...]
    """files that are new or changed, relative to it"""
    unchanged: tuple[str, ...]
    """files that were there already"""


def write_stack(directory: str, *, store: str, targets: str | None = None, force: bool = False) -> Stack:
    """Write all files of the stack.

    Args:
        directory: where to; made if it is not there.
        store: the store that the commands in the README name.
        targets: directory in which runs announce themselves; None for one within the stack.
        force: whether files that differ are overwritten.

    Raises:
        StoreError: files that differ are there already, of which none was touched, or something cannot be written.
    """
    base = Path(directory).absolute()
    place = base / TARGETS if targets is None else Path(targets).absolute()
    if set("*?[\\") & set(str(place)):
        raise StoreError(
            f"{place}: Prometheus takes *, ?, [ and \\ in a path for a pattern; choose another", path=str(place)
        )
    files = {name: _fill(name, store, place, own=targets is None) for name in _names()}
    try:
        found = {name: (base / name).read_bytes() for name in files if (base / name).exists()}
        changed = [name for name, content in found.items() if content != files[name]]
        if changed and not force:
            raise StoreError(
                f"{base} has files that differ from those of this version: {', '.join(changed)}. Nothing was written;"
                " give another directory, or --force to overwrite them",
                path=str(base),
            )
        written = tuple(name for name in files if name not in found or name in changed)
        _make(place)
        for name in written:
            _write(base, name, files[name])
    except OSError as error:
        raise StoreError(f"cannot write {error.filename or base}: {error.strerror}", path=str(base)) from error
    return Stack(
        directory=base, targets=place, written=written, unchanged=tuple(name for name in files if name not in written)
    )


def _names() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*") if path.is_file())


def _fill(name: str, store: str, targets: Path, *, own: bool) -> bytes:
    text = (SOURCE / name).read_text(encoding="utf-8")
    if name == "README.md":
        text = text.replace("@STORE@", _word(store)).replace("@TARGETS@", _word(str(targets)))
    elif name == "prometheus/prometheus.yml" and not own:
        text = text.replace(_OWN_TARGETS, json.dumps(f"{targets}/*.json"))
    elif name == "docker-compose.yml" and not own:
        path = json.dumps(str(targets).replace("$", "$$"))
        mount = f"      - {{type: bind, source: {path}, target: {path}, read_only: true}}\n"
        text = text.replace(_OWN_MOUNT, _OWN_MOUNT + mount)
    return text.encode("utf-8", "surrogateescape")


def _word(text: str) -> str:
    """A path or URL as one word of a command line."""
    return shlex.quote(text)


def _write(base: Path, name: str, content: bytes) -> None:
    path = base / name
    _make(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        beside.chmod(_FILES)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _make(directory: Path) -> None:
    """Make a directory and its parents, readable by others."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        path.chmod(_FOLDERS)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
