"""The local end of a remote store: rows are written here first, and go on from here (`uploader`).

    <spool>/<scheme>-<name>-<hash>/     a store like any other, one for each URL
    .../_uploads/                       which process uploads what

Decisions:

- A remote that refuses (no such bucket, no credentials, no permission) fails before the run starts. One that does not
  answer does not: the rows wait.
- An attempt's number is claimed on the remote by a conditional write, and here. Without an answer it is claimed here
  alone; the uploader finds out if it was another's, and gives the launch a name of its own (`lane`).

Left out: making buckets; merging and retention on the remote.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.errors import StoreError
from lm_telemetry.guard import note_failure
from lm_telemetry.remote import Remote, answer, is_url
from lm_telemetry.schema import FORMAT_VERSION
from lm_telemetry.store import MANIFESTS, Store
from lm_telemetry.uploader import Uploader

if TYPE_CHECKING:
    from lm_telemetry.settings import Settings

REACH_SECONDS = 10.0
"""How long the start of a run waits for the remote to answer, each time it asks."""

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
        mark = {"format": FORMAT_VERSION}
        try:
            answer(lambda: self._remote.put_json(f"{MANIFESTS}/store.json", mark), REACH_SECONDS)
        except Exception as error:
            if not _refuses(error):
                note_failure(f"{url} does not answer; rows will wait in {self.store.path}", error)
                return
            raise StoreError(
                f"the store must be a place that can be written; {url}: {type(error).__name__}: {error}. Make the"
                " bucket, or give the filesystem credentials that may write there",
                path=url,
            ) from error

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


def _refuses(error: Exception) -> bool:
    """Whether waiting would not help."""
    if isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | NotImplementedError):
        return True
    return type(error).__name__ in _NO_CREDENTIALS
