"""A directory on any filesystem that fsspec knows, `s3://bucket/path`: what a store needs of it, and no more.

Decisions:

- Credentials and endpoints are the filesystem's own business (`AWS_*`, `FSSPEC_*`, `~/.config/fsspec`). The URL is
  recorded with the run, so one that holds a password is refused.
- Nothing is cached, and each owner has a filesystem object of its own: listings must be of now, and not all filesystems
  can be shared by threads.
- The filesystem is opened at its first use, since some (SFTP) connect as they are opened. `renew` opens it again: such
  a connection does not outlive an outage.
- Filesystems raise whatever their client libraries raise, and may not answer for minutes. `answer` bounds the wait.

Object stores replace a file as a whole. Of others (SFTP) a reader may meet half a manifest, and has to look again.

Left out: what is where in a store (`store`), and what is kept meanwhile (`spool`).
"""

from __future__ import annotations

import errno
import json
import re
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lm_telemetry.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+://")
_UNFIT = re.compile(r"[\[\]*?#\s]|::")
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP}


def is_url(store: str) -> bool:
    """Whether a store's name is an URL, and not a local path."""
    return bool(_URL.match(store))


def unfit(url: str) -> str | None:
    """What is wrong with the URL of a store, whatever is behind it; None if nothing is."""
    if urlsplit(url).password is not None:
        return "an URL without a password: it is recorded with the run; configure the filesystem instead"
    if _UNFIT.search(url):
        return "an URL without patterns, white space and chained filesystems ('*', '?', '[', '#', '::')"
    if not url.partition("://")[2].strip("/"):
        return "an URL with a bucket or directory after '://'"
    return None


class Remote:
    """A directory of a filesystem. Names are relative to it; methods raise what the filesystem raises.

    Attributes:
        url: the directory, without a slash at its end.
        protocol: what the filesystem calls itself, one name or several.

    Raises:
        StoreError: the URL is not one of a store, or the package that its filesystem takes is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        wrong = unfit(url)
        if wrong is not None:
            raise StoreError(f"expected {wrong}; got {urlsplit(url).scheme}://...", path=urlsplit(url).scheme)
        try:
            from fsspec import get_filesystem_class

            self.protocol: str | tuple[str, ...] = get_filesystem_class(self.url.partition("://")[0]).protocol
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"cannot open {self.url}: {error}; `pip install 'lm-telemetry[remote]'` brings S3, other filesystems"
                " take the package that fsspec names for them",
                path=self.url,
            ) from error

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem; the first time, whatever it raises when it cannot connect."""
        return self._opened[0]

    def renew(self) -> None:
        """Have the next call open the filesystem again, with what connection and credentials there are then."""
        self.__dict__.pop("_opened", None)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
        return filesystem, str(path).rstrip("/")

    def put(self, name: str, file: Path) -> None:
        """Copy a local file there."""
        self._write(name, lambda path: self.filesystem.put_file(str(file), path))

    def put_json(self, name: str, document: dict[str, Any]) -> None:
        """Put a JSON file there, in place of one that is."""
        self._write(name, lambda path: self.filesystem.pipe_file(path, _encoded(document)))

    def create_json(self, name: str, document: dict[str, Any]) -> bool:
        """Put a JSON file there unless there is another; whether it is there now.

        Of many who try at once one succeeds, where the filesystem has a conditional write (S3 `If-None-Match`, GCS,
        Azure, local disks). Elsewhere a second who comes within the moment between look and write may succeed, too.
        """
        path = self._full(name)
        if not self.filesystem.exists(path):
            try:
                self._write(name, lambda path: self.filesystem.pipe_file(path, _encoded(document), mode="create"))
                return True
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self.put_json(name, document)
        # It may be our own: a client that gets no answer tries again.
        return self.read(name) == _encoded(document)

    def read(self, name: str) -> bytes:
        """A file's bytes (FileNotFoundError if there is none)."""
        content: bytes = self.filesystem.cat_file(self._full(name))
        return content

    def read_all(self, names: Collection[str]) -> dict[str, bytes]:
        """Many files' bytes, by name (FileNotFoundError if one is not there), at once where the filesystem can.

        Names must not look like patterns.
        """
        if not names:
            return {}
        found = self.filesystem.cat([self._full(name) for name in names])
        return {self._relative(path): content for path, content in found.items()}

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object (FileNotFoundError if there is none, ValueError if it is something else)."""
        document = json.loads(self.read(name))
        if not isinstance(document, dict):
            raise ValueError(f"{self.url}/{name}: a JSON object was expected, {type(document).__name__} came")  # noqa: TRY004 as json raises
        return document

    def find(self, name: str) -> dict[str, str]:
        """All files below a directory, by name, each with a text that changes when the file does."""
        found = self.filesystem.find(self._full(name), detail=True)
        return {self._relative(path): repr(sorted(facts.items())) for path, facts in dict(found).items()}

    def sizes(self) -> dict[str, int]:
        """All files of the directory, by name, with their bytes."""
        found = self.filesystem.find(self._opened[1], detail=True)
        return {self._relative(path): int(facts["size"]) for path, facts in dict(found).items()}

    def open(self, name: str) -> Any:
        """A file to be read piece by piece (FileNotFoundError if there is none)."""
        return self.filesystem.open(self._full(name), "rb")

    def glob(self, pattern: str) -> list[str]:
        """Names that match."""
        return [self._relative(path) for path in self.filesystem.glob(self._full(pattern))]

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self._opened[1]}/")

    def _full(self, name: str) -> str:
        return f"{self._opened[1]}/{name}"

    def _write(self, name: str, write: Callable[[str], Any]) -> None:
        """Write a file, and make its directory first where there are such things; buckets are never made."""
        path = self._full(name)
        try:
            write(path)
        except FileNotFoundError:
            if self.filesystem.async_impl:  # object stores, to which a file missing at a write is the bucket
                raise
            self.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            write(path)


def answer(call: Callable[[], Any], seconds: float) -> Any:
    """What `call` returns or raises, if it does within `seconds`; TimeoutError if not, and it is left to itself."""
    box: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            box.append((call(), None))
        except Exception as error:  # noqa: BLE001 raised on the caller's thread
            box.append((None, error))

    thread = threading.Thread(target=run, name="lm-telemetry-remote", daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    result, error = box[0]
    if error is not None:
        raise error
    return result


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
