"""An exporter that is started and closed, and rows to show it."""

import pytest

from lm_telemetry.columns import to_table
from lm_telemetry.exporters import PrometheusExporter


@pytest.fixture
def exporter():
    exporter = PrometheusExporter(0)
    exporter.start(run_id="r", rank=0, model_class="Llama")
    yield exporter
    exporter.close()


@pytest.fixture
def rows():
    def make(table, step, **columns):
        return to_table(table, columns, attempt=0, step=step, time_us=1_000_000 * step)

    return make
