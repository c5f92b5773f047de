"""The values of `store.py`, and the ways others keep them: each takes the values of a run, and is asked the same.

Values are random walks in float32, (steps, layers, metrics): a constant or a rounded value would compress to nothing,
and telemetry is neither. Peers are set up as they come, with two favours: their rows have no time, and SQLite syncs at
checkpoints only (a power cut may cost it the last steps; ours loses none that was flushed).

Left out: wandb, MLflow and Aim, which need a server or a package this project does not install.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from pathlib import Path

LAYERS_METRICS = ["mean", "std", "rms", "absmax", "kurtosis", "zero_fraction", "outlier_fraction", "residual_ratio"]
HEADS_METRICS = [
    "entropy",
    "normalized_entropy",
    "lse",
    "max_logit",
    "top1_mass",
    "effective_keys",
    "sink_mass",
    "prev_token_mass",
    "local_mass",
    "mean_distance",
    "induction_score",
    "output_norm",
]
METRICS = (*LAYERS_METRICS, *HEADS_METRICS)
"""Twenty columns of two tables of the catalogue: 8 of `layers`, 12 of `heads` (one head a layer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Sizes of the run."""

    steps: int = 2000
    layers: int = 50

    @property
    def values(self) -> int:
        """How many there are in all."""
        return self.steps * self.layers * len(METRICS)

    def __str__(self) -> str:
        return f"{self.steps} steps x {self.layers} layers x {len(METRICS)} metrics"


def walks(setting: Setting) -> np.ndarray:
    """Random walks of unit offset and hundredth steps, (steps, layers, metrics), float32."""
    rng = np.random.default_rng(0)
    shape = (setting.steps, setting.layers, len(METRICS))
    return (rng.standard_normal(shape) * 0.01).cumsum(0, dtype=np.float64).astype(np.float32) + np.float32(1)


def long_table(values: np.ndarray) -> pa.Table:
    """One row a value: step, layer, metric, value."""
    steps, layers, metrics = values.shape
    step, layer, metric = (index.ravel() for index in np.indices(values.shape, dtype=np.int32))
    names = pa.DictionaryArray.from_arrays(pa.array(metric), pa.array(METRICS)).cast(pa.string())
    assert len(metric) == steps * layers * metrics
    return pa.table({"step": step.astype(np.int64) + 1, "layer": layer, "metric": names, "value": values.ravel()})


def write_long(path: Path, table: pa.Table) -> None:
    """As pyarrow does it when nothing is said: snappy, dictionaries for all columns."""
    pq.write_table(table, path)


def wide_table(values: np.ndarray) -> pa.Table:
    """One row a layer: step, layer, and a column a metric."""
    steps, layers, metrics = values.shape
    keys = {
        "step": np.repeat(np.arange(1, steps + 1), layers),
        "layer": np.tile(np.arange(layers, dtype=np.int32), steps),
    }
    columns = np.ascontiguousarray(values.reshape(-1, metrics).T)
    return pa.table(keys | dict(zip(METRICS, columns, strict=True)))


def write_wide(path: Path, table: pa.Table) -> None:
    """The bare layout of ours: split floats under zstd, no other keys than `long_table` has, not synced."""
    encoding = dict.fromkeys(METRICS, "BYTE_STREAM_SPLIT") | dict.fromkeys(("step", "layer"), "DELTA_BINARY_PACKED")
    pq.write_table(table, path, compression="zstd", use_dictionary=False, column_encoding=encoding)


def write_long_parts(path: Path, values: np.ndarray, steps_a_part: int) -> None:
    """A table a step from its arrays, a file of pyarrow's defaults a flush; not synced."""
    path.mkdir()
    layers, metrics = values.shape[1:]
    layer = np.repeat(np.arange(layers, dtype=np.int32), metrics)
    names = np.tile(np.array(METRICS, dtype=object), layers)
    waiting = []
    for step, captured in enumerate(values, 1):
        row = {"step": np.full(layers * metrics, step), "layer": layer, "metric": names, "value": captured.ravel()}
        waiting.append(pa.table(row))
        if step % steps_a_part == 0 or step == len(values):
            pq.write_table(pa.concat_tables(waiting), path / f"{step}.parquet")
            waiting.clear()


def write_sqlite(path: Path, values: np.ndarray) -> None:
    """A row a value, indexed by (metric, layer, step), a transaction a step, write-ahead log."""
    keys = [(layer, metric) for layer in range(values.shape[1]) for metric in METRICS]
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("CREATE TABLE points (step INTEGER, layer INTEGER, metric TEXT, value REAL)")
        database.execute("CREATE INDEX series ON points (metric, layer, step)")
        for step, captured in enumerate(values, 1):
            flat = captured.ravel().tolist()
            rows = ((s, layer, metric, value) for s, (layer, metric), value in zip(repeat(step), keys, flat))
            with database:
                database.executemany("INSERT INTO points VALUES (?, ?, ?, ?)", rows)
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def write_json(path: Path, values: np.ndarray) -> None:
    """As trackio does: a JSON object a step in SQLite, a transaction each."""
    names = [f"layer{layer}/{metric}" for layer in range(values.shape[1]) for metric in METRICS]
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)")
        for step, captured in enumerate(values, 1):
            text = json.dumps(dict(zip(names, captured.ravel().tolist(), strict=True)))
            with database:
                database.execute("INSERT INTO metrics (run_name, step, metrics) VALUES ('run', ?, ?)", (step, text))
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def write_csv(path: Path, values: np.ndarray) -> None:
    """A line a value."""
    keys = [(layer, metric) for layer in range(values.shape[1]) for metric in METRICS]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        for step, captured in enumerate(values, 1):
            writer.writerows((step, *key, value) for key, value in zip(keys, captured.ravel().tolist(), strict=True))


def write_tensorboard(path: Path, values: np.ndarray) -> None:
    """A scalar a value in an event file."""
    from torch.utils.tensorboard import SummaryWriter

    names = [f"layer{layer}/{metric}" for layer in range(values.shape[1]) for metric in METRICS]
    with SummaryWriter(str(path)) as writer:
        for step, captured in enumerate(values, 1):
            for name, value in zip(names, captured.ravel().tolist(), strict=True):
                writer.add_scalar(name, value, step)


SERIES = "SELECT step, value FROM points WHERE metric = ? AND layer = ? ORDER BY step"
P99 = """
    WITH ranked AS (
        SELECT metric, layer, value, row_number() OVER series AS place, count(*) OVER (PARTITION BY metric, layer) AS n
        FROM points WINDOW series AS (PARTITION BY metric, layer ORDER BY value)
    )
    SELECT layer, metric, value FROM ranked WHERE place = (99 * n + 99) / 100 ORDER BY layer, metric
"""
"""The 99th percentile (the smallest value that 99 % do not exceed) of each series; SQLite has no function for it."""
