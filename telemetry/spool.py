"""The local end of a remote store: rows are written here first, and go on from here (`uploader`).

    <spool>/<scheme>-<name>-<hash>/     a store like any other, one for each URL
    .../_uploads/                       which process uploads what

Decisions:

- A remote that refuses (no such bucket, no credentials, no permission) fails before the run starts. One that does not
  answer does not: the rows wait.
- An attempt's number is claimed on the remote by a conditional write, and here. Without an answer it is claimed here
  alone; the uploader finds out if it was another's, and gives the launch a name of its own (`lane`).
- What a run has left is taken along by the next one, or brought by `upload_spool`, which goes on for as long as
  something arrives. A spool's name tells its URL, so that rows do not go to another's store by mistake.

Left out: making buckets; merging and retention on the remote.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import StoreError
from lm_telemetry.events import describe
from lm_telemetry.guard import note_failure
from lm_telemetry.lane import NOTES
from lm_telemetry.remote import Remote, answer, is_url
from lm_telemetry.schema import FORMAT_VERSION
from lm_telemetry.store import MANIFESTS, Store
from lm_telemetry.uploader import Uploader, UploadStats

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from lm_telemetry.settings import Settings

REACH_SECONDS = 10.0
"""How long the start of a run waits for the remote to answer, each time it asks."""

PROGRESS_SECONDS = 0.5
"""How often `upload_spool` looks how far it is."""

_ATTEMPT = re.compile(rf"{MANIFESTS}/run_id=[^/]+/attempt=(\d+)/.*")
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
"""What clients raise, each from a package of its own."""


class Spool:
    """The spool of one URL.

    Attributes:
        store: where the writer writes.

    Raises:
        StoreError: the spool cannot be written, the URL is none of a store, or what is there refuses.
    """

    def __init__(self, url: str, directory: str, limit_bytes: int) -> None:
        self._remote = Remote(url)
        self._limit_bytes = limit_bytes
        self.store = Store.open_for_writing(spool_path(url, directory))
        error = _reach(self._remote)
        if error is not None:
            note_failure(f"{url} does not answer; rows will wait in {self.store.path}", error)

    def claim_attempt(self, run_id: str) -> int:
        """The number of this launch of `run_id`; `Store.claim_attempt` of both ends.

        Raises:
            StoreError: the claim cannot be written here.
        """
        claim = {"format": FORMAT_VERSION, "launch": secrets.token_hex(16)}
        number = None
        try:
            while True:
                found = answer(lambda: self._remote.find(f"{MANIFESTS}/run_id={run_id}"), REACH_SECONDS)
                taken = [int(match[1]) for match in map(_ATTEMPT.fullmatch, found) if match]
                number = self.store.claim_attempt(run_id, at_least=max(taken, default=-1) + 1)
                name = f"{MANIFESTS}/run_id={run_id}/attempt={number}/claim.json"
                if answer(lambda: self._remote.create_json(name, claim), REACH_SECONDS):  # noqa: B023 called at once
                    return number
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 whatever a client raises; the uploader finds out what became of it
            note_failure(f"the attempt of {run_id} is claimed here alone", error)
        return self.store.claim_attempt(run_id) if number is None else number

    def uploader(self, run_id: str, attempt: int, rank: int) -> Uploader:
        """Who brings a rank's rows to the remote."""
        own = (run_id, attempt, rank)
        return Uploader(self.store, Remote(self._remote.url), limit_bytes=self._limit_bytes, own=own)


def open_spool(settings: Settings) -> Spool | None:
    """The spool of the settings' store; None if that is local."""
    return Spool(settings.store, settings.spool, settings.spool_bytes) if is_url(settings.store) else None


def spool_path(url: str, directory: str) -> Path:
    """Where rows for `url` wait below the setting `spool`."""
    url = url.rstrip("/")
    words = re.sub(r"[^A-Za-z0-9]+", "-", url)[:60].strip("-")
    return Path(directory).absolute() / f"{words}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def upload_spool(
    directory: str | os.PathLike[str],
    url: str,
    *,
    seconds: float,
    progress: Callable[[UploadStats], None] | None = None,
) -> UploadStats:
    """Bring what runs have left in the spool of `url` there, and remove it here; what was done.

    Rows of living processes are left to them, and counted as `busy`.

    Args:
        directory: the setting `spool`, or the spool of this URL in it.
        url: the store.
        seconds: how long to go on while nothing arrives.
        progress: told now and then what was done so far.

    Raises:
        StoreError: there is no spool of this URL, it does not answer or refuses, or not everything arrived. What did
            not is still in the spool.
    """
    remote = Remote(url)
    spool = find_spool(directory, url)
    silence = _reach(remote)
    if silence is not None:
        raise StoreError(f"{url} does not answer: {describe(silence)}; the rows stay in {spool}", path=url) from silence
    uploader = Uploader(Store(spool), remote, limit_bytes=2**63, own=None)
    uploader.start(_unrecorded)
    is_done, arrived, since = False, 0, time.monotonic()
    try:
        while not is_done and time.monotonic() - since < seconds:
            is_done = uploader.drain(PROGRESS_SECONDS)
            stats = uploader.stats
            if progress is not None:
                progress(stats)
            if stats.parts > arrived:
                arrived, since = stats.parts, time.monotonic()
    finally:
        uploader.close(1.0 if is_done else 0.0)
    stats = uploader.stats
    if is_done and not stats.damaged:
        return stats
    why = uploader.trouble or f"nothing arrived for {seconds:.0f} s"
    if stats.damaged:
        why = f"rows of {stats.damaged} ranks cannot be read there, see the log"
    raise StoreError(
        f"{stats.waiting_parts} files or more are left in {spool} ({stats.parts} arrived): {why}", path=str(spool)
    )


def find_spool(directory: str | os.PathLike[str], url: str) -> Path:
    """The spool of `url` in the directory that is the setting `spool`, or that directory itself if it is the spool.

    Raises:
        StoreError: it is not there.
    """
    given = Path(directory).absolute()
    inside = spool_path(url, str(given))
    for path in (inside, given):
        if path.name == inside.name and (path / MANIFESTS).is_dir():
            return path
    if (given / NOTES).is_dir():
        found = f"{given.name} is of another URL; rename it to {inside.name} if its rows belong to this one"
    else:
        others = sorted(path.parent.name for path in given.glob(f"*/{NOTES}"))
        found = f"there are {', '.join(others)}" if others else "the event `spool_left` of the run tells where it is"
    raise StoreError(f"there is no spool of {url} in {given}: {found}", path=str(given))


def _reach(remote: Remote) -> Exception | None:
    """Mark the place as a store; what came in place of an answer, None if it took the mark.

    Raises:
        StoreError: it refuses.
    """
    try:
        answer(lambda: remote.put_json(f"{MANIFESTS}/store.json", {"format": FORMAT_VERSION}), REACH_SECONDS)
    except Exception as error:
        if not _refuses(error):
            return error
        raise StoreError(
            f"the store must be a place that can be written; {remote.url}: {type(error).__name__}: {error}. Make the"
            " bucket, or give the filesystem credentials that may write there",
            path=remote.url,
        ) from error
    return None


def _unrecorded(*_: Any, **__: Any) -> None:
    """For events when there is no run to record them: the log has them."""


def _refuses(error: Exception) -> bool:
    """Whether waiting would not help."""
    if isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | NotImplementedError):
        return True
    return type(error).__name__ in _NO_CREDENTIALS
