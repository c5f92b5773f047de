"""One rank of one attempt on its way from the spool to the remote store: which parts wait, which are listed there.

    files in the spool --ship--> files there --publish--> the rank's manifest there lists them; gone from the spool

Decisions:

- The remote's manifest lists a part only after its file is there, and a local file goes only after a manifest that
  lists it is there. So the remote is a whole, maybe older, store at every moment, and whatever is interrupted is done
  again: the names are the same, and so are the bytes.
- The remote's manifest is also the record of what is done. Only the name of the launch is kept beside the spool.
- The manifest's first writing, empty, is the claim to its place. A launch that could not ask the remote for its number,
  and finds the place taken by another, goes under a name of its own (`<run_id>.<launch>`): nobody's rows are replaced.
- Parts that had to go for want of room are listed as lost. A gap is never silent.
- One process a lane, by a lock that dies with its holder.

The lock `_mutex` is never held while the remote is spoken to: the writer's thread takes it, too.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from lm_telemetry.compaction import locked
from lm_telemetry.durable import put_json
from lm_telemetry.errors import StoreError
from lm_telemetry.schema import FORMAT_VERSION
from lm_telemetry.store import (
    MANIFESTS,
    SEAL_AFTER,
    Manifest,
    PartInfo,
    by_table,
    listed_parts,
    sequence,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lm_telemetry.remote import Remote
    from lm_telemetry.store import Store

NOTES = "_uploads"
"""Directory of the spool with a lane's lock and the name of its launch."""


GIVEN_UP_LAST = frozenset({"runs", "events"})
"""Tables of a few rows without which the others are not understood."""


class Lane:
    """Parts of one rank of one attempt; `take` one. `refresh`, then `greet`, `ship` and `publish` on one thread.

    Attributes:
        waiting_bytes: bytes of parts that are not on the remote yet.
    """

    def __init__(self, spool: Store, run_id: str, rank: int, attempt: int, held: ExitStack) -> None:
        self._spool = spool
        self._run_id, self._rank, self._attempt = run_id, rank, attempt
        self._held = held
        self._note = _directory(spool, run_id, attempt) / f"rank={rank}.json"
        self._launch, self._remote_run = self._read_note()
        self._mutex = threading.Lock()
        self._next_seq: dict[str, int] = {}
        self._sealed_seen = 0
        self._manifest_time = 0
        self._waiting: dict[str, PartInfo] = {}
        self._shipping: str | None = None
        self._missing: list[PartInfo] = []
        self._spent: list[Path] = []
        self._listed = Manifest(run_id=run_id, rank=rank, attempt=attempt)
        self._is_new = False
        self._greeted = False
        self.waiting_bytes = 0

    @classmethod
    def take(cls, spool: Store, run_id: str, rank: int, attempt: int) -> Self | None:
        """The lane, unless another process has it, or all its rows are on the remote.

        Raises:
            OSError, StoreError: the spool cannot be read or written.
        """
        directory = _directory(spool, run_id, attempt)
        if is_finished(spool, run_id, rank, attempt):
            return None
        directory.mkdir(parents=True, exist_ok=True)
        held = ExitStack()
        try:
            is_ours = held.enter_context(locked(directory / f".rank={rank}.lock"))
            lane = cls(spool, run_id, rank, attempt, held) if is_ours else None
        except BaseException:
            held.close()
            raise
        return lane

    def let_go(self) -> None:
        """Give the lane to whoever comes next; nobody need, if the remote lists all that is here."""
        if self._greeted and self.is_done:
            self._write_note(finished=self._manifest_time)
        self._held.close()

    @property
    def key(self) -> tuple[str, int, int]:
        """Run, attempt and rank."""
        return self._run_id, self._attempt, self._rank

    @property
    def waiting(self) -> int:
        """Parts that are not on the remote yet."""
        return len(self._waiting)

    @property
    def is_done(self) -> bool:
        """Whether the remote lists all that is here."""
        return not self._waiting and not self._is_new

    def refresh(self) -> None:
        """Look for parts that were written since.

        Raises:
            StoreError: the manifest in the spool cannot be read.
        """
        with self._mutex:
            # From before the reading, and kept only after it: a manifest that cannot be read is never a finished one.
            modified = _modified(self._spool.manifest_path(self._run_id, self._rank, self._attempt))
            manifest = self._spool.read_manifest(self._run_id, self._rank, self._attempt)
            if len(manifest.sealed) != self._sealed_seen:
                self._sealed_seen = len(manifest.sealed)
                manifest = self._spool.read_manifest(self._run_id, self._rank, self._attempt, whole=True)
            self._manifest_time = modified
            found = [(self._written(part), part) for part in manifest.parts if self._is_unseen(part)]
            # One table's parts may be listed long before another's: the order is that of writing.
            for written, part in sorted(found, key=lambda pair: (pair[0] or 0, sequence(pair[1]))):
                self._next_seq[part.table] = max(self._next_seq.get(part.table, 0), sequence(part) + 1)
                if written is None and self._greeted:
                    self._listed.lost.append(self._renamed(part))
                elif written is None:
                    self._missing.append(part)
                else:
                    self._waiting[part.file] = part
                    self.waiting_bytes += part.bytes
            self._is_new = self._is_new or bool(found)

    def greet(self, remote: Remote) -> str | None:
        """Claim the lane's place on the remote, or find it as it was left; the name it had to take, if another."""
        if self._greeted:
            return None
        apart = None
        while not remote.create_json(self._manifest_name(), self._document()):
            there = remote.read_json(self._manifest_name())
            if there.get("launch") == self._launch:
                self._resume(remote, there)
                break
            apart = self._remote_run = f"{self._run_id[:119]}.{self._launch[:8]}"
            self._write_note()
            with self._mutex:
                self._listed.lost = [self._renamed(part) for part in self._listed.lost]
        known = self._all_listed(remote) if self._missing else set()
        with self._mutex:
            # Of parts whose files were gone when the lane was taken, those that the remote does not list are lost.
            gone = map(self._renamed, self._missing)
            self._listed.lost += [part for part in gone if part.file not in known]
            self._missing.clear()
            self._greeted = True
        return apart

    def ship(self, remote: Remote) -> PartInfo | None:
        """Copy the oldest part that waits to the remote; None if none does. Parts whose files are gone are lost.

        Raises:
            StoreError: its file cannot be read.
        """
        while (part := self._next()) is not None:
            path = self._spool.path / part.file
            try:
                is_there = _is_readable(path)
                if is_there:
                    remote.put(self._renamed(part).file, path)
            except BaseException:
                with self._mutex:
                    self._shipping = None
                raise
            with self._mutex:
                self._shipping = None
                self._forget(part)
                (self._listed.parts if is_there else self._listed.lost).append(self._renamed(part))
                self._spent.append(path)
                self._is_new = True
            if is_there:
                break
        return part

    def _next(self) -> PartInfo | None:
        """The oldest part that waits, which is being shipped from now on."""
        with self._mutex:
            part = next(iter(self._waiting.values()), None)
            self._shipping = None if part is None else part.file
            return part

    def publish(self, remote: Remote) -> None:
        """Have the remote list what was shipped, and remove it here."""
        if not self._is_new:
            return
        while len(self._listed.parts) + len(self._listed.lost) >= SEAL_AFTER:
            self._seal(remote)
        with self._mutex:
            self._is_new = False
            document = self._document()
        try:
            remote.put_json(self._manifest_name(), document)
        except BaseException:
            self._is_new = True
            raise
        while self._spent:
            # What cannot be removed is found again by the next who takes the lane.
            with suppress(OSError):
                self._spent.pop().unlink(missing_ok=True)

    def drop_oldest(self) -> PartInfo | None:
        """Give up the oldest part that waits and is not being shipped; None if there is none.

        What tells of the run and of its losses goes only when nothing else is left.
        """
        with self._mutex:
            movable = [part for file, part in self._waiting.items() if file != self._shipping]
            part = min(movable, key=lambda part: part.table in GIVEN_UP_LAST, default=None)
            if part is not None:
                with suppress(OSError):
                    (self._spool.path / part.file).unlink(missing_ok=True)
                self._forget(part)
                self._listed.lost.append(self._renamed(part))
                self._is_new = True
            return part

    def _seal(self, remote: Remote) -> None:
        """Put what is listed into a file that is never changed again once a manifest names it."""
        with self._mutex:
            parts, lost = list(self._listed.parts), list(self._listed.lost)
        name = f"rank={self._rank}.sealed-{len(self._listed.sealed)}.json"
        remote.put_json(f"{self._remote_directory()}/{name}", {"parts": by_table(parts), "lost": by_table(lost)})
        with self._mutex:
            self._listed.sealed.append(name)
            del self._listed.parts[: len(parts)], self._listed.lost[: len(lost)]

    def _resume(self, remote: Remote, there: dict[str, Any]) -> None:
        """Go on from the manifest that an earlier process, or an unanswered request, has put there."""
        sealed = list(there["sealed"])
        parts, lost = listed_parts(there["parts"]), listed_parts(there.get("lost", {}))
        known = {part.file for part in [*parts, *lost, *self._in_sealed(remote, sealed)]}
        with self._mutex:
            self._listed.sealed, self._listed.parts = sealed, parts
            self._listed.lost = lost + [part for part in self._listed.lost if part.file not in known]
            for part in [p for p in self._waiting.values() if self._renamed(p).file in known]:
                self._forget(part)
                self._spent.append(self._spool.path / part.file)
            self._is_new = True

    def _all_listed(self, remote: Remote) -> set[str]:
        """Names of all files that the remote lists, as parts or as lost."""
        with self._mutex:
            listed = [*self._listed.parts, *self._listed.lost]
        return {part.file for part in [*listed, *self._in_sealed(remote, self._listed.sealed)]}

    def _in_sealed(self, remote: Remote, names: list[str]) -> list[PartInfo]:
        """What the sealed lists there name, as parts or as lost."""
        found = []
        for name in names:
            document = remote.read_json(f"{self._remote_directory()}/{name}")
            found += listed_parts(document["parts"]) + listed_parts(document.get("lost", {}))
        return found

    def _document(self) -> dict[str, Any]:
        document = {
            "format": FORMAT_VERSION,
            "run_id": self._remote_run,
            "rank": self._rank,
            "attempt": self._attempt,
            "host": socket.gethostname(),
            "updated": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "launch": self._launch,
            "sealed": list(self._listed.sealed),
            "parts": by_table(self._listed.parts),
        }
        if self._listed.lost:
            document["lost"] = by_table(self._listed.lost)
        return document

    def _forget(self, part: PartInfo) -> None:
        if self._waiting.pop(part.file, None) is not None:
            self.waiting_bytes -= part.bytes

    def _is_unseen(self, part: PartInfo) -> bool:
        return sequence(part) >= self._next_seq.get(part.table, 0)

    def _written(self, part: PartInfo) -> int | None:
        """When the part's file was written, in nanoseconds; None if it is gone."""
        return _modified(self._spool.path / part.file) or None

    def _renamed(self, part: PartInfo) -> PartInfo:
        """The part as the remote has it."""
        if self._remote_run == self._run_id:
            return part
        return replace(part, file=part.file.replace(f"/run_id={self._run_id}/", f"/run_id={self._remote_run}/", 1))

    def _remote_directory(self) -> str:
        return f"{MANIFESTS}/run_id={self._remote_run}/attempt={self._attempt}"

    def _manifest_name(self) -> str:
        return f"{self._remote_directory()}/rank={self._rank}.json"

    def _read_note(self) -> tuple[str, str]:
        """The launch's name, made at its first taking, and the run's name on the remote."""
        try:
            note = json.loads(self._note.read_bytes())
            return str(note["launch"]), str(note["run_id"])
        except FileNotFoundError:
            self._launch, self._remote_run = secrets.token_hex(16), self._run_id
            self._write_note()
            return self._launch, self._remote_run
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"cannot read {self._note}: {error!r}; without it the rows of rank {self._rank} stay in the spool",
                path=str(self._note),
            ) from error

    def _write_note(self, *, finished: int = 0) -> None:
        """`finished` is when the manifest was written of which the remote has everything, in nanoseconds."""
        put_json(self._note, {"launch": self._launch, "run_id": self._remote_run, "finished": finished})


def is_finished(spool: Store, run_id: str, rank: int, attempt: int) -> bool:
    """Whether an earlier process has brought all of the lane to the remote, and nothing was written since."""
    try:
        finished = json.loads((_directory(spool, run_id, attempt) / f"rank={rank}.json").read_bytes())["finished"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(finished) and finished == _modified(spool.manifest_path(run_id, rank, attempt))


def _is_readable(path: Path) -> bool:
    """Whether a file is there; StoreError if it cannot be read, which is no fault of the remote."""
    try:
        with path.open("rb"):
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}", path=str(path)) from error


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _directory(spool: Store, run_id: str, attempt: int) -> Path:
    return spool.path / NOTES / f"run_id={run_id}" / f"attempt={attempt}"
