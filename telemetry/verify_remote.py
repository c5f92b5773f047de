"""Is a store at an URL whole? Its manifests against one listing of its files; nothing is changed, and nothing mended.

Every file that a manifest lists is there and has the listed size, once; every sealed list is there. `deep` also reads
each file as a stream and compares its checksum (CRC-32, taken while it was written), which alone finds a flipped bit.
The manifests are read before the files are listed: an uploader puts a file before it lists it, so that a live run is
whole at every moment, and files that nothing lists yet are no fault of it.

Findings and severities are those of `verify`.

Left out: rows and steps in the files' footers, which the checksum covers; mending. What is missing comes back from the
spool it waits in, or from a copy.
"""

from __future__ import annotations

import json
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.errors import StoreError
from lm_telemetry.inventory import Inventory, part_key, ranks, run_ids
from lm_telemetry.liveness import QUIET_SECONDS
from lm_telemetry.remote import Remote
from lm_telemetry.store import MANIFESTS, Store
from lm_telemetry.verify import SEVERITIES, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.store import PartInfo

_CHUNK = 1 << 22
_COPY = "bring it back from a copy, or copy the store to a directory and mend it there (`lmt verify --repair`)"


def verify_remote(url: str, *, deep: bool = False) -> list[Finding]:
    """What is wrong with the store at `url`, the worst first. Empty if all is well.

    Raises:
        StoreError: there is no store, or it cannot be read.
    """
    from lm_telemetry.queries.mirror import Mirror

    mirror, remote = Mirror(url), Remote(url)
    store = Store(mirror.path)
    try:
        found = list(_Check(store, remote, remote.sizes(), deep=deep).findings())
    except StoreError:
        raise
    except Exception as error:  # whatever a client raises
        raise StoreError(f"cannot read {url}: {type(error).__name__}: {error}", path=url) from error
    return sorted(found, key=lambda finding: (SEVERITIES[finding.severity], finding.file))


class _Check:
    """The manifests of `store`, a copy, against the files of `remote`, by name with their bytes."""

    def __init__(self, store: Store, remote: Remote, files: dict[str, int], *, deep: bool) -> None:
        self._store, self._remote, self._files, self._deep = store, remote, files, deep
        self._known: set[str] = set()
        """files that a manifest names, or may name where it cannot be read"""

    def findings(self) -> Iterator[Finding]:
        for run_id in run_ids(self._store):
            try:
                if self._store.is_pruned(run_id):
                    self._known |= {file for file in self._files if f"/run_id={run_id}/" in file}
                    continue
            except StoreError as error:
                yield self._unreadable(Path(error.path), str(error))
            for rank in ranks(self._store, run_id):
                yield from self._rank(Inventory.take(self._store, run_id, rank))
        yield from self._strangers()

    def _rank(self, inventory: Inventory) -> Iterator[Finding]:
        for attempt, why in inventory.unreadable.items():
            yield self._unreadable(self._store.manifest_path(inventory.run_id, inventory.rank, attempt), why)
        if inventory.compaction_error:
            yield self._unreadable(inventory.compaction_path, inventory.compaction_error)
        if inventory.unreadable or inventory.compaction_error:
            place = f"/run_id={inventory.run_id}/rank={inventory.rank}/"
            self._known |= {file for file in self._files if place in file}
        self._known |= inventory.retired.keys()
        for part in [part for files in inventory.compacted.values() for part in files]:
            yield from self._file(part)
        for manifest in inventory.manifests.values():
            for part in manifest.parts:
                key = part_key(part.file)
                if key is not None and inventory.is_replaced(part.table, *key):
                    self._known.add(part.file)
                else:
                    yield from self._file(part)
            for part in manifest.lost:
                self._known.add(part.file)
                message = f"{part.rows} rows (steps {part.first_step} to {part.last_step}) did not arrive"
                yield Finding(severity="info", kind="lost", file=part.file, message=message)

    def _file(self, listed: PartInfo) -> Iterator[Finding]:
        """A file against what a manifest says of it."""
        facts = f"{listed.rows} rows, steps {listed.first_step} to {listed.last_step}"
        size = self._files.get(listed.file)
        if listed.file in self._known:
            yield _error("manifest", listed.file, f"it is listed twice, and queries fail; {_COPY}")
        elif size is None:
            message = f"a manifest lists it ({facts}) and it is gone; queries of {listed.table} fail; {_COPY}"
            yield _error("missing", listed.file, message)
        elif size != listed.bytes:
            message = f"not what was written ({facts}): {listed.bytes} bytes were listed, {size} are there; {_COPY}"
            yield _error("damaged", listed.file, message)
        elif self._deep and listed.crc32 is not None and (found := self._checksum(listed.file)) != listed.crc32:
            message = f"not what was written ({facts}): CRC-32 {listed.crc32} was listed, it is {found}; {_COPY}"
            yield _error("damaged", listed.file, message)
        self._known.add(listed.file)

    def _checksum(self, name: str) -> int:
        found = 0
        with self._remote.open(name) as file:
            while chunk := file.read(_CHUNK):
                found = zlib.crc32(chunk, found)
        return found

    def _strangers(self) -> Iterator[Finding]:
        """Files that no manifest names."""
        recent = {run_id for run_id in run_ids(self._store) if self._is_recent(run_id)}
        for file in self._files.keys() - self._known:
            if file.startswith(f"{MANIFESTS}/"):
                continue
            run = file.split("/")[1].removeprefix("run_id=") if file.count("/") == 3 else None
            if run is None or part_key(file) is None:
                yield Finding(severity="info", kind="foreign", file=file, message="not of this store; it does no harm")
            elif run not in recent:
                message = "no manifest lists it: its upload was not finished; `lmt upload` of that spool finishes it"
                yield Finding(severity="warning", kind="unlisted", file=file, message=message)

    def _is_recent(self, run_id: str) -> bool:
        """Whether anything was listed so lately that a process may be about to list more."""
        for path in self._store.manifests(run_id).glob("attempt=*/rank=*.json"):
            try:
                updated = datetime.fromisoformat(json.loads(path.read_bytes())["updated"])
                if datetime.now(UTC) - updated < timedelta(seconds=QUIET_SECONDS):
                    return True
            except (ValueError, KeyError, TypeError):  # a sealed list, or one that is told of already
                continue
        return False

    def _unreadable(self, path: Path, why: str) -> Finding:
        # The copy that was read lies in a temporary directory, which tells nobody anything.
        why = why.replace(f"{self._store.path}/", "")
        return _error("manifest", str(path.relative_to(self._store.path)), f"{why}; {_COPY}")


def _error(kind: str, file: str, message: str) -> Finding:
    return Finding(severity="error", kind=kind, file=file, message=message)
