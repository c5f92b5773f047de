"""What a scrape takes, and what it costs the training, beside `prometheus_client`'s own server.

Two settings:

- `scrape`: 2,000 series in a process whose main thread is idle, or runs pure Python, so that the server has the
  interpreter's lock only when it is given up after 5 ms. A client in another process asks as Prometheus does
  (OpenMetrics, gzip), ours and `prometheus_client.start_http_server` with a collector of the same gauges in turns; a
  row gives the median of the times to the last byte, with its 20th and 80th percentile, and its ratio to the peer's
  median. Prometheus keeps its connection where the server allows it, so ours is measured with a kept connection, and
  with a new one each time.
- `training`: the loop of `overhead.py` with all per-step instruments and an endpoint, with scrapes against none, on one
  core, the client on another. Blocks of two seconds take turns, four a round: with a scrape each second, with fifty,
  and two without. A row gives the median over rounds of the ratio of a block's wall time to that of one without, and
  of their processor times, each with its 95 % interval (percentile bootstrap), and the share of the time that the
  server's thread computed, which no other process disturbs. `none against none` tells what the machine itself
  scatters, which is more than a scrape a second can cost; so what one costs is read off fifty, as
  `1 + (ratio - 1) / (scrapes a second)`: the row `a scrape each second, from 50`. Scrapes are counted, not supposed.
  Rows are written to disk between blocks, since a flush within some of them would scatter by more than what is looked
  for.

    python benchmarks/exporter.py           # appends rows to benchmarks/results/exporter.csv
    python benchmarks/exporter.py --quick   # a quick look; writes nothing
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from rows import append

from lm_telemetry.exporters.exposition import expose
from lm_telemetry.exporters.server import PageServer

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILIES, SERIES = 20, 2000
MANY = 50
"""Scrapes a second that cost enough to be measured."""
LIKE_PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}


class Gauges:
    """2,000 gauges as a plain collector."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for number in range(FAMILIES):
            labels = ["run_id", "rank", "stack", "layer", "site"]
            family = GaugeMetricFamily(f"lm_telemetry_layers_column_{number}", "a column", labels=labels)
            for layer in range(SERIES // FAMILIES):
                family.add_metric(["llama-0123456789", "0", "decoder", str(layer), "resid"], layer / 7 + number)
            yield family


def scrape(connection: http.client.HTTPConnection) -> float:
    """Milliseconds of one scrape."""
    began = time.perf_counter()
    connection.request("GET", "/metrics", headers=LIKE_PROMETHEUS)
    answer = connection.getresponse()
    body = answer.read()
    took = time.perf_counter() - began
    assert answer.status == 200, answer.status
    assert body
    return 1e3 * took


def client(ports: dict[str, int], scrapes: int) -> None:
    """Scrape the servers in turns, and print the times; runs in a process of its own."""
    kept = {name: http.client.HTTPConnection("127.0.0.1", port) for name, port in ports.items() if "kept" in name}
    times: dict[str, list[float]] = {name: [] for name in ports}
    for _ in range(scrapes):
        for name, port in ports.items():
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as fresh:
                times[name].append(scrape(kept.get(name, fresh)))
    print(json.dumps({name: found[2:] for name, found in times.items()}))


def visitor(port: int, seconds: float) -> None:
    """Scrape every so many seconds until the process is ended, and write a byte of each.

    While it is stopped the server closes its connection for being idle: then it connects anew.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while True:
        began = time.monotonic()
        try:
            scrape(connection)
        except (http.client.HTTPException, ConnectionError):
            connection.close()
            continue
        os.write(1, b".")
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))


def run_python(seconds: float) -> int:
    """Pure Python, which gives up the interpreter's lock only when it has to."""
    end, total = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for number in range(1000):
            total += number * number % 7
    return total


def scrapes(count: int) -> Iterator[dict[str, Any]]:
    """Rows of the first setting."""
    from overhead import spread  # here, since clients are this file too, and need no torch

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Gauges())
    peer, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    ours = PageServer(0)
    ours.publish(expose(Gauges().collect()))
    ports = {
        "ours, kept connection": ours.port,
        "ours, new connection": ours.port,
        "prometheus_client": peer.server_port,
    }
    for setting in ("idle", "pure Python"):
        with subprocess.Popen(
            [sys.executable, __file__, "--client", json.dumps(ports), "--scrapes", str(count)], stdout=subprocess.PIPE
        ) as asking:
            while asking.poll() is None:
                run_python(0.2) if setting == "pure Python" else time.sleep(0.1)
            assert asking.stdout is not None
            times = json.loads(asking.stdout.read())
        base = statistics.median(times["prometheus_client"])
        for name, found in times.items():
            yield {
                "setting": "scrape",
                "main_thread": setting,
                "variant": name,
                **spread("milliseconds", found),
                "ratio_to_peer": round(statistics.median(found) / base, 4),
                "series": SERIES,
                "samples": len(found),
            }
    peer.shutdown()
    thread.join()
    ours.close()


class Block(NamedTuple):
    """Seconds that some steps took."""

    wall: float
    processor: float
    """of all threads of the process"""
    server: float
    """of the endpoint's thread"""
    scrapes: int = 0
    """how many were answered meanwhile"""


def interval(name: str, values: list[float]) -> dict[str, float]:
    """Median and its 95 % interval, by 10,000 resamples."""
    resampled = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    found = {"median": statistics.median(values), "low": low, "high": high}
    return {f"{name}_{end}": round(float(value), 4) for end, value in found.items()}


def training(rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of the second setting."""
    import torch
    from overhead import PER_STEP, Loop

    from lm_telemetry import observe

    torch.set_num_threads(1)
    loop = Loop()
    with (
        tempfile.TemporaryDirectory() as store,
        observe(
            loop.model,
            optimizer=loop.optimizer,
            store=store,
            prometheus_port=0,
            flush_seconds=1e6,
            instruments={name: {"every": 1} for name in PER_STEP},
            strict=True,
        ) as session,
    ):
        port = int(session.address.rpartition(":")[2].partition("/")[0])
        (server,) = (t for t in threading.enumerate() if t.name == "lm-telemetry-metrics")
        clock = time.pthread_getcpuclockid(server.ident)
        with visit(port, 1.0) as once, visit(port, 1.0 / MANY) as often:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[:1])
            for visiting in (once, often):
                os.sched_setaffinity(visiting.pid, cores[1:] or cores)

            def block(steps: int, scraping: subprocess.Popen[bytes] | None) -> Block:
                session.flush()
                for visiting in (once, often):
                    visiting.send_signal(signal.SIGCONT if visiting is scraping else signal.SIGSTOP)
                session.step(loss=loop.step())
                scrapes_of(once), scrapes_of(often)
                began = time.perf_counter(), time.process_time(), time.clock_gettime(clock)
                for _ in range(steps):
                    session.step(loss=loop.step())
                ended = time.perf_counter(), time.process_time(), time.clock_gettime(clock)
                scrapes = scrapes_of(once) + scrapes_of(often)
                return Block(*(after - before for before, after in zip(began, ended, strict=True)), scrapes)

            block(3, None)
            steps = max(1, round(seconds / (block(5, None).wall / 5)))
            who = {"plain": None, "again": None, "once": once, "often": often}
            found: dict[str, list[Block]] = {name: [] for name in who}
            for turn in range(rounds):
                order = list(who)
                for name in order[turn % 4 :] + order[: turn % 4]:
                    found[name].append(block(steps, who[name]))
            for name, of, is_each in (
                ("none against none", "again", False),
                ("a scrape each second against none", "once", False),
                (f"{MANY} scrapes each second against none", "often", False),
                (f"a scrape each second, from {MANY}", "often", True),
            ):
                pairs = list(zip(found[of], found["plain"], strict=True))
                rate = [ours.scrapes / ours.wall if is_each else 1.0 for ours, _ in pairs]
                wall = [1 + (ours.wall / plain.wall - 1) / n for (ours, plain), n in zip(pairs, rate, strict=True)]
                cpu = [1 + (o.processor / p.processor - 1) / n for (o, p), n in zip(pairs, rate, strict=True)]
                yield {
                    "setting": "training",
                    "variant": name,
                    "samples": sum(ours.scrapes for ours, _ in pairs),
                    **interval("wall_ratio", wall),
                    **interval("cpu_ratio", cpu),
                    "server_share": round(
                        statistics.median(o.server / o.wall / n for (o, _), n in zip(pairs, rate, strict=True)), 6
                    ),
                    "pairs": rounds,
                    "steps_a_block": steps,
                }
            for visiting in (once, often):
                assert visiting.poll() is None, "a visitor has ended, so that nothing was scraped"
                visiting.kill()


@contextlib.contextmanager
def visit(port: int, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that scrapes every so many seconds, from when it has scraped once."""
    command = [sys.executable, __file__, "--visitor", str(port), "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as visiting:
        assert visiting.stdout is not None
        visiting.stdout.read(1)
        os.set_blocking(visiting.stdout.fileno(), False)
        yield visiting


def scrapes_of(visiting: subprocess.Popen[bytes]) -> int:
    """How many scrapes a visitor has made since this was asked last."""
    assert visiting.stdout is not None
    return len(visiting.stdout.read() or b"")


COLUMNS = (
    "setting", "main_thread", "variant", "milliseconds_median", "milliseconds_p20", "milliseconds_p80", "ratio_to_peer",
    "series", "samples", "wall_ratio_median", "wall_ratio_low", "wall_ratio_high", "cpu_ratio_median", "cpu_ratio_low",
    "cpu_ratio_high", "server_share", "pairs", "steps_a_block",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions; writes no rows")
    parser.add_argument("--only", choices=["scrape", "training"], help="one of the settings")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--visitor", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scrapes", type=int, default=100, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        client(json.loads(arguments.client), arguments.scrapes)
    elif arguments.visitor:
        visitor(arguments.visitor, arguments.seconds)
    else:
        settings = {
            "scrape": lambda: scrapes(22 if arguments.quick else 102),
            "training": lambda: training(4 if arguments.quick else 60, 2.0),
        }
        for name, rows in settings.items():
            if arguments.only in {None, name}:
                for row in rows():
                    print(row, flush=True)
                    if not arguments.quick:
                        append("exporter", {column: row.get(column, "") for column in COLUMNS})


if __name__ == "__main__":
    main()
