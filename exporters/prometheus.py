"""The Prometheus endpoint of a run: an observer of the writer that serves the latest values on this machine.

    exporter = PrometheusExporter(9108)          # the port is tried before a long job starts
    exporter.start(run_id="llama-1", rank=0, model_class="LlamaForCausalLM")
    Writer(..., observers=[exporter])

The page is rendered on the writer's thread after each try to flush; a scrape only copies bytes. It listens on 127.0.0.1
alone: what comes from outside must come through a proxy that knows who asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.render import CONTENT_TYPE, Latest
from lm_telemetry.exporters.server import PageServer

if TYPE_CHECKING:
    import pyarrow as pa

    from lm_telemetry.writer import WriterStats


class PrometheusExporter:
    """Serves what a writer's observer sees at `address`, from construction until `close`.

    Args:
        port: port on 127.0.0.1; 0 for any free one.

    Raises:
        SettingsError: the port cannot be had; `.setting` is `prometheus_port`.
    """

    def __init__(self, port: int) -> None:
        self._latest: Latest | None = None
        self._server = PageServer(port, CONTENT_TYPE)

    def start(self, *, run_id: str, rank: int, **info: str) -> None:
        """Serve this run from now on, and forget the one before.

        Args:
            run_id: label of every series.
            rank: label of every series.
            info: labels of `lm_telemetry_run_info` (model, commit, world size, ...), and of nothing else.
        """
        self._latest = Latest(run_id=run_id, rank=rank, info=info)
        self._server.publish(self._latest.render())

    @property
    def address(self) -> str:
        """Where to scrape: `http://127.0.0.1:PORT/metrics`."""
        return self._server.address

    def observe(self, table: str, rows: pa.Table) -> None:
        """Take in a batch of rows."""
        if self._latest is not None:
            self._latest.observe(table, rows)

    def flushed(self, stats: WriterStats) -> None:
        """Render the page anew."""
        if self._latest is not None:
            self._latest.flushed(stats)
            self._server.publish(self._latest.render())

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.close()
