"""Runs planted in a store whose report is known: healthy ones, and such that go wrong in one way at a known step."""

from __future__ import annotations

import numpy as np
from planted import plant

LAYERS, HEADS = 3, 4


def losses(n, *, seed=0, sd=0.02):
    """A loss that falls from 6 to 2 nats, with noise."""
    return 2 + 4 * np.exp(-np.arange(n) / (n / 5)) + np.random.default_rng(seed).normal(0, sd, n)


def steps(store, values, *, attempt=0, first=1, run_id="r", rank=0, **columns):
    """Rows of `steps` with these losses; other columns are usual ones unless given."""
    usual = {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 512, "seconds": 1.0, "telemetry_seconds": 0.004}
    rows = [{"step": step, "loss": float(loss)} | usual | columns for step, loss in enumerate(values, start=first)]
    plant(store, "steps", rows, run_id=run_id, rank=rank, attempt=attempt)


def launch(store, **columns):
    """A row of `runs`."""
    run_id = columns.pop("run_id", "r")
    usual = {"model_class": "LlamaForCausalLM", "n_parameters": 6_738_415_616, "n_layers": LAYERS, "n_heads": HEADS}
    plant(store, "runs", [{"step": 0, "max_overhead": 0.01} | usual | columns], run_id=run_id)


def heads(store, captures, *, run_id="r", rank=0, **columns):
    """Rows of `heads`; a column is a value, or a function of (step, layer, head)."""
    usual = {"entropy": 2.0, "normalized_entropy": 0.5, "max_logit": 8.0, "sink_mass": 0.1, "induction_score": 0.05}
    usual |= {"prev_token_mass": 0.1, "output_norm": 1.0, "nonfinite": 0, "n_induction": 9}
    rows = [
        {"step": step, "stack": "decoder", "layer": layer, "kind": "self", "head": head}
        | {k: v(step, layer, head) if callable(v) else v for k, v in (usual | columns).items()}
        for step in captures
        for layer in range(LAYERS)
        for head in range(HEADS)
    ]
    plant(store, "heads", rows, run_id=run_id, rank=rank)


def layers(store, captures, *, run_id="r", rank=0, site="resid", **columns):
    """Rows of `layers`; a column is a value, or a function of (step, layer)."""
    usual = {"rms": 1.0, "absmax": 9.0, "kurtosis": 3.0, "zero_fraction": 0.0, "nonfinite": 0}
    rows = [
        {"step": step, "stack": "decoder", "layer": layer, "site": site}
        | {k: v(step, layer) if callable(v) else v for k, v in (usual | columns).items()}
        for step in captures
        for layer in range(LAYERS)
    ]
    plant(store, "layers", rows, run_id=run_id, rank=rank)


def curvature(store, captures, ratio, *, run_id="r", attempt=0, threshold=2000.0, **columns):
    """Rows of `curvature`; `ratio` is a function of the step."""
    usual = {"operator": "hessian", "scope": "all", "estimator": "lanczos", "index": 0, "threshold": threshold}
    rows = [
        {"step": step, "value": threshold * ratio(step), "residual": 5.0, "converged": True} | usual | columns
        for step in captures
    ]
    plant(store, "curvature", rows, run_id=run_id, attempt=attempt)


def healthy(store, *, run_id="r", n=1000, seed=0):
    """A run with nothing wrong, of which losses, heads, layers and curvature were captured."""
    launch(store, run_id=run_id)
    steps(store, losses(n, seed=seed), run_id=run_id)
    captures = range(10, n + 1, 10)
    heads(store, captures, run_id=run_id)
    layers(store, captures, run_id=run_id)
    curvature(store, range(50, n + 1, 50), lambda step: 0.3, run_id=run_id)
