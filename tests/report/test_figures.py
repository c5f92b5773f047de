"""The report's figures of planted runs: their numbers are those of their query, and nothing that matters is lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planted import plant
from planted_runs import HEADS, LAYERS, curvature, heads, healthy, launch, layers, losses, steps

from lm_telemetry.exporters.report import thinning
from lm_telemetry.exporters.report.asking import Source
from lm_telemetry.exporters.report.figures_attention import attention_figures
from lm_telemetry.exporters.report.figures_curvature import curvature_figures
from lm_telemetry.exporters.report.figures_layers import layer_figures
from lm_telemetry.exporters.report.figures_pathways import pathway_figures
from lm_telemetry.exporters.report.figures_telemetry import telemetry_figures
from lm_telemetry.exporters.report.figures_training import training_figures
from lm_telemetry.exporters.report.model import Bars, Figure, HeadMap, Heatmap, Lines, Pathways
from lm_telemetry.exporters.report.reading import CELLS, read
from lm_telemetry.queries import connect
from lm_telemetry.store import Store

NAN = float("nan")


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


def figures(store, *run_ids, of=None):
    """The figures by their id; `of` makes some of them, without all else that is in a report."""
    with connect(store.path) as connection:
        if of is None:
            return {f.id: f for f in read(connection, run_ids or ["r"], store_name="store").figures}
        source = Source(connection=connection, run_ids=run_ids or ("r",), columns_shown=100)
        return {f.id: f for f in of(source) if isinstance(f, Figure)}


def ask(store, sql):
    with connect(store.path) as connection:
        return connection.execute(sql).fetchall()


def numbers(rows):
    """Finite numbers of an answer, in order."""
    return sorted(float(v) for row in rows for v in row if isinstance(v, int | float) and math.isfinite(v))


def rich(store, run_id="r"):
    """A healthy run of which everything was captured."""
    healthy(store, run_id=run_id, n=300)
    for step in (100, 200, 300):
        grid = np.linspace(-1, 30, 50)
        density = {"grid": grid.tolist(), "density": np.exp(-(grid**2)).tolist(), "density_stderr": [0.01] * 50}
        kind = {"operator": "hessian", "scope": "all", "estimator": "slq"}
        plant(store, "spectra", [{"step": step} | kind | density], run_id=run_id)
        places = [{"step": step, "stack": "decoder", "layer": k, "site": "resid"} for k in range(LAYERS)]
        shape = {"participation_ratio": 4.0, "effective_rank": 20.0, "cka_first": 0.9, "n_tokens": 64, "width": 32}
        plant(store, "representations", [p | shape | {"nonfinite": 0} for p in places], run_id=run_id)
        blocks = [{"step": step, "operator": "hessian", "scope": f"decoder.{k}"} for k in range(LAYERS)]
        blocks.append({"step": step, "operator": "hessian", "scope": "embedding"})
        block = {"estimator": "block_lanczos", "value": 3.0, "index": 0, "converged": True}
        plant(store, "curvature", [row | block for row in blocks], run_id=run_id)
    weights = [
        {"step": s, "stack": "decoder", "layer": 1, "name": "w", "norm": 4.0, "update_norm": 0.04} for s in (1, 2)
    ]
    plant(store, "params", weights, run_id=run_id)
    effect = {"step": 200, "stack": "decoder", "layer": 2, "kind": "self", "head": 1, "ablation": "mean", "effect": 0.7}
    plant(store, "head_effects", [effect], run_id=run_id)
    plant(store, "edges", EDGES, run_id=run_id)


def edge(layer, head, query, key, share):
    row = {"step": 300, "stack": "decoder", "sequence": 0, "layer": layer, "head": head}
    return row | {"query_position": query, "key_position": key, "share": share}


EDGES = [
    edge(1, -1, 2, 2, 0.6),
    edge(1, 3, 2, 0, 0.4),
    edge(0, -1, 2, 2, 0.5),
    edge(0, 1, 2, 1, 0.5),
    edge(0, -1, 0, 0, 1.0),
    edge(1, -1, 1, 1, 1.0),  # of another target
    edge(0, -1, 1, 1, 1.0),
]


def test_each_figure_s_query_gives_its_numbers(store):
    rich(store)
    found = figures(store)
    for figure in found.values():
        rows = ask(store, figure.sql)
        answer = numbers(rows)
        body = figure.body
        if isinstance(body, Lines):
            values = [v for line in body.lines for v in (*line.x, *line.y)]
        elif isinstance(body, Heatmap):
            values = [*np.ravel(body.values), *body.columns]
        elif isinstance(body, HeadMap):
            values = [v for s in body.statistics for v in np.ravel(s.values)]
        elif isinstance(body, Pathways):
            values = [e.share for e in body.edges]
        else:
            values = [*np.ravel(body.values), body.limit]
        known = np.array(answer)
        for value in filter(math.isfinite, values):
            assert np.isclose(known, value, rtol=1e-6).any(), (figure.id, value)
    cells = {(r[0], r[2]): r[4] for r in ask(store, found["rms"].sql)}
    body = found["rms"].body
    assert len(cells) == body.values.size
    for (step, layer), value in cells.items():
        assert body.values[layer, list(body.columns).index(step)] == value
    curve = found["loss"].body.lines[0]
    assert [(x, y) for _, x, y, _ in ask(store, found["loss"].sql)] == list(zip(curve.x, curve.y, strict=True))


def test_there_is_a_figure_for_all_that_was_captured(store):
    rich(store)
    found = figures(store)
    assert set(found) == {
        *("loss", "learning_rate", "grad_norm", "tokens_per_second", "update_ratio"),
        *("sharpness-hessian-lanczos", "block_sharpness", "spectrum-hessian-all"),
        *("heads", "entropy", "max_logit", "pathways"),
        *("rms", "absmax", "kurtosis", "effective_rank", "participation_ratio", "drift", "cost"),
    }
    sections = {f.section for f in found.values()}
    assert sections == {"Training", "Curvature", "Attention", "Representation", "Telemetry"}


@pytest.mark.parametrize("step", [1, 4321, 9999, 10_000])
def test_a_spike_of_a_single_step_survives_thinning(store, step):
    values = losses(10_000)
    values[step - 1] += 5
    values[7000], values[8000] = NAN, float("inf")
    steps(store, values)
    raw, smoothed = figures(store, of=training_figures)["loss"].body.lines
    assert len(raw.x) <= thinning.POINTS
    assert (raw.role, smoothed.role, len(smoothed.x)) == ("raw", "value", len(raw.x))
    at = list(raw.x).index(step)
    assert raw.y[at] == values[step - 1] == np.nanmax(raw.y)
    assert np.isnan(raw.y[[list(raw.x).index(7001), list(raw.x).index(8001)]]).all()
    assert np.nanmin(raw.y) == np.nanmin(values)


def test_a_spike_beside_a_nan_is_kept_too(store):
    values = np.full(10_000, 2.0)
    values[5000], values[5001] = NAN, 9.0
    steps(store, values)
    raw = figures(store, of=training_figures)["loss"].body.lines[0]
    assert 9.0 in raw.y
    assert np.isnan(raw.y).sum() == 1


def test_a_short_run_is_shown_whole(store):
    values = losses(300)
    steps(store, values)
    raw = figures(store, of=training_figures)["loss"].body.lines[0]
    assert list(raw.x) == list(range(1, 301))
    assert list(raw.y) == list(values)
    assert not raw.points


def test_marks_and_bands_are_where_spikes_restarts_and_regimes_are(store):
    values = losses(1000)
    values[499] += 3
    steps(store, values[:700])
    steps(store, values[600:], attempt=1, first=601)
    curvature(store, range(20, 601, 20), lambda step: min(step / 500, 1.0))
    curvature(store, range(620, 1001, 20), lambda step: 1.0, attempt=1)
    body = figures(store, of=training_figures)["loss"].body
    assert [(m.x, m.level) for m in body.marks] == [(500, "warning"), (601, "note")]
    assert [(b.label, b.start, b.end) for b in body.bands] == [
        ("below", 20, 60),
        ("progressive sharpening", 60, 460),
        ("edge of stability", 460, 1000),
    ]


def test_sharpness_has_its_threshold_and_its_residual(store):
    launch(store)
    curvature(store, range(10, 101, 10), lambda step: step / 100, threshold=200.0)
    body = figures(store, of=curvature_figures)["sharpness-hessian-lanczos"].body
    estimate, threshold = body.lines
    assert (estimate.role, threshold.role, estimate.points) == ("value", "threshold", True)
    assert list(estimate.y) == pytest.approx([2.0 * s for s in range(10, 101, 10)])
    assert list(estimate.low) == pytest.approx(estimate.y - 5.0)
    assert list(estimate.high) == pytest.approx(estimate.y + 5.0)
    assert set(threshold.y) == {200.0}
    curvature(store, [10, 20], lambda step: 1.0, estimator="hutchinson", index=None, stderr=3.0, residual=None)
    trace = figures(store, of=curvature_figures)["sharpness-hessian-hutchinson"].body.lines[0]
    assert list(trace.high - trace.y) == [6, 6]


def test_densities_are_of_three_captures_of_one_run_and_of_the_last_of_several(store):
    rich(store)
    rich(store, run_id="b")
    body = figures(store, of=curvature_figures)["spectrum-hessian-all"].body
    assert [line.name for line in body.lines] == ["step 100", "step 200", "step 300"]
    line = body.lines[0]
    assert body.y.scale == "log"
    assert np.nanmin(line.y) > 1e-6 * np.nanmax(line.y)
    assert list(line.high[:3] - line.y[:3]) == pytest.approx([0.02] * 3, rel=1e-5)
    assert [
        (line.run, line.name)
        for line in figures(store, "r", "b", of=curvature_figures)["spectrum-hessian-all"].body.lines
    ] == [
        (0, "step 300"),
        (1, "step 300"),
    ]


def test_a_heatmap_keeps_its_extreme_and_has_few_columns(store):
    launch(store, n_layers=64)
    captures = range(10, 10_001, 10)
    layers(store, captures, absmax=lambda s, layer: 500.0 if (s, layer) == (5000, 2) else 9.0, rms=2.0)
    found = figures(store)
    body = found["absmax"].body
    assert body.values.shape == (LAYERS, CELLS // 64)
    assert body.values.max() == 250
    assert body.values[2].argmax() == np.searchsorted(body.columns, 5000, side="right") - 1
    layers(store, captures, run_id="b")
    assert figures(store, "r", "b")["absmax-1"].body.values.shape == (LAYERS, CELLS // 64 // 2)
    assert "their largest value is shown" in found["absmax"].caption
    assert "their mean value is shown" in found["rms"].caption


def test_rows_of_a_heatmap_stand_in_the_order_of_the_stream(store):
    layers(store, [1, 2])
    plant(store, "layers", [{"step": 2, "stack": "decoder", "layer": -1, "site": "embed", "rms": 7.0}])
    plant(store, "layers", [{"step": 1, "stack": "decoder", "layer": LAYERS, "site": "final", "rms": 8.0}])
    body = figures(store, of=layer_figures)["rms"].body
    assert body.rows == ("embed", "0", "1", "2", "final")
    assert list(body.values[1:, 0]) == [1, 1, 1, 8]
    assert list(body.values[:4, 1]) == [7, 1, 1, 1]
    assert np.isnan(body.values[[0, 4], [0, 1]]).all()
    plant(store, "layers", [{"step": 1, "stack": "encoder", "layer": 0, "site": "resid", "rms": 3.0}])
    assert figures(store, of=layer_figures)["rms"].body.rows[-1] == "encoder layer 0"


def test_the_head_map_is_of_the_last_capture_that_has_numbers(store):
    rich(store)
    heads(store, [310], entropy=None, normalized_entropy=None, nonfinite=5)
    body = figures(store, of=attention_figures)["heads"].body
    assert (body.step, body.layers) == (300, ("0", "1", "2"))
    by_name = {s.axis.label: s for s in body.statistics}
    assert by_name["sink mass"].values == pytest.approx(np.full((LAYERS, HEADS), 0.1))
    effect = by_name["loss without the head"].values
    assert effect[2, 1] == 0.7
    assert np.isnan(effect).sum() == LAYERS * HEADS - 1


def test_pathways_sum_what_each_edge_brought_to_the_target(store):
    rich(store)
    body = figures(store, of=pathway_figures)["pathways"].body
    assert (body.target, body.layers, body.step, body.tokens) == (2, 2, 300, ("0", "1", "2"))
    found = {(e.layer, e.head, e.query, e.key): e.share for e in body.edges}
    assert found == pytest.approx(
        {
            (1, -1, 2, 2): 0.6,
            (1, 3, 2, 0): 0.4,
            (0, -1, 2, 2): 0.3,
            (0, 1, 2, 1): 0.3,
            (0, -1, 0, 0): 0.4,
        }
    )


def test_pathways_are_drawn_over_the_tokens_of_their_tower_and_of_the_last_launch(store):
    rich(store)
    words = ["The", " cat", None, " down"]
    plant(store, "probe", [token(position, " old", 1) for position in range(9)])
    last = [token(i, word, 70 + i) for i, word in enumerate(words)]
    others = [token(0, " other", 2, sequence=1), token(0, " source", 3, stack="encoder")]
    plant(store, "probe", [*last, *others], attempt=1)
    assert figures(store, of=pathway_figures)["pathways"].body.tokens == ("The", " cat", "id 72", " down")


def token(position, text, token_id, *, stack="decoder", sequence=0):
    row = {"step": 1, "stack": stack, "sequence": sequence}
    return row | {"position": position, "token_id": token_id, "text": text}


def test_cost_is_by_instrument_with_the_budget(store):
    launch(store)
    steps(store, losses(100))
    rows = [{"step": 50, "instrument": name, "seconds": s} for name, s in (("attention", 0.3), ("sharpness", 0.1))]
    plant(store, "overhead", rows)
    body = figures(store, of=telemetry_figures)["cost"].body
    assert isinstance(body, Bars)
    assert (body.names, body.limit) == (("all", "attention", "sharpness"), 1.0)
    assert body.values == pytest.approx(np.array([[0.4, 0.3, 0.1]]))


def test_several_runs_lie_over_each_other_or_side_by_side(store):
    rich(store)
    healthy(store, run_id="b", n=200, seed=1)
    found = figures(store, "b", "r")
    assert [(line.run, line.role) for line in found["loss"].body.lines] == [
        (0, "raw"),
        (0, "value"),
        (1, "raw"),
        (1, "value"),
    ]
    assert found["loss"].body.bands == ()
    assert (found["rms-1"].body.run, found["rms-2"].body.run) == (0, 1)
    assert found["rms-2"].title == "RMS of the residual stream"
    assert "pathways-1" not in found
    assert found["cost"].body.values.shape[0] == 2
    with connect(store.path) as connection:
        missing = read(connection, ["b", "r"], store_name="store").missing
    assert "No pathways were captured of b (instrument `pathways`)" in missing
