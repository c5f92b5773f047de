"""The endpoint beside a real writer, scraped by a real Prometheus."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters import PrometheusExporter
from lm_telemetry.store import Store
from lm_telemetry.writer import Writer, WriterStats


def page(exporter):
    with urllib.request.urlopen(exporter.address, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.read().decode()


def test_before_it_is_started_the_page_is_empty(rows):
    exporter = PrometheusExporter(0)
    exporter.observe("steps", rows("steps", 1, loss=[1.0]))
    assert page(exporter) == ""
    exporter.close()


def test_a_taken_port_fails_at_construction():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SettingsError) as caught:
        PrometheusExporter(taken.getsockname()[1])
    assert caught.value.setting == "prometheus_port"


def test_it_shows_what_a_writer_writes(exporter, tmp_path):
    writer = Writer(
        Store.open_for_writing(tmp_path), run_id="r", rank=0, attempt=0, flush_seconds=60, observers=[exporter]
    )
    writer.submit(3, lambda: {"steps": {"loss": [2.5]}})
    assert writer.flush(10)
    assert 'lm_telemetry_steps_loss{rank="0",run_id="r"} 2.5' in page(exporter)
    assert 'lm_telemetry_written_rows_total{rank="0",run_id="r"} 1.0' in page(exporter)
    assert writer.close(10)


def test_starting_anew_forgets_the_run_before(exporter, rows):
    exporter.observe("steps", rows("steps", 1, loss=[1.0]))
    exporter.start(run_id="second", rank=1)
    text = page(exporter)
    assert 'run_id="second"' in text
    assert 'run_id="r"' not in text


@pytest.fixture
def prometheus(exporter, tmp_path):
    """A real Prometheus that scrapes the exporter each second; `ask(query)` gives its answer."""
    binary = shutil.which("prometheus")
    if binary is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("prometheus is not installed (Debian: apt-get install prometheus)")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    target = exporter.address.removeprefix("http://").removesuffix("/metrics")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: lm, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(query, patience=30):
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    result = json.load(answer)["data"]["result"]
            except OSError:
                result = []
            if result:
                return [(entry["metric"], float(entry["value"][1])) for entry in result]
            time.sleep(0.1)
        return []

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(20)


def test_a_real_prometheus_scrapes_it_and_answers(exporter, rows, prometheus):
    exporter.observe("steps", rows("steps", 12, loss=[2.25], tokens=[1000], seconds=[0.5]))
    stack = {"stack": ["decoder"] * 2, "layer": [0, 1], "site": ['odd"\n'] * 2}
    exporter.observe("layers", rows("layers", 12, **stack, rms=[1.0, float("inf")]))
    exporter.flushed(WriterStats(rows=3))
    ((labels, loss),) = prometheus("lm_telemetry_steps_loss")
    assert (loss, labels["run_id"], labels["rank"], labels["job"]) == (2.25, "r", "0", "lm")
    ((_, speed),) = prometheus("lm_telemetry_steps_tokens / lm_telemetry_steps_seconds")
    assert speed == 2000
    ((labels, rms),) = prometheus("topk(1, lm_telemetry_layers_rms)")
    assert (rms, labels["layer"], labels["site"]) == (float("inf"), "1", 'odd"\n')
    ((labels, _),) = prometheus("lm_telemetry_steps_loss * on(run_id) group_left(model_class) lm_telemetry_run_info")
    assert labels["model_class"] == "Llama"
    assert prometheus("up{job='lm'}")[0][1] == 1
