"""The Prometheus endpoint of a run: an observer of the writer that serves the latest values on this machine.

    exporter = PrometheusExporter(9108, run_id="llama-1", rank=0, info={"model": "LlamaForCausalLM"})
    Writer(..., observers=[exporter])

The page is rendered on the writer's thread when a flush was tried, at most once in `flush_seconds`; a scrape only copies
bytes. It listens on 127.0.0.1 alone: what comes from outside must come through a proxy that knows who asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.render import CONTENT_TYPE, Latest
from lm_telemetry.exporters.server import PageServer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

    from lm_telemetry.writer import WriterStats


class PrometheusExporter:
    """Serves what a writer's observer sees at `address`, from construction until `close`.

    Args:
        port: port on 127.0.0.1; 0 for any free one.
        run_id: label of every series.
        rank: label of every series.
        info: labels of `lm_telemetry_run_info` (model, commit, world size, ...), and of nothing else.

    Raises:
        SettingsError: the port cannot be had; `.setting` is `prometheus_port`.
    """

    def __init__(self, port: int, *, run_id: str, rank: int, info: Mapping[str, str]) -> None:
        self._latest = Latest(run_id=run_id, rank=rank, info=info)
        self._server = PageServer(port, CONTENT_TYPE)
        self._server.publish(self._latest.render())

    @property
    def address(self) -> str:
        """Where to scrape: `http://127.0.0.1:PORT/metrics`."""
        return self._server.address

    def observe(self, table: str, rows: pa.Table) -> None:
        """Take in a batch of rows."""
        self._latest.observe(table, rows)

    def flushed(self, stats: WriterStats) -> None:
        """Render the page anew."""
        self._latest.flushed(stats)
        self._server.publish(self._latest.render())

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.close()
