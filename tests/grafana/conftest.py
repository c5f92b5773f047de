"""A real training run, scraped each second by a real Prometheus that has the stack's own files.

It is scraped twice, at its own endpoint and through `lmt export`, as users may have it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from grafana_boards import STEPS
from real_parts import missing
from tiny_models import build, dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lm_telemetry import TelemetryCallback
from lm_telemetry.exporters.grafana.stack import write_stack

STEP_SECONDS = 0.2
CADENCES = {
    "activations": 1,
    "attention": 1,
    "parameters": 1,
    "gradient_noise": 5,
    "critical_sharpness": 5,
    "sharpness": 10,
    "directional_sharpness": 10,
    "block_sharpness": 20,
    "trace": 10,
    "representation": 5,
    "key_mass": 5,
    "knock_out": 20,
}


@pytest.fixture(scope="session")
def promtool():
    """`promtool(*words, given=None)` runs it; its output, and a failure if it fails."""
    binary = shutil.which("promtool")
    if binary is None:
        missing("promtool (Debian: apt-get install prometheus)")

    def run(*words, given=None):
        done = subprocess.run([binary, *map(str, words)], input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


class Watched:
    """What Prometheus answers of the run, as of a moment when it was training."""

    def __init__(self, url):
        self.url, self.moment, self.page = url, None, ""

    def get(self, path, **query):
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def ask(self, expr):
        return self.get("query", query=expr, time=self.moment)["result"]

    def ask_range(self, expr, seconds=6):
        span = {"start": self.moment - seconds, "end": self.moment, "step": 1}
        return self.get("query_range", query=expr, **span)["result"]

    def label_values(self, selector, label):
        span = {"start": self.moment - 30, "end": self.moment}
        return self.get(f"label/{label}/values", **{"match[]": selector}, **span)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """A run that has been trained under the eyes of Prometheus."""
    binary = shutil.which("prometheus")
    if binary is None:
        missing("prometheus (Debian: apt-get install prometheus)")
    base = tmp_path_factory.mktemp("watched")
    stack = write_stack(str(base / "stack"), store=str(base / "store"))
    config = stack.directory / "prometheus" / "prometheus.yml"
    port, export_port = free_port(), free_port()
    config.write_text(config.read_text().replace("15s", "1s").replace(":9109", f":{export_port}"))
    server = [
        binary,
        f"--config.file={config}",
        f"--storage.tsdb.path={base / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    lmt = str(Path(sys.executable).with_name("lmt"))
    export = [lmt, "export", "--store", str(base / "store"), "--port", str(export_port), "--every", "1"]
    with running(server), running(export):
        watched = Watched(f"http://127.0.0.1:{port}")
        train(base, stack.targets, watched)
        yield watched


@contextmanager
def running(words):
    """A process, ended with the block."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def train(base, targets, watched):
    telemetry = TelemetryCallback(
        store=str(base / "store"),
        run_id="watched",
        prometheus_port=0,
        prometheus_targets=str(targets),
        flush_seconds=0.5,
        max_overhead=1.0,
        instruments={name: {"every": every} for name, every in CADENCES.items()},
        strict=True,
    )

    class Slowly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(STEP_SECONDS)
            if state.global_step == STEPS:
                watched.moment = time.time()
                with urllib.request.urlopen(telemetry.address, timeout=10) as answer:
                    watched.page = answer.read().decode()

    arguments = TrainingArguments(
        output_dir=str(base / "out"),
        max_steps=STEPS,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=build("llama"), args=arguments, train_dataset=dataset(), callbacks=[telemetry, Slowly()]).train()
