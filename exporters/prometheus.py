"""The Prometheus endpoint of a run: an observer of the writer that serves the latest values.

    exporter = PrometheusExporter(9108)          # the address is tried before a long job starts
    exporter.start(run_id="llama-1", rank=0, model_class="LlamaForCausalLM")
    Writer(..., observers=[exporter])

The page is rendered on the writer's thread after each try to flush; a scrape only copies bytes. By default it listens
on 127.0.0.1 alone, and asks nobody who they are.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters.access import Access
from lm_telemetry.exporters.exposition import expose
from lm_telemetry.exporters.render import Latest
from lm_telemetry.exporters.server import LOOPBACK, PageServer
from lm_telemetry.exporters.targets import Target
from lm_telemetry.writer import WriterStats

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa


def _untold(kind: str, message: str, **fields: Any) -> None:
    """Where nobody wants to know."""


class PrometheusExporter:
    """Serves what a writer's observer sees at `address`, from construction until `close`.

    Args:
        port: port to listen on; 0 for any free one. If it is taken, any free one, and a warning `port_taken`.
        host: address of the interface to listen on. One that others can reach gives a warning: `exporter_open` where
            nobody is asked who they are, `exporter_readable` where passwords travel without TLS.
        access: who may scrape, and whether by TLS.
        targets: directory for a file that tells Prometheus of this rank, while a run is served; None for none.
        tell: called with the kind, message and fields of what the user should know.

    Raises:
        SettingsError: the address cannot be had; `.setting` is `prometheus_port` or `prometheus_host`.
    """

    def __init__(
        self,
        port: int,
        *,
        host: str = LOOPBACK,
        access: Access | None = None,
        targets: str | None = None,
        tell: Callable[..., None] = _untold,
    ) -> None:
        self._latest: Latest | None = None
        self._targets, self._tell = targets, tell
        self._target: Target | None = None
        try:
            self._server = PageServer(port, host=host, access=access)
        except SettingsError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE):
                raise
            self._server = PageServer(0, host=host, access=access)
            tell(
                "port_taken",
                f"port {port} is in use; metrics are served at {self.address} instead. Choose another "
                "`prometheus_port`, or have Prometheus find it through `prometheus_targets`",
                port=port,
                address=self.address,
            )
        if not self._server.is_loopback:
            self._tell_of_doors(access or Access())

    def _tell_of_doors(self, access: Access) -> None:
        """Say what is open, of an endpoint that others than this machine can reach."""
        if not access.asks_who:
            self._tell(
                "exporter_open",
                f"whoever reaches {self.address} can read the metrics; set `prometheus_auth`, or "
                f"`prometheus_client_ca`, or leave `prometheus_host` at {LOOPBACK}",
                address=self.address,
            )
        elif access.tls is None:
            self._tell(
                "exporter_readable",
                f"passwords and tokens travel to {self.address} as plain text; set `prometheus_certificate`",
                address=self.address,
            )

    def start(self, *, run_id: str, rank: int, **info: str) -> None:
        """Serve this run from now on, and forget the one before.

        Args:
            run_id: label of every series.
            rank: label of every series.
            info: labels of `lm_telemetry_run_info` (model, commit, world size, ...), and of nothing else.
        """
        self._latest = Latest(run_id=run_id, rank=rank, info=info)
        self.flushed(WriterStats())
        self._withdraw()
        if self._targets is None:
            return
        try:
            self._target = Target(
                self._targets,
                run_id=run_id,
                rank=rank,
                address=self._server.netloc,
                scheme=self.address.partition(":")[0],
            )
        except OSError as error:
            self._tell(
                "targets_failed",
                f"Prometheus cannot be told of {self.address}: no file could be written in {self._targets}"
                f" ({error.strerror})",
                address=self.address,
                directory=self._targets,
            )

    @property
    def address(self) -> str:
        """Where to scrape: `http://127.0.0.1:PORT/metrics`."""
        return self._server.address

    def observe(self, table: str, rows: pa.Table) -> None:
        """Take in rows of one capture or several."""
        if self._latest is not None:
            self._latest.observe(table, rows)

    def flushed(self, stats: WriterStats) -> None:
        """Render the page anew."""
        if self._latest is not None:
            self._latest.flushed(stats)
            self._server.publish(expose(self._latest.collect()))

    def close(self) -> None:
        """Stop serving, free the port, and take back what Prometheus was told."""
        self._withdraw()
        self._server.close()

    def _withdraw(self) -> None:
        if self._target is not None:
            self._target.remove()
            self._target = None
