"""A small store that has seen everything: all tables, NULL and NaN in every measured column, runs, ranks, resumes.

Values are drawn from a seeded generator around courses of the kind that views look for (a loss that falls and spikes,
curvature that rises to its threshold, heads that collapse), so that every view has something to say.
"""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
from planted import plant

from lm_telemetry.catalogue import TABLES, columns
from lm_telemetry.schema import schema
from lm_telemetry.store import Store

STEPS = 150
LAUNCHES = (
    # run, rank, attempt, first and last step: rank 0 of `a` is resumed at 81, rank 1 at 61; one is named like a number
    ("a", 0, 0, 1, 100),
    ("a", 0, 1, 81, STEPS),
    ("a", 1, 0, 1, 100),
    ("a", 1, 1, 61, STEPS),
    ("2024", 0, 0, 1, STEPS),
)
_BEGAN = datetime(2026, 3, 8, 6, 30, tzinfo=UTC)
"""New York's clocks go forward half an hour later."""

_SITES = [("embed", -1), *product(("resid", "attn_out", "mlp_out"), (0, 1)), ("final", 2)]
_LAYERS = [{"stack": "decoder", "layer": layer, "site": site} for site, layer in _SITES]
_HEADS = [{"stack": "decoder", "layer": i, "kind": "self", "head": h} for i, h in product((0, 1), (0, 1, 2))]
_EDGES = [
    {"stack": "decoder", "layer": i, "head": h, "sequence": 0, "query_position": q, "key_position": k}
    for i, h, q, k in product((0, 1), (-1, 0, 1), range(4), range(4))
    if k <= q and (h >= 0 or k == q)
]
_TENSORS = [{"name": "embed.weight", "stack": None, "layer": None}]
_TENSORS += [{"name": f"h.{i}.{n}", "stack": "decoder", "layer": i} for i, n in product((0, 1), ("q", "up"))]
_CURVATURE = [
    {"operator": o, "scope": s, "estimator": e, "index": i}
    for o, s, e, i in [
        ("hessian", "all", "lanczos", 0),
        ("hessian", "all", "lanczos", 1),
        ("hessian", "all", "hutchinson", None),
        ("hessian", "decoder.0", "block_lanczos", 0),
        ("preconditioned", "all", "lanczos", 0),
    ]
]
_ANSWERS = [{"attempt_id": f"answer {i}", "prompt_hash": f"prompt {i % 2}"} for i in range(6)]

SUBJECTS = {
    "overhead": (10, [{"instrument": name} for name in ("activations", "sharpness", "agent")]),
    "layers": (5, _LAYERS),
    "representations": (10, _LAYERS),
    "sketches": (25, _LAYERS),
    "heads": (5, _HEADS),
    "key_mass": (10, _HEADS),
    "head_effects": (50, [h | {"ablation": a} for h, a in product(_HEADS, ("zero", "mean"))]),
    "edges": (50, _EDGES),
    "probe": (50, [{"stack": "decoder", "sequence": 0, "position": p} for p in range(4)]),
    "params": (10, _TENSORS),
    "curvature": (2, _CURVATURE),
    "spectra": (50, [{"operator": "hessian", "scope": "all", "estimator": "slq"}]),
    "attempts": (50, _ANSWERS),
    "tokens": (50, [a | {"position": p} for a, p in product(_ANSWERS, range(5))]),
    "reasoning_steps": (50, [a | {"index": i} for a, i in product(_ANSWERS, range(3))]),
    "events": (10, [{"severity": s, "kind": k} for s, k in [("info", "started"), ("warning", "slow")]]),
}
"""How often a table is captured, in steps, and of what."""

_SHARES = {
    "normalized_entropy",
    "sink_mass",
    "prev_token_mass",
    "local_mass",
    "induction_score",
    "top1_mass",
    "share",
    "mass",
    "zero_fraction",
    "outlier_fraction",
    "gini",
    "heavy_share",
    "anisotropy",
    "cka_previous",
    "cka_first",
    "knn_previous",
    "knn_first",
}
_COUNTS = {
    "nonfinite": lambda draw, _: draw.choice((0, 0, 0, 0, 2)),
    "n_induction": lambda *_: 64,
    "n_tokens": lambda *_: 6,
    "n_queries": lambda *_: 64,
    "width": lambda *_: 8,
    "neighbours": lambda *_: 3,
    "massive_channel": lambda draw, _: draw.choice((3, 3, 3, 5)),
    "massive_position": lambda *_: 0,
    "massive_sequence": lambda *_: 0,
    "previous_step": lambda _, step: step - 10 if step > 10 else None,
    "first_step": lambda *_: 10,
    "n_continuations": lambda draw, _: draw.randrange(4, 9),
}


def busy_store(path):
    """Fill the directory `path`; the store."""
    store = Store.open_for_writing(path)
    for run_id, rank, attempt, first, last in LAUNCHES:
        steps = range(first, last + 1)
        where = {"run_id": run_id, "rank": rank, "attempt": attempt}
        for table in TABLES:
            draw = random.Random(f"{table} {run_id} {rank}")
            if table == "overhead" and attempt == 0:
                rows = []  # of a version that had no such table: an upgrade, and a resume
            elif table == "runs":
                rows = [_described(run_id, first)]
            elif table == "steps":
                rows = [_stepped(step, random.Random(f"{run_id} {rank} {attempt} {step}")) for step in steps]
            else:
                every, subjects = SUBJECTS[table]
                courses = [_Course(table, subject, draw) for subject in subjects]
                rows = [c.at(step) for step in steps if step % every == 0 for c in courses]
            for row in rows:
                row["time"] = _BEGAN + timedelta(seconds=20 * row["step"] + 1000 * attempt, microseconds=row["step"])
            half = len(rows) // 2
            for part in filter(None, (rows[:half], rows[half:])):
                plant(store, table, part, **where)
    _older_run(store)
    return store


def _older_run(store):
    """A run that was copied by hand, of a version with fewer columns, and one more."""
    rows = pa.Table.from_pylist(
        [
            {"attempt": 0, "step": step, "time": _BEGAN + timedelta(seconds=step), "loss": 3.0 - step / 50}
            for step in range(1, 50)
        ],
        schema=pa.schema([schema("steps").field(name) for name in ("attempt", "step", "time", "loss")]),
    ).append_column("forgotten", pa.array([1] * 49))
    directory = store.partition("steps", "older", 0)
    directory.mkdir(parents=True)
    pq.write_table(rows, directory / "part-0-0.parquet")


def _described(run_id, first):
    facts = {m.name: None for m in columns("runs") if not m.key}
    facts |= {"model_class": "Llama", "n_parameters": 1000, "optimizer": "SGD", "max_overhead": 0.01}
    return facts | {"step": first - 1, "probe_sha256": "probe", "settings": "{}", "config_sha256": run_id}


def _stepped(step, draw):
    loss = 4 * math.exp(-step / 40) + 1 + draw.gauss(0, 0.02)
    loss = {12: 9.0, 70: 7.0, 71: 6.5, 90: math.nan, 110: math.inf}.get(step, loss)
    sampled = step % 10 == 0
    square, variance = 0.5 + draw.gauss(0, 0.05), 8 + draw.gauss(0, 0.5)
    return {
        "step": step,
        "loss": None if step == 33 else loss,
        "learning_rate": None if step == 34 else 0.1 * min(step / 5, 1),
        "grad_norm": None if step == 35 else math.nan if step == 90 else math.sqrt(square + variance / 8),
        "update_norm": draw.random() if sampled else None,
        "param_norm": 10 + draw.random() if sampled else None,
        "tokens": None if step == 36 else draw.randrange(100, 200),
        "seconds": None if step == 37 else 0.0 if step == 38 else draw.uniform(0.1, 0.2),
        "telemetry_seconds": None if step == 39 else draw.uniform(0.001, 0.003),
        "gradient_square": square if step % 2 == 0 else None,
        "gradient_variance": math.nan if step == 60 else variance if step % 2 == 0 else None,
        "gradient_noise_scale": variance / square if step % 2 == 0 else None,
    }


class _Course:
    """What one subject does over the steps, column by column."""

    def __init__(self, table, subject, draw):
        self.table = table
        self.draw = draw
        own = {m.name: m.type for m in columns(table) if m.name not in {"attempt", "step", "time"}}
        self.subject = {name: value for name, value in subject.items() if name in own}
        self.measured = {name: type_ for name, type_ in own.items() if name not in subject}
        self.lines = {name: (draw.uniform(-3, 3), draw.choice((-8, 0, 8))) for name in self.measured}
        self.gram = [draw.gauss(0, 1) for _ in range(15)]

    def at(self, step):
        return self.subject | {"step": step} | {name: self._value(name, step) for name in self.measured}

    def _value(self, name, step):
        kind, draw = self.measured[name], self.draw
        at, slope = self.lines[name]
        line = at + slope * step / STEPS + draw.gauss(0, 0.05)
        if name in _COUNTS:
            return _COUNTS[name](draw, step)
        if name == "gram":
            return [g + draw.gauss(0, 0.3) for g in self.gram]
        if name == "threshold":
            return 20.0
        missing = draw.random()
        if missing < 0.04:
            return None
        if kind.startswith("float"):
            if missing < 0.06:
                return math.nan
            if missing < 0.065:
                return math.inf
            if name in _SHARES:
                return 1 / (1 + math.exp(-line))
            if self.table == "curvature" and name == "value":
                return 20 * min(1.0, 0.2 + step / 80) + draw.gauss(0, 0.5)
            return math.exp(line)
        if kind.startswith("list"):
            return [draw.randrange(8) if "int" in kind else draw.random() for _ in range(4)]
        if kind.startswith("int"):
            return draw.randrange(1, 100)
        return {"bool": draw.random() < 0.5, "string": draw.choice(("x", "y", ""))}[kind]
