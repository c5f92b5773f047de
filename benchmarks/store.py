"""What the store costs to write, to keep and to ask, beside the ways others keep the same values.

2,000 steps x 50 layers x 20 metrics, two million float32 (`store_peers`), and a store of a thousand million beside one
of ten million (`store_scale`). Whatever is compared takes turns; a row gives the median over pairs of the ratio
ours / theirs (of a rate: ours / theirs, too), with its 20th and 80th percentile, and the bound it is held to.

    python benchmarks/store.py          # appends rows to benchmarks/results/store.csv; about ten minutes, 4 GB of disk
    python benchmarks/store.py --quick  # smaller and fewer; writes nothing

There are two ways to write, and two kinds of row. `layout`: columns are in memory as Arrow tables, and become one file
(ours is fsynced, pyarrow's is not). `path`: a step's values are handed over as they are captured, and a part is written
every 50 steps. What a capture costs in Python (checks, thirty Arrow columns of 50 rows) is in the second alone, and is
far more than the file. TensorBoard is given the first steps of the run only, and compared by values a second.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import store_peers as peers
import store_scale
from rows import append

from lm_telemetry.columns import Captured, to_rows
from lm_telemetry.compaction import GROUP_ROWS, compact
from lm_telemetry.queries import connect
from lm_telemetry.store import Manifest, Store, put_rows

if TYPE_CHECKING:
    from collections.abc import Callable

RUN: dict[str, Any] = {"run_id": "run", "rank": 0, "attempt": 0}
STEPS_A_PART = 50
"""Steps of a flush: 5 s at a tenth of a second a step."""
TABLES = {"layers": peers.LAYERS_METRICS, "heads": peers.HEADS_METRICS}


class Rows:
    """Rows as they come: printed, and kept for the file."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def ratio(self, what: str, base: str, pairs: list[tuple[float, float]], bound: str = "", **more: Any) -> None:
        """A row of the ratios of pairs (ours, theirs)."""
        ratios = [ours / theirs for ours, theirs in pairs]
        low, high = np.quantile(ratios, [0.2, 0.8])
        self.add(
            what,
            base,
            statistics.median(ratios),
            bound,
            p20=float(f"{low:.4g}"),
            p80=float(f"{high:.4g}"),
            pairs=len(pairs),
            ours=float(f"{statistics.median(a for a, _ in pairs):.4g}"),
            theirs=float(f"{statistics.median(b for _, b in pairs):.4g}"),
            **more,
        )

    def add(self, what: str, base: str, value: float, bound: str = "", **more: Any) -> None:
        """A row; `bound` is as `<= 3.1`."""
        met = ""
        if bound:
            sign, limit = bound.split()
            met = "yes" if (value <= float(limit) if sign == "<=" else value >= float(limit)) else "no"
        names = ("p20", "p80", "pairs", "ours", "theirs", "unit", "note")
        row = {"what": what, "base": base, "value": float(f"{value:.4g}"), **{n: more.get(n, "") for n in names}}
        row |= {"bound": bound, "met": met}
        self._rows.append(row)
        print(*(f"{name}={cell}" for name, cell in row.items() if cell != ""), flush=True)

    def keep(self) -> None:
        for row in self._rows:
            append("store", row)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pairs(
    ours: Callable[[], Any], theirs: Callable[[], Any], times: int, *, warm: bool = True
) -> list[tuple[float, float]]:
    """Seconds of both, in turns, each going first every other time; `warm` has a first round that is not counted."""
    if warm:
        ours()
        theirs()
    found = []
    for i in range(times):
        first = seconds(ours if i % 2 else theirs)
        second = seconds(theirs if i % 2 else ours)
        found.append((first, second) if i % 2 else (second, first))
    return found


def capture(values: np.ndarray, table: str) -> dict[str, Any]:
    """A step's columns of a table, as an instrument gives them; `values` are (layers, metrics)."""
    layers = len(values)
    keys: dict[str, Any] = {"stack": ["decoder"] * layers, "layer": list(range(layers))}
    keys |= {"site": ["resid"] * layers} if table == "layers" else {"kind": ["self"] * layers, "head": [0] * layers}
    first = 0 if table == "layers" else len(peers.LAYERS_METRICS)
    return keys | {name: values[:, first + i] for i, name in enumerate(TABLES[table])}


def write_ours(path: Path, values: np.ndarray, steps_a_part: int = STEPS_A_PART) -> Store:
    """The writer's path without its thread: checks a capture, rows, parts and the manifest a flush."""
    store = Store.open_for_writing(path)
    (store.manifests("run") / "attempt=0").mkdir(parents=True)
    manifest = Manifest(**RUN)
    waiting: dict[str, list[Captured]] = {table: [] for table in TABLES}
    seq = 0
    for step, captured in enumerate(values, 1):
        for table, captures in waiting.items():
            stamps = {"step": step, "time_us": 1_700_000_000_000_000 + step * 100_137}
            captures.append(Captured.check(table, capture(captured, table), **stamps))
        if step % steps_a_part == 0 or step == len(values):
            for table, captures in waiting.items():
                rows = to_rows(table, captures, attempt=0)
                manifest.parts.append(store.write_part(rows, table=table, seq=seq, **RUN))
                captures.clear()
            store.write_manifest(manifest)
            seq += 1
    return store


def size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def writing(rows: Rows, work: Path, values: np.ndarray, quick: bool) -> tuple[Store, Path]:
    """Bytes and rates; the compacted store, and SQLite's file."""
    times = 1 if quick else 3
    long, wide = peers.long_table(values), peers.wide_table(values)
    fewer = values[: len(values) // 40]
    ways: dict[str, tuple[np.ndarray, Callable[[Path, np.ndarray], Any]]] = {
        "ours": (values, write_ours),
        "pyarrow long": (values, lambda path, v: peers.write_long_parts(path, v, STEPS_A_PART)),
        "SQLite, a row a value, indexed": (values, peers.write_sqlite),
        "JSON a step in SQLite (trackio)": (values, peers.write_json),
        "CSV": (values, peers.write_csv),
        "TensorBoard": (fewer, peers.write_tensorboard),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, float] = {}
    peers.write_tensorboard(work / "import", values[:1])
    for i in range(times):
        for j, (name, (given, write)) in enumerate(ways.items()):
            path = work / f"{i}-{j}"
            rates[name].append(given.size / seconds(lambda w=write, p=path, g=given: w(p, g)) / 1e6)
            sizes[name] = size(path) / given.size
    sqlite = work / f"{times - 1}-2"
    store = Store.open_for_writing(work / f"{times - 1}-0")

    compacting = seconds(lambda: compact(store, "run", 0, grace_seconds=0))
    compact(store, "run", 0, grace_seconds=0)
    tables = {table: pq.read_table(next(store.partition(table, "run", 0).glob("compact-*"))) for table in TABLES}
    kept = sum(size(store.partition(table, "run", 0)) for table in TABLES)
    rows.add("bytes a value, compacted", "", kept / values.size, "<= 3.1", unit="bytes")
    rows.add("bytes a value, parts", "", sizes.pop("ours"), unit="bytes", note=f"{STEPS_A_PART} steps a part")
    peers.write_long(work / "long.parquet", long)
    sizes["pyarrow long, one file"] = size(work / "long.parquet") / values.size
    for name, bytes_a_value in sizes.items():
        rows.add("bytes a value, peers", name, bytes_a_value, unit="bytes")
    rows.add("compaction", "", values.size / compacting / 1e6, unit="M values/s")

    target = work / "layout.parquet"

    def layout() -> None:
        for table, found in tables.items():
            put_rows(work, target, found, table=table, row_group_size=GROUP_ROWS)

    found = pairs(layout, lambda: peers.write_long(work / "long.parquet", long), 3 if quick else 15)
    per_second = [(values.size / a / 1e6, values.size / b / 1e6) for a, b in found]
    rows.ratio("writing, layout", "pyarrow long", per_second, ">= 6", unit="M values/s")
    found = pairs(
        lambda: peers.write_wide(work / "wide.parquet", wide),
        lambda: peers.write_long(work / "long.parquet", long),
        3 if quick else 15,
    )
    per_second_alone = [(values.size / a / 1e6, values.size / b / 1e6) for a, b in found]
    rows.ratio("writing, layout without our keys", "pyarrow long", per_second_alone, unit="M values/s")
    sqlite_rates = rates["SQLite, a row a value, indexed"]
    mixed = [(per_second[i][0], rate) for i, rate in enumerate(sqlite_rates)]
    note = "ours from Arrow tables, SQLite from captures"
    rows.ratio("writing, layout", "SQLite, a row a value, indexed", mixed, ">= 100", unit="M values/s", note=note)
    for name in ways.keys() - {"ours"}:
        bound = {"pyarrow long": ">= 6", "SQLite, a row a value, indexed": ">= 100"}.get(name, "")
        taken = list(zip(rates["ours"], rates[name], strict=True))
        rows.ratio("writing, path", name, taken, bound, unit="M values/s")
    return store, sqlite


def asking(rows: Rows, store: Store, sqlite: Path, quick: bool) -> None:
    """One series, and the 99th percentile of each."""
    aggregates = {
        table: f"SELECT layer, {', '.join(f'quantile_disc({m}, 0.99) AS {m}' for m in metrics)}"
        f" FROM {table} WHERE run_id = 'run' GROUP BY layer ORDER BY layer"
        for table, metrics in TABLES.items()
    }
    series = "SELECT step, rms FROM layers WHERE run_id = 'run' AND layer = 25 AND site = 'resid' ORDER BY step"
    with connect(store.path) as ours, closing(sqlite3.connect(sqlite)) as theirs:

        def p99() -> dict[tuple[int, str], float]:
            found = {}
            for table, metrics in TABLES.items():
                for layer, *values in ours.execute(aggregates[table]).fetchall():
                    found.update({(layer, m): v for m, v in zip(metrics, values, strict=True)})
            return found

        def p99_theirs() -> dict[tuple[int, str], float]:
            return {(layer, metric): value for layer, metric, value in theirs.execute(peers.P99).fetchall()}

        one = lambda: ours.execute(series).fetchall()
        one_theirs = lambda: theirs.execute(peers.SERIES, ("rms", 25)).fetchall()
        assert one() == one_theirs()
        assert p99() == p99_theirs()
        indexed = "SQLite, a row a value, indexed"
        rows.ratio("query: one series", indexed, pairs(one, one_theirs, 5 if quick else 25), "<= 0.3", unit="s")
        file = next(store.partition("layers", "run", 0).glob("*.parquet"))
        plain = f"SELECT step, rms FROM '{file}' WHERE layer = 25 AND site = 'resid' ORDER BY step"
        with duckdb.connect() as bare:
            bare_one = lambda: bare.execute(plain).fetchall()
            found = pairs(bare_one, one_theirs, 5 if quick else 25)
            rows.ratio("query: one series, DuckDB and the file alone", indexed, found, unit="s")
        rows.ratio(
            "query: p99 of each series",
            indexed,
            pairs(p99, p99_theirs, 1 if quick else 3, warm=False),
            "<= 0.03",
            unit="s",
        )


def live(rows: Rows, work: Path, values: np.ndarray, quick: bool) -> None:
    """Many parts, not compacted, beside DuckDB's own glob over them."""
    parts = 100 if quick else 1000
    steps_a_part = len(values) // parts
    store = write_ours(work / "live", values[: parts * steps_a_part], steps_a_part)
    options = "hive_partitioning = true, hive_types = {run_id: VARCHAR, rank: INTEGER}"
    glob = f"read_parquet('{store.path}/layers/*/*/*.parquet', {options})"
    ask = "SELECT layer, avg(rms), max(absmax) FROM {} WHERE run_id = 'run' GROUP BY layer ORDER BY layer"
    with connect(store.path) as ours, duckdb.connect() as theirs:
        one = lambda: ours.execute(ask.format("layers")).fetchall()
        other = lambda: theirs.execute(ask.format(glob)).fetchall()
        assert np.allclose(one(), other())
        rows.ratio(
            f"query: {parts} live parts", "DuckDB's glob", pairs(one, other, 3 if quick else 15), "<= 1", unit="s"
        )


def cold(rows: Rows, store: Store, quick: bool) -> None:
    """A command line from its start to its answer."""
    python = sys.executable
    lmt = [str(Path(python).with_name("lmt")), "sql", "select 1", "--store", str(store.path)]
    plain = [python, "-c", "import duckdb; duckdb.sql('select 1').show()"]
    call = lambda command: lambda: subprocess.run(command, check=True, capture_output=True)
    found = pairs(call(lmt), call(plain), 3 if quick else 15)
    rows.ratio('`lmt sql "select 1"`, cold', "python and duckdb alone", found, "<= 1.5", unit="s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller and fewer; write no rows")
    parser.add_argument("--directory", help="where the files go for the time being")
    arguments = parser.parse_args()
    quick = arguments.quick
    values = peers.walks(peers.Setting(steps=400 if quick else 2000))
    rows = Rows()
    if arguments.directory is not None:
        Path(arguments.directory).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        store, sqlite = writing(rows, work, values, quick)
        asking(rows, store, sqlite, quick)
        live(rows, work, values, quick)
        cold(rows, store, quick)
        store_scale.measure(rows, work, pairs, quick)
    finally:
        shutil.rmtree(work)
    if not quick:
        rows.keep()


if __name__ == "__main__":
    main()
