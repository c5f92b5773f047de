"""From rows to series, with promtool and prometheus_client's own parser as witnesses."""

import math
import os
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lm_telemetry.catalogue import CATALOGUE, columns
from lm_telemetry.exporters.render import LABEL_LIMIT, MAX_SERIES, Latest, metric_labels, metric_name
from lm_telemetry.writer import WriterStats


@pytest.fixture
def latest():
    return Latest(run_id="r", rank=3, info={"model_class": "Llama"})


def series(latest):
    """Every sample by name and labels, `run_id` and `rank` checked and taken off."""
    found = {}
    for family in text_string_to_metric_families(latest.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("run_id"), labels.pop("rank")) == ("r", "3")
            found[sample.name, *sorted(labels.items())] = sample.value
    return found


def everything(rows, latest, layers=2, heads=4):
    """Rows in every exported table."""
    latest.observe("steps", rows("steps", 9, **{m.name: [1] for m in columns("steps") if m.exported}))
    stack = {"stack": ["decoder"] * layers, "layer": list(range(layers))}
    values = {m.name: [0.5] * layers for m in columns("layers") if m.exported and m.type == "float32"}
    for site in ("resid", "attn_out", "mlp_out", "embed"):
        latest.observe("layers", rows("layers", 9, **stack, **values, site=[site] * layers, nonfinite=[0] * layers))
    wide = {name: [value for value in column for _ in range(heads)] for name, column in stack.items()}
    wide |= {"kind": ["self"] * layers * heads, "head": [*range(heads)] * layers}
    for table, more in {"heads": {}, "key_mass": {}, "head_effects": {"ablation": ["mean"] * layers * heads}}.items():
        values = {m.name: [0.5] * layers * heads for m in columns(table) if m.exported}
        latest.observe(table, rows(table, 9, **wide, **more, **values))
    values = {m.name: [0.5] * layers for m in columns("representations") if m.exported}
    latest.observe("representations", rows("representations", 9, **stack, **values, site=["resid"] * layers))
    values = {m.name: [0.5] * layers for m in columns("params") if m.exported}
    latest.observe("params", rows("params", 9, name=["w"] * layers, **stack, **values))
    curvature = {"operator": ["hessian"], "scope": ["all"], "estimator": ["lanczos"], "index": [0], "value": [3.0]}
    latest.observe("curvature", rows("curvature", 9, **curvature, residual=[0.1], threshold=[4.0], converged=[True]))
    latest.flushed(WriterStats(rows=5, dropped_rows=2, dropped_captures=1))


def test_every_exported_column_is_served_with_its_meaning(latest, rows):
    everything(rows, latest)
    families = {f.name: f for f in text_string_to_metric_families(latest.render().decode())}
    for m in CATALOGUE:
        if m.exported:
            family = families[metric_name(m.table, m.name)]
            assert family.documentation == m.meaning
            labels = {"run_id", "rank", *metric_labels(m.table, m.name)}
            assert all(set(sample.labels) == labels for sample in family.samples)


def test_promtool_has_no_complaint(latest, rows):
    promtool = shutil.which("promtool")
    if promtool is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("promtool is not installed (Debian: apt-get install prometheus)")
    everything(rows, latest)
    checked = subprocess.run([promtool, "check", "metrics"], input=latest.render(), capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_a_step_is_served_and_null_leaves_the_last_value(latest, rows):
    latest.observe("steps", rows("steps", 4, loss=[2.0], update_norm=[0.5], telemetry_seconds=[0.25]))
    latest.observe("steps", rows("steps", 5, loss=[float("nan")], telemetry_seconds=[0.5]))
    found = series(latest)
    assert math.isnan(found["lm_telemetry_steps_loss",])
    assert found["lm_telemetry_steps_update_norm",] == 0.5
    assert found["lm_telemetry_telemetry_seconds_total",] == 0.75
    assert found["lm_telemetry_last_step", ("table", "steps")] == 5
    assert found["lm_telemetry_last_capture_timestamp_seconds", ("table", "steps")] == 5
    assert ("lm_telemetry_steps_grad_norm",) not in found


def test_a_fresh_page_says_so(latest):
    found = series(latest)
    assert found["lm_telemetry_run_info", ("model_class", "Llama")] == 1
    assert found["lm_telemetry_dropped_rows_total",] == 0
    assert not [name for name, *_ in found if name.startswith("lm_telemetry_steps")]


def test_heads_become_their_layer_s_mean_maximum_and_minimum(latest, rows):
    latest.observe(
        "heads",
        rows(
            "heads",
            1,
            stack=["decoder"] * 4,
            kind=["self"] * 4,
            layer=[0, 0, 0, 1],
            head=[0, 1, 2, 0],
            entropy=[1.0, 3.0, None, 5.0],
        ),
    )
    found = {key: value for key, value in series(latest).items() if key[0] == "lm_telemetry_heads_entropy"}

    def key(layer, stat):
        return ("lm_telemetry_heads_entropy", ("kind", "self"), ("layer", layer), ("stack", "decoder"), ("stat", stat))

    assert found == {
        key("0", "mean"): 2.0, key("0", "max"): 3.0, key("0", "min"): 1.0,
        key("1", "mean"): 5.0, key("1", "max"): 5.0, key("1", "min"): 5.0,
    }  # fmt: skip


def test_parameters_become_one_norm_per_layer(latest, rows):
    latest.observe(
        "params",
        rows(
            "params",
            1,
            name=["a", "b", "c", "emb"],
            stack=["decoder", "decoder", "decoder", None],
            layer=[0, 0, 1, None],
            norm=[3.0, 4.0, 2.0, 7.0],
            grad_norm=[None, 1.0, None, None],
            update_ratio=[0.1, 0.3, None, None],
        ),
    )
    found = series(latest)

    def key(column, stack, layer, *stat):
        return (f"lm_telemetry_params_{column}", ("layer", layer), ("stack", stack), *stat)

    # 3-4-5: the norm of both tensors as one vector.
    assert found[key("norm", "decoder", "0")] == 5.0
    assert found[key("norm", "decoder", "1")] == 2.0
    assert found[key("norm", "other", "other")] == 7.0
    assert found[key("grad_norm", "decoder", "0")] == 1.0
    assert key("grad_norm", "decoder", "1") not in found
    assert found[key("update_ratio", "decoder", "0", ("stat", "max"))] == pytest.approx(0.3)
    assert found[key("update_ratio", "decoder", "0", ("stat", "mean"))] == pytest.approx(0.2)


def test_curvature_tells_estimates_apart(latest, rows):
    common = {"operator": ["hessian"] * 3, "scope": ["all"] * 3, "estimator": ["lanczos", "lanczos", "critical"]}
    latest.observe(
        "curvature",
        rows("curvature", 1, **common, index=[0, 1, None], value=[9.0, 4.0, 8.0], converged=[True, False, None]),
    )
    found = series(latest)

    def key(column, estimator, index):
        return (
            f"lm_telemetry_curvature_{column}",
            ("estimator", estimator), ("index", index), ("operator", "hessian"), ("scope", "all"),
        )  # fmt: skip

    assert found[key("value", "lanczos", "0")] == 9.0
    assert found[key("value", "critical", "other")] == 8.0
    assert (found[key("converged", "lanczos", "0")], found[key("converged", "lanczos", "1")]) == (1.0, 0.0)
    assert key("converged", "critical", "other") not in found


def test_the_writer_s_counts_are_served(latest):
    latest.flushed(
        WriterStats(rows=5, bytes=70, dropped_rows=2, dropped_captures=1, capture_failures=3, flush_failures=4)
    )
    found = series(latest)
    for name, value in {
        "written_rows": 5, "written_bytes": 70, "dropped_rows": 2, "dropped_captures": 1, "capture_failures": 3,
        "flush_failures": 4,
    }.items():  # fmt: skip
        assert found[f"lm_telemetry_{name}_total",] == value


def test_tables_that_are_not_exported_only_count_as_captured(latest, rows):
    latest.observe("events", rows("events", 3, severity=["info"], kind=["k"], message=["m"], fields=["{}"]))
    assert series(latest)["lm_telemetry_last_step", ("table", "events")] == 3


@pytest.mark.parametrize("layers", [12, 100, 1000])
def test_series_are_bounded_and_what_is_left_out_is_counted(rows, latest, layers):
    everything(rows, latest, layers=layers)
    found = series(latest)
    by_layer = {"params": 3 + 2, "layers": 4 * 8, "representations": 8, "heads": 9 * 3, "key": 2 * 3, "head": 3}
    wanted = 8 + 4 + layers * sum(by_layer.values())
    served = [name for name, *_ in found if name.split("_")[2] in {"steps", "curvature", *by_layer}]
    assert len(found) <= MAX_SERIES
    assert len(served) + found["lm_telemetry_left_out_series",] == wanted
    if layers == 12:
        assert found["lm_telemetry_left_out_series",] == 0
    else:
        assert len(found) == MAX_SERIES
        again = set(series(latest))
        everything(rows, latest, layers=layers)
        assert set(series(latest)) == again


HOSTILE = ['"', "\\", "\n", 'a"} 1\nfake{b="', "x" * 10_000, "\ud800", "\x00", "{}", "день", ""]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_label_values_are_harmless(rows, value):
    latest = Latest(run_id="r", rank=3, info={"model": value, "1st-label!": "kept", "run_id": "forged"})
    known = value.encode("utf-8", "replace").decode()
    latest.observe("layers", rows("layers", 1, stack=[known], site=["resid"], layer=[0], rms=[1.0]))
    found = series(latest)
    cut = known[:LABEL_LIMIT]
    assert found["lm_telemetry_layers_rms", ("layer", "0"), ("site", "resid"), ("stack", cut)] == 1.0
    assert found["lm_telemetry_run_info", ("model", cut), ("st_label_", "kept")] == 1
    assert not [name for name, *_ in found if name.startswith("fake")]
