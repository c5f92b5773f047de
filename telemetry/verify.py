"""Is a store whole? What is missing, damaged, left over or foreign, said in words that name the file and the remedy.

`verify` holds the manifests against the disk: every file they list is there, has the listed size, rows and steps, and
is Parquet of its table; no part is listed twice, none that is on disk is forgotten; what a compaction has replaced is
in its files, once. `deep` also reads every value and compares the checksum that was taken while the file was written,
which alone finds a flipped bit among the numbers.

Severities: `error`, rows that were acknowledged are lost or a query will fail; `warning`, leftovers of a crash, no
acknowledged row is concerned; `info`, good to know. A live run may be looked at: what its writer is about to finish is
not reported. `repair` (its own module) mends errors and warnings.

Left out: whether the numbers make sense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lm_telemetry.coverage import Coverage, coverage, has, overlap, union
from lm_telemetry.errors import StoreError
from lm_telemetry.inventory import Inventory, describe, is_parquet, metadata, part_key, ranks, run_ids
from lm_telemetry.liveness import attempt_is_live, is_live
from lm_telemetry.quarantine import QUARANTINE
from lm_telemetry.schema import ALL_TABLES
from lm_telemetry.store import MANIFESTS, PRUNED, Store
from lm_telemetry.visibility import HIDDEN, compact_key, is_hidden, visible

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from lm_telemetry.store import Manifest, PartInfo

Severity = Literal["error", "warning", "info"]
SEVERITIES: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
"""The order in which they are told."""

_REMEDY = "`lmt verify --repair` "


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        severity: `error`, `warning` or `info`, see the module.
        kind: `missing`, `damaged`, `manifest`, `compaction`, `unlisted`, `gap`, `orphan`, `replaced`, `temporary`,
            `unmanaged`, `lost` or `foreign`.
        file: path relative to the store.
        message: what it is, and what to do.
    """

    severity: Severity
    kind: str
    file: str
    message: str


def verify(path: str | os.PathLike[str], *, deep: bool = False) -> list[Finding]:
    """What is wrong with the store at `path`, the worst first; nothing is changed. Empty if all is well.

    Raises:
        StoreError: there is no store.
    """
    store = Store(Path(path).absolute())
    if not store.path.is_dir():
        raise StoreError(f"there is no store at {store.path}", path=str(store.path))
    findings = list(_strangers(store))
    for run_id in run_ids(store):
        try:
            if store.is_pruned(run_id):
                continue
        except StoreError as error:
            file = str(Path(error.path).relative_to(store.path))
            message = f"{error}. {_REMEDY}puts it into {QUARANTINE}, and the run is there again"
            findings.append(Finding(severity="error", kind="manifest", file=file, message=message))
        findings += _in_manifests(store, run_id)
        for rank in ranks(store, run_id):
            found = list(_Check(Inventory.take(store, run_id, rank), deep=deep).findings())
            if any(finding.kind == "missing" for finding in found):
                # A compaction beside us may have deleted what it replaced after we read its manifest.
                found = list(_Check(Inventory.take(store, run_id, rank), deep=deep).findings())
            findings += found
    return sorted(findings, key=lambda finding: (SEVERITIES[finding.severity], finding.file))


class _Check:
    """One rank of one run."""

    def __init__(self, inventory: Inventory, *, deep: bool) -> None:
        self._inventory = inventory
        self._deep = deep
        self._live = is_live(inventory.store, inventory.run_id)
        self._listed: set[str] = set()

    def findings(self) -> Iterator[Finding]:
        inventory = self._inventory
        for attempt, why in inventory.unreadable.items():
            path = inventory.store.manifest_path(inventory.run_id, inventory.rank, attempt)
            yield self._error("manifest", path, f"{why}. {_REMEDY}writes it anew from the parts there are")
        for attempt, manifest in inventory.manifests.items():
            yield from self._manifest(attempt, manifest)
        yield from self._compaction()
        yield from self._disk()
        if not self._live:
            for path in inventory.temporaries:
                yield self._warning("temporary", path, f"a file that a killed process left. {_REMEDY}removes it")

    def _manifest(self, attempt: int, manifest: Manifest) -> Iterator[Finding]:
        inventory = self._inventory
        path = inventory.store.manifest_path(manifest.run_id, manifest.rank, attempt)
        found: dict[str, set[int]] = {}
        for part in manifest.parts:
            key = part_key(part.file)
            directory = inventory.store.partition(part.table, manifest.run_id, manifest.rank)
            if key is None or key[0] != attempt or (inventory.store.path / part.file).parent != directory:
                yield self._error("manifest", path, f"it lists {part.file}, which is no part of this rank's. {_REMEDY}")
                continue
            if part.file in self._listed:
                yield self._error("manifest", path, f"it lists {part.file} twice. {_REMEDY}mends it")
                continue
            self._listed.add(part.file)
            if not inventory.is_replaced(part.table, *key):
                found.setdefault(part.table, set()).add(key[1])
                yield from self._file(part)
        for part in manifest.lost:
            key = part_key(part.file)
            if key is not None:
                self._listed.add(part.file)
                found.setdefault(part.table, set()).add(key[1])
            known = part.first_step is not None
            rows = f"{part.rows} rows (steps {part.first_step} to {part.last_step})" if known else "its rows"
            yield self._finding("info", "lost", part.file, f"{rows} were lost before; a repair noted it")
        for table, sequence in found.items():
            for seq in sorted(set(range(min(sequence), max(sequence))) - sequence):
                file = f"{table}/run_id={manifest.run_id}/rank={manifest.rank}/part-{attempt}-{seq}.parquet"
                if not inventory.is_replaced(table, attempt, seq) and f"part-{attempt}-{seq}.parquet" not in (
                    inventory.disk.get(table, {})
                ):
                    yield self._finding(
                        "warning",
                        "gap",
                        file,
                        "no manifest lists this part, though it lists later ones, and it is gone",
                    )

    def _file(self, listed: PartInfo) -> Iterator[Finding]:
        """A file against what a manifest says of it."""
        path = self._inventory.store.path / listed.file
        facts = f"{listed.rows} rows, steps {listed.first_step} to {listed.last_step}"
        if not path.is_file():
            yield self._error(
                "missing",
                path,
                f"a manifest lists it ({facts}) and it is gone; queries of {listed.table} fail. Bring it"
                f" back from a copy, or {_REMEDY}notes it as lost",
            )
            return
        try:
            found = describe(self._inventory.store, path, listed.table, deep=self._deep)
        except StoreError as error:
            remedy = f"{_REMEDY}puts it into {QUARANTINE}"
            yield self._error("damaged", path, f"{error} ({facts}). Bring it back from a copy, or {remedy}")
            return
        differing = differences(listed, found)
        if differing:
            yield self._error("damaged", path, f"not what was written: {'; '.join(differing)}. {_REMEDY}settles it")

    def _compaction(self) -> Iterator[Finding]:
        inventory = self._inventory
        path = inventory.compaction_path
        if inventory.compaction_error:
            yield self._error("compaction", path, f"{inventory.compaction_error}. {_REMEDY}writes it anew")
            return
        yield from self._retired()
        for table, files in inventory.compacted.items():
            yield from self._covered(table, files)

    def _covered(self, table: str, files: list[PartInfo]) -> Iterator[Finding]:
        """Whether compacted files have the rows of the parts that they replace, once."""
        inventory = self._inventory
        path = inventory.compaction_path
        covered: Coverage = {}
        for listed in files:
            self._listed.add(listed.file)
            yield from self._file(listed)
            mine = coverage(listed.file, metadata(inventory.store.path / listed.file)) or {}
            if overlap(covered, mine):
                yield self._error("compaction", path, f"{listed.file} has rows of another file. {_REMEDY}mends it")
            covered = union([covered, mine])
            if any(not inventory.is_replaced(table, attempt, hi - 1) for attempt in mine for _, hi in mine[attempt]):
                yield self._error("compaction", path, f"rows of {listed.file} are in parts, too. {_REMEDY}mends it")
        for manifest in inventory.manifests.values():
            for part in manifest.parts:
                key = part_key(part.file)
                if part.table == table and key and inventory.is_replaced(table, *key) and not has(covered, *key):
                    message = f"it replaces {part.file}, whose rows no compacted file has. {_REMEDY}mends it"
                    yield self._error("compaction", path, message)

    def _retired(self) -> Iterator[Finding]:
        """Files that are about to be deleted although queries read them."""
        inventory = self._inventory
        read = {file.file for files in inventory.compacted.values() for file in files}
        for file in inventory.retired:
            key = part_key(file)
            if file in read or (key and not inventory.is_replaced(file.split("/", 1)[0], *key)):
                message = f"it is about to delete {file}, whose rows are in no other file. {_REMEDY}mends it"
                yield self._error("compaction", inventory.compaction_path, message)

    def _disk(self) -> Iterator[Finding]:
        """Files that no manifest knows."""
        inventory = self._inventory
        managed = bool(inventory.manifests or inventory.unreadable)
        shown = {visible(f.file) for files in inventory.compacted.values() for f in files if is_hidden(f.file)}
        for table, files in inventory.disk.items():
            for name, path in files.items():
                file = inventory.relative(path)
                if file in self._listed or file in inventory.retired or inventory.compaction_error:
                    continue
                key = part_key(name)
                if key and path.is_file():
                    yield from self._unlisted(table, path, key, managed=managed)
                elif file in shown and path.is_file():
                    if not self._live:
                        message = "readers without our manifests may see its rows twice: a compaction was killed."
                        yield self._warning("orphan", path, f"{message} {_REMEDY}brings it to its end")
                elif compact_key(file) and path.is_file():
                    yield from self._orphan(path, managed=managed)
                else:
                    yield from self._foreign(path, managed=managed)

    def _unlisted(self, table: str, path: Path, key: tuple[int, int], *, managed: bool) -> Iterator[Finding]:
        """A part on disk that no manifest lists."""
        inventory = self._inventory
        if key[0] in inventory.unreadable:
            return
        if inventory.is_replaced(table, *key):
            yield self._warning("replaced", path, f"compacted files have its rows. {_REMEDY}has it deleted")
            return
        try:
            rows = f"{describe(inventory.store, path, table, deep=self._deep).rows} rows that were not acknowledged"
        except StoreError as error:
            if key[0] in inventory.manifests:
                yield self._warning(
                    "unlisted", path, f"{error}, and in no manifest. {_REMEDY}puts it into {QUARANTINE}"
                )
            else:
                message = f"{error}; there is no manifest of its attempt, and queries fail. {_REMEDY}puts it aside"
                yield self._error("damaged", path, message)
            return
        if attempt_is_live(inventory.store, inventory.run_id, key[0]):
            return
        if not managed:
            yield self._finding("info", "unmanaged", inventory.relative(path), f"{rows}: its rank has no manifest")
        else:
            yield self._warning("unlisted", path, f"{rows}: a crash came before the manifest. {_REMEDY}brings them in")

    def _orphan(self, path: Path, *, managed: bool) -> Iterator[Finding]:
        """A compacted file that no manifest lists."""
        is_read = not managed and not is_hidden(self._inventory.relative(path))
        if is_read and not self._inventory.compaction_path.exists():
            message = f"no manifest tells which rows it has in place of others. {_REMEDY}asks the file"
            yield self._error("orphan", path, message)
        elif not self._live:
            yield self._warning("orphan", path, f"no manifest lists this compacted file. {_REMEDY}settles what it is")

    def _foreign(self, path: Path, *, managed: bool) -> Iterator[Finding]:
        """A file with a name that we give none."""
        if managed or path.suffix != ".parquet":
            message = "not a file of this store; queries pass it by"
            yield self._finding("info", "foreign", self._inventory.relative(path), message)
        elif is_parquet(path):
            message = "not a file of this store; queries read it, for its rank has no manifest"
            yield self._finding("info", "foreign", self._inventory.relative(path), message)
        else:
            message = f"its rank has no manifest, so queries read it and fail: it is no Parquet. {_REMEDY}puts it aside"
            yield self._error("damaged", path, message)

    def _error(self, kind: str, path: Path, message: str) -> Finding:
        return self._finding("error", kind, self._inventory.relative(path), message)

    def _warning(self, kind: str, path: Path, message: str) -> Finding:
        return self._finding("warning", kind, self._inventory.relative(path), message)

    @staticmethod
    def _finding(severity: Severity, kind: str, file: str, message: str) -> Finding:
        return Finding(severity=severity, kind=kind, file=file, message=message.strip())


def differences(listed: PartInfo, found: PartInfo) -> list[str]:
    """In what a file is not as a manifest lists it; facts that either does not have are not compared."""
    if listed.crc32 is None or found.crc32 is None:
        listed, found = replace(listed, crc32=None), replace(found, crc32=None)
    pairs = {
        "bytes": (listed.bytes, found.bytes),
        "rows": (listed.rows, found.rows),
        "first step": (listed.first_step, found.first_step),
        "last step": (listed.last_step, found.last_step),
        "CRC-32": (listed.crc32, found.crc32),
    }
    return [f"{what}: {then} were listed, {now} are there" for what, (then, now) in pairs.items() if then != now]


def _in_manifests(store: Store, run_id: str) -> Iterator[Finding]:
    """Files among the manifests of a run that belong to none."""
    if is_live(store, run_id):
        return
    for path in sorted(store.manifests(run_id).glob("**/*")):
        file = str(path.relative_to(store.path))
        if path.is_dir() or path.name == PRUNED or path.name.endswith(".lock"):
            continue
        if path.name.startswith(".") and path.name.endswith(".tmp"):
            yield Finding(
                severity="warning",
                kind="temporary",
                file=file,
                message=f"a file that a killed process left. {_REMEDY}removes it",
            )
        elif not (path.name.startswith("rank=") and path.name.endswith(".json")):
            yield Finding(severity="info", kind="foreign", file=file, message="not a file of this store")


def _strangers(store: Store) -> Iterator[Finding]:
    """What lies in the store beside tables and runs."""
    for path in sorted(store.path.iterdir()):
        if path.name in {*ALL_TABLES, MANIFESTS}:
            strangers = [p for p in path.iterdir() if not (p.is_dir() and p.name.startswith("run_id="))]
            strangers += [
                p for p in path.glob("run_id=*/*") if path.name != MANIFESTS and not p.name.startswith("rank=")
            ]
        elif path.name in {QUARANTINE, HIDDEN}:
            continue
        else:
            strangers = [path]
        for stranger in strangers:
            file = str(stranger.relative_to(store.path))
            if stranger.name.startswith(".probe-"):
                message = f"left by a process that was killed as it began. {_REMEDY}removes it"
                yield Finding(severity="warning", kind="temporary", file=file, message=message)
                continue
            yield Finding(severity="info", kind="foreign", file=file, message="not of this store; it does no harm")
