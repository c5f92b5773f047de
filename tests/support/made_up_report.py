"""Reports of runs that never were, in the sizes of real ones: what the page is drawn from in tests."""

from __future__ import annotations

from itertools import starmap

import numpy as np

from lm_telemetry.exporters.report.model import (
    Axis,
    Band,
    Bars,
    Edge,
    Figure,
    Finding,
    HeadMap,
    Heatmap,
    Line,
    Lines,
    Mark,
    Pathways,
    Report,
    RunFacts,
    Statistic,
)

STEP = Axis(label="step")
SENTENCE = ("<s>", "The", " cat", " sat", " on", " the", " mat", ",", " and", " the", " cat", " slept", ".", "\n")


def made_up(*, runs=("smollm-135m-lr3e-3",), steps=10_000, layers=32, heads=32, points=1_200, columns=200):
    """A report of `runs` that each went over `steps`."""
    rng = np.random.default_rng(0)
    x = np.unique(np.linspace(1, steps, points).astype(int)).astype(float)
    names = tuple(runs)
    figures = [_loss(rng, x, names), _rate(x, names), _norms(rng, x, names)]
    figures += [_sharpness(rng, steps, names), _spectra(rng, names)]
    for run in range(len(names)):
        where = f"-{run + 1}" if run else ""
        grid = np.linspace(1, steps, columns).round()
        figures += [_heatmap(rng, kind, grid, layers=layers, run=run, where=where) for kind in _HEATMAPS]
        figures += [
            _heads(rng, layers, heads, run=run, where=where, step=steps),
            _pathways(rng, layers, run, where, steps),
        ]
    figures.append(_cost(rng, names))
    return Report(
        runs=tuple(starmap(_facts, enumerate(names))),
        verdict="Trains well, at the edge of stability since step 3,120: loss fell from 10.8 to 2.94 nats over"
        " 10,000 steps. Attention entropy has collapsed in 3 of 1,024 heads.",
        findings=_findings(names[0]),
        figures=tuple(figures),
        written="2026-11-25T19:00:00Z",
        store="telemetry-store",
        missing=("No knock-outs of heads were captured (instrument `knock_out` was off).",),
    )


def _facts(i, run_id):
    return RunFacts(
        run_id=run_id,
        state="finished",
        facts=(
            ("model", "LlamaForCausalLM"),
            ("parameters", "134.5 M"),
            ("layers x heads", "32 x 32"),
            ("optimizer", "AdamW, betas 0.9 / 0.95"),
            ("learning rate", f"{3e-3 / (i + 1):.4g}, cosine"),
            ("steps", "10,000"),
            ("tokens", "2.62 B"),
            ("duration", "5 h 12 min"),
            ("hardware", "8 x H100"),
            ("versions", "torch 2.13, transformers 5.23"),
        ),
    )


def _findings(run_id):
    def finding(level, title, text, figure=None, since=None):
        sql = f"SELECT step, value FROM made_up WHERE run_id = '{run_id}' ORDER BY step"
        return Finding(level=level, title=title, text=text, run_id=run_id, since=since, figure=figure, sql=sql)

    return (
        finding(
            "critical",
            "Attention entropy has collapsed in 3 heads",
            "Entropy over log(i + 1) is below 0.05 in layer 4 (heads 7, 12) and layer 5 (head 0). Softcapping logits or"
            " a lower learning rate usually helps.",
            "heads",
            6_200,
        ),
        finding(
            "warning",
            "The loss has spiked twice",
            "At steps 2,400 and 7,100 it rose by more than 6 deviations, and came back within 80 steps.",
            "loss",
            2_400,
        ),
        finding("note", "Telemetry took 0.8 % of the time", "The budget is 1 %.", "cost"),
        finding("ok", "Nothing non-finite", "In 1,200 captures of all layers.", "rms"),
        finding("ok", "No layer is dead", "The least update ratio is 2.1e-4, the threshold 1e-6.", "update_ratio"),
        finding("ok", "Ranks are kept", "Effective rank of the last layer is 212 of 576.", "rank"),
    )


def _figure(name, section, title, caption, body):
    sql = f"SELECT step, {name.partition('-')[0]}\nFROM training\nWHERE run_id = 'smollm-135m-lr3e-3'\nORDER BY step"
    return Figure(id=name, section=section, title=title, caption=caption, body=body, sql=sql)


def _loss(rng, x, names):
    lines, bands, marks = [], [], []
    for run in range(len(names)):
        smooth = 2.6 + 0.1 * run + 8 * (x / x[0]) ** -0.38
        raw = smooth + rng.normal(0, 0.09, x.size)
        raw[x.size // 4] += 3
        raw[(7 * x.size) // 10] += 1.6
        raw[x.size // 3 : x.size // 3 + 9] = np.nan
        lines += [
            Line(name="each step", run=run, x=x, y=raw, role="raw"),
            Line(name="smoothed over 50 steps", run=run, x=x, y=smooth),
        ]
        edges = x[-1] * np.array([0, 0.05, 0.31 + 0.03 * run, 1])
        levels = (("warmup", "note"), ("progressive sharpening", "ok"), ("edge of stability", "warning"))
        bands += [
            Band(run=run, start=edges[i], end=edges[i + 1], label=label, level=level)
            for i, (label, level) in enumerate(levels)
        ]
        marks += [
            Mark(run=run, x=x[x.size // 4], label="spike: 6.8 deviations", level="warning"),
            Mark(run=run, x=x[(7 * x.size) // 10], label="spike: 4.1 deviations", level="warning"),
        ]
    body = Lines(x=STEP, y=Axis(label="loss", unit="nats"), lines=tuple(lines), bands=tuple(bands), marks=tuple(marks))
    caption = (
        "Cross-entropy of each training step, faint, and its running mean. Grounds name the regime, triangles spikes."
    )
    return _figure("loss", "Training", "Loss", caption, body)


def _rate(x, names):
    peak = 3e-3 * np.minimum(1, x / (0.05 * x[-1])) * (0.55 + 0.45 * np.cos(np.pi * x / x[-1]))
    lines = tuple(Line(name="learning rate", run=run, x=x, y=peak / (run + 1)) for run in range(len(names)))
    body = Lines(x=STEP, y=Axis(label="learning rate"), lines=lines)
    return _figure("learning_rate", "Training", "Learning rate", "What the scheduler gave to the optimizer.", body)


def _norms(rng, x, names):
    lines = tuple(
        Line(name="gradient norm", run=run, x=x, y=np.exp(rng.normal(-0.4, 0.35, x.size)) * (1 + 300 / x))
        for run in range(len(names))
    )
    body = Lines(x=STEP, y=Axis(label="gradient norm", scale="log"), lines=lines)
    return _figure("grad_norm", "Training", "Gradient norm", "Before clipping, on a log scale.", body)


def _sharpness(rng, steps, names):
    x = np.unique(np.linspace(steps / 40, steps, 40).round().clip(1))
    lines = []
    for run in range(len(names)):
        limit = (2 + 2 * 0.9) / (0.1 * 3e-3 / (run + 1) * np.minimum(1, x / (0.1 * steps)))
        value = np.minimum(limit * 0.97, 900 * (x / steps) ** -0.2 + 12e3 * x / steps) * rng.normal(1, 0.02, x.size)
        lines += [
            Line(name="largest eigenvalue", run=run, x=x, y=value, low=value * 0.95, high=value * 1.05, points=True),
            Line(name="threshold (2 + 2 beta1) / ((1 - beta1) lr)", run=run, x=x, y=limit, role="threshold"),
        ]
    caption = "Largest eigenvalue of the preconditioned Hessian, with its residual, against its threshold."
    body = Lines(x=STEP, y=Axis(label="sharpness"), lines=tuple(lines))
    return _figure("sharpness", "Curvature", "Sharpness against its threshold", caption, body)


def _spectra(rng, names):
    grid = np.linspace(-40, 420, 256)
    lines = []
    for run in range(len(names)):
        for step, width in ((500, 9.0), (5_000, 16.0), (10_000, 22.0)):
            bulk = np.exp(-0.5 * (grid / width) ** 2) / width
            tail = 2e-4 * np.exp(-np.abs(grid - 300) / 30)
            lines.append(Line(name=f"step {step:,}", run=run, x=grid, y=bulk + tail + 1e-9 * rng.random(grid.size)))
    body = Lines(x=Axis(label="eigenvalue"), y=Axis(label="density", scale="log"), lines=tuple(lines))
    caption = "Density of the Hessian's eigenvalues by stochastic Lanczos quadrature; the bulk is near zero."
    return _figure("spectra", "Curvature", "Spectra", caption, body)


_HEATMAPS = {
    "rms": ("Activations", "Root mean square of the residual stream", Axis(label="rms", scale="log"), None),
    "kurtosis": ("Activations", "Kurtosis of the residual stream", Axis(label="kurtosis", scale="log"), None),
    "rank": ("Representation", "Effective rank", Axis(label="effective rank", unit="dimensions"), None),
    "update_ratio": ("Training", "Update ratio against 1e-3", Axis(label="update ratio", scale="log"), 1e-3),
    "entropy": ("Attention", "Attention entropy", Axis(label="entropy", unit="nats"), None),
}


def _heatmap(rng, name, columns, *, layers, run, where):
    section, title, z, middle = _HEATMAPS[name]
    depth = np.linspace(0, 1, layers)[:, None]
    time = np.linspace(0, 1, columns.size)[None]
    values = (1 + 3 * depth) * (0.4 + time**0.5) + 0.5 * np.sin(7 * depth + 5 * time)
    values = np.exp(0.6 * values) if z.scale == "log" else values
    values = values * (middle / np.median(values) if middle else 1) * rng.normal(1, 0.03, values.shape)
    values[layers // 2, : columns.size // 8] = np.nan
    body = Heatmap(
        x=STEP,
        y=Axis(label="layer"),
        z=z,
        columns=columns,
        rows=tuple(map(str, range(layers))),
        values=values,
        run=run,
        middle=middle,
    )
    caption = "A row is a layer, a column the mean over some 50 steps. Empty where nothing was captured."
    return _figure(name + where, section, title, caption, body)


def _heads(rng, layers, heads, *, run, where, step):
    shape = (layers, heads)
    entropy = np.clip(rng.gamma(4, 0.25, shape) * np.linspace(1.6, 0.7, layers)[:, None], 0.01, 5)
    entropy[min(4, layers - 1), :2] = 0.02
    statistics = (
        Statistic(axis=Axis(label="entropy", unit="nats"), meaning="Mean over queries, in nats.", values=entropy),
        Statistic(axis=Axis(label="sink mass"), meaning="Attention on the first token.", values=rng.beta(2, 5, shape)),
        Statistic(axis=Axis(label="induction score"), meaning="On repeated tokens.", values=rng.beta(0.4, 6, shape)),
        Statistic(
            axis=Axis(label="loss increase", unit="nats"),
            meaning="Of the probe when the head is knocked out; below zero it is better off without.",
            values=rng.normal(0.002, 0.01, shape),
        ),
    )
    body = HeadMap(layers=tuple(map(str, range(layers))), statistics=statistics, run=run, step=step)
    caption = "Each cell is a head at the last capture. Choose what it is coloured by."
    return _figure("heads" + where, "Attention", "Heads", caption, body)


def _pathways(rng, layers, run, where, step):
    n, depth, edges = len(SENTENCE), min(layers, 8), []
    for layer in range(depth):
        for query in range(1, n):
            edges.append(Edge(layer=layer, head=-1, query=query, key=query, share=float(0.2 * rng.random() + 0.02)))
            key = int(rng.integers(0, query))
            share = float(rng.beta(0.4, 5))
            edges.append(Edge(layer=layer, head=int(rng.integers(0, 8)), query=query, key=key, share=share))
    body = Pathways(tokens=SENTENCE, layers=depth, target=n - 2, edges=tuple(edges), run=run, step=step)
    caption = "Which positions the last full stop was made of, by attention rollout through the layers."
    return _figure("pathways" + where, "Attention", "Pathways of the probe sentence", caption, body)


def _cost(rng, names):
    instruments = ("activations", "attention", "sharpness", "critical_sharpness", "parameters", "representation")
    values = rng.gamma(2, 0.08, (len(names), len(instruments)))
    body = Bars(x=Axis(label="share of the training time", unit="%"), names=instruments, values=values, limit=1.0)
    return _figure("cost", "Telemetry", "Cost by instrument", "Time on the training thread, against the budget.", body)
