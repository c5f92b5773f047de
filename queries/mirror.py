"""A store at an URL, for reading: its manifests copied to a local directory, its tables read where they are.

Manifests are small and are looked at before every query; a table's files are large, never change, and DuckDB reads of
them what a query needs. So one listing of the manifests tells what is new, and only that is fetched. Whether a copy is
whole does not depend on the order of reading: the uploader lists files and sealed lists only after they are there.

DuckDB gets the filesystem through `Files`, which opens nothing outside the store and nothing for writing, whatever a
query says and whatever the credentials allow.

Left out: runs without manifests, which a local store shows by listing its directories: here that would be a listing of
all files before every query.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
import weakref
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from lm_telemetry.errors import StoreError
from lm_telemetry.queries.snapshot import MANIFESTS
from lm_telemetry.remote import Remote

_NAME = r"[^/*?\[]+"
_MANIFEST = re.compile(rf"{MANIFESTS}/(?:run_id={_NAME}/(?:(?:attempt=\d+|compaction)/)?)?{_NAME}\.json")
"""What is fetched. Keys of an object store are any text: one with `..` would leave the directory."""


class Mirror:
    """The manifests of the store at `url` in a directory of this process, `path`; `refresh` before reading there.

    Raises:
        StoreError: the URL cannot be opened, or is not one of a store.
    """

    def __init__(self, url: str) -> None:
        self._remote = Remote(url)
        self.url = self._remote.url
        self.files = Files(self._remote)
        self.path = Path(tempfile.mkdtemp(prefix="lm-telemetry-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._mutex = threading.Lock()
        self._seen: dict[str, str] = {}
        self.refresh()
        if not self._seen:
            raise StoreError(
                f"there is no store at {self.url}; give the URL that the run was given as `store`", path=self.url
            )

    def refresh(self) -> None:
        """Fetch manifests that were written since.

        Raises:
            StoreError: what is there cannot be read.
        """
        try:
            with self._mutex:
                found = {
                    name: facts for name, facts in self._remote.find(MANIFESTS).items() if _MANIFEST.fullmatch(name)
                }
                for name in self._seen.keys() - found.keys():
                    (self.path / name).unlink(missing_ok=True)
                changed = [name for name in found if self._seen.get(name) != found[name]]
                # Lists first: then a manifest names none that is not here, but what was sealed since the listing.
                for is_list in (True, False):
                    self._fetch([name for name in changed if is_list is (".sealed-" in name)])
                self._seen = found
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"cannot read {self.url}: {type(error).__name__}: {error}", path=self.url) from error

    def _fetch(self, names: list[str]) -> None:
        """Copy these files, and before them lists that they name and that are not here."""
        contents = self._remote.read_all(names)
        lists = {str(PurePosixPath(n).with_name(sealed)) for n in contents for sealed in _sealed(contents[n])}
        missing = [name for name in sorted(lists) if _MANIFEST.fullmatch(name) and not (self.path / name).exists()]
        if missing:
            self._fetch(missing)
        for name, content in contents.items():
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp")
            temporary.write_bytes(content)
            temporary.replace(target)


class Files(AbstractFileSystem):
    """Files below `remote`, for DuckDB to read: names are URLs, and files never change."""

    cachable = False

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self._remote = remote
        self.protocol = remote.protocol

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """A file, to be read (PermissionError for writing, and outside the store)."""
        self._require_below(path)
        if mode != "rb":
            raise PermissionError(f"{path}: a store is only read")
        try:
            return self._remote.filesystem.open(path, mode)
        except Exception as error:
            raise OSError(f"{path}: {type(error).__name__}: {error}") from error

    def glob(self, path: str, **_: Any) -> list[str]:
        """Files that a pattern matches; a name without a pattern stands for itself, and is not asked for."""
        self._require_below(path)
        if not any(sign in path for sign in "*?["):
            return [path]
        found = self._remote.glob(path.removeprefix(f"{self._remote.url}/"))
        return [f"{self._remote.url}/{name}" for name in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """What the filesystem knows of a file."""
        self._require_below(path)
        found: dict[str, Any] = self._remote.filesystem.info(path)
        return found

    def modified(self, path: str) -> datetime:
        """The same for all: parts are never written again, and some filesystems cannot tell."""
        return datetime.fromtimestamp(0, UTC)

    def unstrip_protocol(self, name: str) -> str:
        """`name`, which is an URL."""
        return name

    def _require_below(self, path: str) -> None:
        if not path.startswith(f"{self._remote.url}/") or ".." in path.split("/"):
            raise PermissionError(f"{path} is outside the store {self._remote.url}")


def _sealed(manifest: bytes) -> list[str]:
    """Lists that a manifest names; none if it is no manifest, which whoever reads the copy will say."""
    try:
        return [str(name) for name in json.loads(manifest)["sealed"]]
    except (ValueError, KeyError, TypeError):
        return []
