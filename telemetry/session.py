"""One run's way to the outside: its identity, the writer of its rows, and its Prometheus endpoint.

The store and the port are tried when this is built, so that a run that could not be recorded fails before it starts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from lm_telemetry.guard import note_failure
from lm_telemetry.process_end import before_exit, finished
from lm_telemetry.ranks import here, identify
from lm_telemetry.run import new_run_id
from lm_telemetry.spool import open_spool
from lm_telemetry.store import Store
from lm_telemetry.upkeep import compact_own, sweep
from lm_telemetry.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from lm_telemetry.bridge import Bridge
    from lm_telemetry.exporters.prometheus import PrometheusExporter
    from lm_telemetry.instruments.base import Columns
    from lm_telemetry.settings import Settings
    from lm_telemetry.uploader import Uploader
    from lm_telemetry.writer import Observer

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for the last rows to be written."""

FORWARD_SECONDS = 20.0
"""How long it waits for trackers to take what is forwarded."""

UPLOAD_SECONDS = 20.0
"""How long it then waits for a remote store to have them."""


_idle: WeakSet[Session] = WeakSet()
"""Sessions that were built and have not begun: a Trainer that restores callbacks builds a second one for a port."""


class Session:
    """Identity, writer and endpoint of a run.

    Attributes:
        run_id: name of the run; None before `start`.
        described: whether the row of `runs` was written.
        world_size: number of ranks that train together.

    Raises:
        StoreError: the store cannot be written.
        SettingsError: the port or the host cannot be had.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._spool = open_spool(settings)
        self._store = Store.open_for_writing(settings.store) if self._spool is None else self._spool.store
        self._uploader: Uploader | None = None
        self._writer: Writer | None = None
        self._bridge: Bridge | None = None
        self._early: list[tuple[str, str, str, int, dict[str, Any]]] = []
        for idle in list(_idle):
            idle.give_up_port(settings.prometheus_port)
        self._exporter = self._open_exporter()
        _idle.add(self)
        self.world_size = 1
        self.run_id: str | None = None
        self.described = False
        self._rank = 0

    @property
    def address(self) -> str | None:
        """Where Prometheus can scrape this run; None if nothing is served."""
        return None if self._exporter is None else self._exporter.address

    def start(self, model: nn.Module, *, continues: str | None = None) -> None:
        """The run begins: it gets its name, unless it goes on with one that has, and its writer starts."""
        _idle.discard(self)
        self._store = Store.open_for_writing(self._store.path)
        identity = identify(
            lambda: self._settings.run_id or continues or new_run_id(type(model).__name__),
            self._store.claim_attempt if self._spool is None else self._spool.claim_attempt,
        )
        self.run_id = identity.run_id
        self._rank = identity.place.rank
        self.described = False
        self.world_size = identity.place.world_size
        if self._exporter is None:
            self._exporter = self._open_exporter()
        observers: list[Observer] = []
        if self._exporter is not None:
            self._exporter.start(run_id=identity.run_id, rank=identity.place.rank, model_class=type(model).__name__)
            observers.append(self._exporter)
        if self._settings.forward_to and identity.place.rank == 0:
            self._bridge = self._open_bridge(identity.run_id)
            observers.append(self._bridge)
        if self._spool is not None:
            self._uploader = self._spool.uploader(identity.run_id, identity.attempt, identity.place.rank)
            observers.append(self._uploader)
        self._writer = Writer(
            self._store,
            run_id=identity.run_id,
            rank=identity.place.rank,
            attempt=identity.attempt,
            flush_seconds=self._settings.flush_seconds,
            observers=observers,
        )
        if self._uploader is not None:
            self._uploader.start(self._writer.event)
            before_exit(self.finish)
        self._tidy(merge=False)
        for severity, kind, message, step, fields in self._early:
            self._writer.event(severity, kind, message, step=step, **fields)
        self._early.clear()
        if identity.problem is not None:
            self.event(
                "warning",
                "ranks_apart",
                f"all ranks were to share one run; this one is on its own: {identity.problem}. Give `run_id`, or "
                "attach after the process group is initialised",
                step=0,
            )

    def give_up_port(self, port: int | None) -> None:
        """Close the endpoint that a run which has not begun holds on `port`; it is opened again when that begins."""
        if port and port == self._settings.prometheus_port and self._exporter is not None:
            self._exporter.close()
            self._exporter = None

    def event(self, severity: str, kind: str, message: str, *, step: int, **fields: Any) -> None:
        """A row of `events`; kept until the run has a name."""
        if self._writer is None:
            self._early.append((severity, kind, message, step, fields))
        else:
            self._writer.event(severity, kind, message, step=step, **fields)

    def submit(self, step: int, produce: Callable[[], Mapping[str, Columns]]) -> None:
        """Rows of a step, to be produced on the writer's thread."""
        if self._writer is not None:
            self._writer.submit(step, produce)

    def describe(self, step: int, produce: Callable[[], Mapping[str, Columns]]) -> None:
        """Write the run's own row, once; `produce` gives its columns, on the writer's thread."""
        if not self.described:
            self.described = True
            self.submit(step, produce)

    def flush(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Wait until what was captured is on disk; whether it is."""
        return self._writer is None or self._writer.flush(timeout)

    def finish(self) -> None:
        """The run is over: write what is left, close the endpoint."""
        if self._writer is not None:
            bridge, self._bridge = self._bridge, None
            if bridge is not None:  # while the run can still tell of what was not taken
                self._writer.flush(CLOSE_SECONDS)
                bridge.close(FORWARD_SECONDS)
            uploader, self._uploader = self._uploader, None
            arrived = uploader is not None and self._upload(uploader)
            if not self._writer.close(CLOSE_SECONDS):
                note_failure("not all captured rows could be written", self._writer.stats)
            self._writer = None
            if uploader is not None:
                finished(self.finish)
                uploader.close(UPLOAD_SECONDS if arrived else 0.0)
            self._tidy(merge=True)
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None

    def _open_exporter(self) -> PrometheusExporter | None:
        """The endpoint that the settings ask for."""
        settings = self._settings
        if settings.prometheus_port is None:
            return None
        from lm_telemetry.exporters.prometheus import PrometheusExporter

        port = settings.prometheus_port + here().local_rank if settings.prometheus_port else 0
        return PrometheusExporter(
            port,
            host=settings.prometheus_host,
            access=settings.prometheus_access(),
            targets=settings.prometheus_targets,
            tell=partial(self.event, "warning", step=0),
        )

    def _open_bridge(self, run_id: str) -> Bridge:
        """What forwards the run's scalars; files of trackers are beside the local store, or beside the spool."""
        from lm_telemetry.bridge import Bridge

        base = self._settings.store if self._spool is None else self._settings.spool
        return Bridge(self._settings.forward_to, run_id=run_id, base=base.rstrip("/"), tell=self.event)

    def _upload(self, uploader: Uploader) -> bool:
        """Wait for the remote store while the run can still tell of what stays behind; whether nothing does."""
        assert self._writer is not None
        self._writer.flush(CLOSE_SECONDS)
        if uploader.drain(UPLOAD_SECONDS):
            return True
        left = uploader.stats
        message = (
            f"{left.waiting_parts} files are left in {self._store.path}, which {self._settings.store} did not take; the"
            " next run with this store and spool uploads them, or `lmt upload`"
        )
        note_failure("the remote store is behind", message)
        self._writer.event(
            "warning",
            "spool_left",
            message,
            step=uploader.step,
            spool=self._store.path,
            parts=left.waiting_parts,
            bytes=left.waiting_bytes,
        )
        return False

    def _tidy(self, *, merge: bool) -> None:
        """Leave a few large files instead of many small ones, in a local store; what fails is logged."""
        if self._spool is not None:
            return
        try:
            if merge and self.run_id is not None:
                compact_own(self._store, self.run_id, self._rank)
            if self._rank == 0:
                sweep(self._store)
        except Exception as error:  # noqa: BLE001 the rows are all on disk, and training must go on as without us
            note_failure("the store could not be tidied up", error)
