"""The endpoint beside a real writer, scraped by a real Prometheus."""

import contextlib
import errno
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
from lm_telemetry.exporters.access import Access
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


def test_a_taken_port_gives_any_free_one_and_says_so():
    told = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        exporter = PrometheusExporter(port, tell=lambda *words, **fields: told.append((*words, fields)))
        assert exporter.address != f"http://127.0.0.1:{port}/metrics"
        assert page(exporter) == ""
        exporter.close()
    ((kind, message, fields),) = told
    assert (kind, fields) == ("port_taken", {"port": port, "address": exporter.address})
    assert str(port) in message
    assert exporter.address in message


def test_a_port_that_cannot_be_had_at_all_fails_at_construction(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(SettingsError, match=r"prometheus_port: .*Permission denied") as caught:
        PrometheusExporter(80)
    assert (caught.value.setting, caught.value.value) == ("prometheus_port", 80)


@pytest.mark.parametrize(
    ("guard", "host", "kinds"),
    [
        (None, "127.0.0.1", []),
        (None, "0.0.0.0", ["exporter_open"]),
        ("auth", "0.0.0.0", ["exporter_readable"]),
        ("tls", "0.0.0.0", ["exporter_open"]),
        ("both", "0.0.0.0", []),
        ("mutual", "0.0.0.0", []),
    ],
)
def test_an_open_door_is_told_of(guarding, guard, host, kinds):
    told = []
    access = guarding.get(guard)
    PrometheusExporter(0, host=host, access=access, tell=lambda kind, *_, **__: told.append(kind)).close()
    assert told == kinds


def test_prometheus_is_told_where_to_scrape_while_there_is_something(tmp_path):
    exporter = PrometheusExporter(0, targets=str(tmp_path))
    assert list(tmp_path.iterdir()) == [], "no run yet"
    for run_id in ("first", "second"):
        exporter.start(run_id=run_id, rank=2)
        (path,) = tmp_path.iterdir()
        assert path.name == f"{run_id}-2.json"
        assert json.loads(path.read_text())[0]["targets"] == [exporter.address.split("/")[2]]
    exporter.close()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_targets_that_cannot_be_written_is_no_obstacle(tmp_path):
    told = []
    (tmp_path / "file").write_text("")
    exporter = PrometheusExporter(0, targets=str(tmp_path / "file"), tell=lambda kind, *_, **__: told.append(kind))
    exporter.start(run_id="r", rank=0)
    assert told == ["targets_failed"]
    assert "lm_telemetry_run_info" in page(exporter)
    exporter.close()


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
def guarding(certificates, tmp_path):
    """Ways to guard an endpoint."""
    auth = tmp_path / "auth"
    auth.write_text("basic grafana:sesame\n")
    tls = {"certificate": certificates["server"], "key": certificates["server_key"]}
    return {
        "auth": Access.load(auth=str(auth)),
        "tls": Access.load(**tls),
        "both": Access.load(**tls, auth=str(auth)),
        "mutual": Access.load(**tls, client_ca=certificates["ca"], auth=str(auth)),
    }


@pytest.fixture
def prometheus(tmp_path):
    """Starts a real Prometheus with a scrape configuration; gives `ask(query)`, which waits for an answer."""
    binary = shutil.which("prometheus")
    if binary is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("prometheus is not installed (Debian: apt-get install prometheus)")
    with contextlib.ExitStack() as stack:

        def start(**scrape):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            config = tmp_path / "prometheus.yml"
            globally = {"scrape_interval": "1s"}
            config.write_text(json.dumps({"global": globally, "scrape_configs": [{"job_name": "lm", **scrape}]}))
            process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--enable-feature=exemplar-storage",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)

            def get(path, patience=30, **query):
                url = f"http://127.0.0.1:{port}/api/v1/{path}?" + urllib.parse.urlencode(query)
                deadline = time.monotonic() + patience
                while time.monotonic() < deadline and process.poll() is None:
                    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                        data = json.load(answer)["data"]
                        found = data["result"] if isinstance(data, dict) else data
                        if found:
                            return found
                    time.sleep(0.1)
                return []

            def ask(query, **more):
                found = get("query", query=query, **more)
                return [(entry["metric"], float(entry["value"][1])) for entry in found]

            return ask, get

        yield start


def test_a_real_prometheus_scrapes_it_and_answers(exporter, rows, prometheus):
    exporter.observe("steps", rows("steps", 12, loss=[2.25], tokens=[1000], seconds=[0.5]))
    stack = {"stack": ["decoder"] * 2, "layer": [0, 1], "site": ['odd"\n'] * 2}
    exporter.observe("layers", rows("layers", 12, **stack, rms=[1.0, float("inf")]))
    exporter.flushed(WriterStats(rows=3))
    ask, _ = prometheus(static_configs=[{"targets": [exporter.address.split("/")[2]]}])
    ((labels, loss),) = ask("lm_telemetry_steps_loss")
    assert (loss, labels["run_id"], labels["rank"], labels["job"]) == (2.25, "r", "0", "lm")
    ((_, speed),) = ask("lm_telemetry_steps_tokens / lm_telemetry_steps_seconds")
    assert speed == 2000
    ((labels, rms),) = ask("topk(1, lm_telemetry_layers_rms)")
    assert (rms, labels["layer"], labels["site"]) == (float("inf"), "1", 'odd"\n')
    ((labels, _),) = ask("lm_telemetry_steps_loss * on(run_id) group_left(model_class) lm_telemetry_run_info")
    assert labels["model_class"] == "Llama"
    assert ask("up{job='lm'}")[0][1] == 1


def test_a_real_prometheus_finds_a_guarded_one_and_keeps_its_exemplars(
    *, guarding, certificates, rows, everything, prometheus, tmp_path
):
    targets = tmp_path / "targets"
    exporter = PrometheusExporter(0, access=guarding["mutual"], targets=str(targets))
    exporter.start(run_id="guarded", rank=1, model_class="Llama")
    everything(exporter._latest)
    exporter.flushed(WriterStats())
    ask, get = prometheus(
        file_sd_configs=[{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}],
        basic_auth={"username": "grafana", "password": "sesame"},
        tls_config={
            "ca_file": certificates["ca"],
            "cert_file": certificates["client"],
            "key_file": certificates["client_key"],
        },
    )
    ((labels, value),) = ask("lm_telemetry_steps_loss")
    assert (value, labels["run_id"]) == (1, "guarded")
    assert set(labels) == {"__name__", "job", "instance", "run_id", "rank"}
    text = {"severity": ["error"], "kind": ["flush_failed"], "message": ["m"], "fields": ["{}"]}
    now = int(time.time())
    exporter.observe("events", rows("events", now, **text))
    exporter.flushed(WriterStats())
    exemplars = get("query_exemplars", query="lm_telemetry_events_total", start=now - 60, end=now + 60)
    assert [e["labels"] for e in exemplars[0]["exemplars"]] == [{"kind": "flush_failed", "step": str(now)}]
    exporter.close()
    assert ask("absent(up{job='lm'})")[0][1] == 1, "without its file there is no target, rather than one that is down"
