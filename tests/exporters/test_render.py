"""From rows to series, with prometheus_client's own parsers as witnesses."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from lm_telemetry.catalogue import CATALOGUE
from lm_telemetry.columns import to_table
from lm_telemetry.exporters import render as render_module
from lm_telemetry.exporters.naming import metric_labels, metric_name
from lm_telemetry.exporters.render import LABEL_LIMIT, MAX_SERIES, Latest, render
from lm_telemetry.writer import WriterStats


@pytest.fixture
def latest():
    return Latest(run_id="r", rank=3, info={"model_class": "Llama"})


def series(latest):
    """Every sample by name and labels, `run_id` and `rank` checked and taken off."""
    found = {}
    for family in text_string_to_metric_families(render([latest]).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("run_id"), labels.pop("rank")) == ("r", "3")
            found[sample.name, *sorted(labels.items())] = sample.value
    return found


def test_every_exported_column_is_served_with_its_meaning(latest, everything):
    everything(latest)
    families = {f.name: f for f in text_string_to_metric_families(render([latest]).decode())}
    for m in CATALOGUE:
        if m.exported:
            family = families[metric_name(m.table, m.name)]
            assert family.documentation == m.meaning
            labels = {"run_id", "rank", *metric_labels(m.table, m.name)}
            assert all(set(sample.labels) == labels for sample in family.samples)


def test_a_step_is_served_and_null_leaves_the_last_value(latest, rows):
    latest.observe("steps", rows("steps", 4, loss=[2.0], update_norm=[0.5], seconds=[2.0], telemetry_seconds=[0.25]))
    latest.observe("steps", rows("steps", 5, loss=[float("nan")], telemetry_seconds=[0.5]))
    found = series(latest)
    assert math.isnan(found["lm_telemetry_steps_loss",])
    assert found["lm_telemetry_steps_update_norm",] == 0.5
    assert found["lm_telemetry_telemetry_seconds_total",] == 0.75
    assert found["lm_telemetry_run_seconds_total",] == 2.0
    assert found["lm_telemetry_last_step", ("table", "steps")] == 5
    assert found["lm_telemetry_last_capture_timestamp_seconds", ("table", "steps")] == 5
    assert ("lm_telemetry_steps_grad_norm",) not in found


VALUE = st.none() | st.sampled_from([0.0, 1.0, 2.5, math.nan, math.inf])
LABELLED = {
    "steps": {},
    "layers": {"stack": ["decoder"], "layer": [0, 1], "site": ["resid", "attn_out"]},
    "heads": {"stack": ["decoder"], "layer": [0, 1], "kind": ["self"], "head": [0, 1, 2]},
    "curvature": {"operator": ["hessian", "adam"], "scope": ["all"], "estimator": ["lanczos"], "index": [0, 1]},
    "overhead": {"instrument": ["attention", "trace"]},
}
VALUES = {
    "steps": ["loss", "grad_norm", "seconds", "telemetry_seconds"],
    "layers": ["rms", "kurtosis"],
    "heads": ["entropy", "max_logit"],
    "curvature": ["value", "residual"],
    "overhead": ["seconds", "captures"],
}


@st.composite
def flushes(draw):
    """A table and some captures of it: other keys and other columns in each, or the same as in the one before."""
    table = draw(st.sampled_from(sorted(LABELLED)))
    keys, captures = None, []
    for step in range(draw(st.integers(1, 5))):
        if keys is None or draw(st.booleans()):
            count = 1 if table == "steps" else draw(st.integers(1, 4))
            columns = {
                n: draw(st.lists(st.sampled_from(v), min_size=count, max_size=count))
                for n, v in LABELLED[table].items()
            }
            keys = columns
        values = st.sampled_from([0.0, 1.0]) if table == "overhead" else VALUE
        names = draw(st.lists(st.sampled_from(VALUES[table]), unique=True, min_size=1))
        own = {name: draw(st.lists(values, min_size=count, max_size=count)) for name in names}
        captures.append(to_table(table, keys | own, attempt=0, step=step, time_us=step))
    return table, captures


@settings(max_examples=300, deadline=None)
@given(flush=flushes())
def test_the_captures_of_a_flush_are_what_they_are_one_by_one(flush):
    table, captures = flush
    pages = []
    for batches in (captures, [pa.concat_tables(captures)]):
        latest = Latest(run_id="r", rank=3, info={})
        for rows in batches:
            latest.observe(table, rows)
        pages.append(render([latest], openmetrics=True).decode().splitlines())
    assert sorted(pages[0]) == sorted(pages[1])


def test_a_flush_of_like_captures_costs_what_its_last_one_does(latest, rows, monkeypatch):
    taken = []
    monkeypatch.setattr(latest, "_set", lambda *values: taken.append(values))
    keys = {"stack": ["decoder"] * 2, "layer": [0, 1], "site": ["resid"] * 2}
    latest.observe("layers", pa.concat_tables([rows("layers", step, **keys, rms=[1.0, step]) for step in range(9)]))
    assert taken == [("layers", "rms", ("decoder", 0, "resid"), 1.0), ("layers", "rms", ("decoder", 1, "resid"), 8.0)]


def test_a_fresh_page_says_so(latest):
    found = series(latest)
    assert found["lm_telemetry_run_info", ("model_class", "Llama")] == 1
    assert found["lm_telemetry_run_seconds_total",] == 0
    assert [found["lm_telemetry_events_total", ("severity", s)] for s in ("info", "warning", "error")] == [0, 0, 0]
    # What is not known is not there.
    for unknown in ("steps", "dropped", "written", "queue", "max_overhead", "last"):
        assert not [name for name, *_ in found if name.startswith(f"lm_telemetry_{unknown}")]


def test_heads_become_mean_p90_maximum_and_minimum_of_their_layer(latest, rows):
    entropy = [1.0, 3.0, None, 4.0, 5.0]
    layers = {"stack": ["decoder"] * 5, "kind": ["self"] * 5, "layer": [0, 0, 0, 0, 1], "head": [0, 1, 2, 3, 0]}
    latest.observe("heads", rows("heads", 1, **layers, entropy=entropy, max_logit=entropy))
    found = series(latest)

    def key(column, layer, stat):
        labels = (("kind", "self"), ("layer", layer), ("stack", "decoder"), ("stat", stat))
        return (f"lm_telemetry_heads_{column}", *labels)

    expected = {"mean": np.mean, "p90": lambda v: np.percentile(v, 90), "max": np.max, "min": np.min}
    for layer, values in (("0", [1.0, 3.0, 4.0]), ("1", [5.0])):
        for stat, of in expected.items():
            assert found[key("entropy", layer, stat)] == pytest.approx(of(values), rel=1e-12)
        assert {stat for stat in expected if key("max_logit", layer, stat) in found} == {"mean", "p90", "max"}


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
        WriterStats(
            rows=5, bytes=70, dropped_rows=2, dropped_captures=1, capture_failures=3, flush_failures=4, queued=8
        )
    )
    found = series(latest)
    assert found["lm_telemetry_queue_captures",] == 8
    for name, value in {
        "written_rows": 5, "written_bytes": 70, "dropped_rows": 2, "dropped_captures": 1, "capture_failures": 3,
        "flush_failures": 4,
    }.items():  # fmt: skip
        assert found[f"lm_telemetry_{name}_total",] == value


def test_what_instruments_took_is_summed_over_rows(latest, rows):
    for step in (1, 2):
        columns = {"instrument": ["attention", "agent"], "seconds": [0.25, step], "captures": [1, None]}
        latest.observe("overhead", rows("overhead", step, **columns, every=[1, None]))
    found = {key: value for key, value in series(latest).items() if key[0].startswith("lm_telemetry_overhead")}
    assert found == {
        ("lm_telemetry_overhead_seconds_total", ("instrument", "attention")): 0.5,
        ("lm_telemetry_overhead_seconds_total", ("instrument", "agent")): 3.0,
        ("lm_telemetry_overhead_captures_total", ("instrument", "attention")): 2.0,
    }
    kinds = {f.name: f.type for f in text_string_to_metric_families(render([latest]).decode())}
    assert kinds["lm_telemetry_overhead_seconds"] == "counter"


def test_events_are_counted_and_lead_to_the_last(latest, rows):
    for step, severity, kind in ((3, "warning", "port_taken"), (4, "warning", "k" * 300), (5, "?!", '"odd\n"}')):
        text = {"severity": [severity], "kind": [kind], "message": ["m"], "fields": ["{}"]}
        latest.observe("events", rows("events", step, **text))
    found = series(latest)
    assert found["lm_telemetry_last_step", ("table", "events")] == 5
    assert {s: found["lm_telemetry_events_total", ("severity", s)] for s in ("info", "warning", "error", "other")} == {
        "info": 0, "warning": 2, "error": 0, "other": 1,
    }  # fmt: skip
    families = {f.name: f for f in openmetrics_families(render([latest], openmetrics=True).decode())}
    exemplars = {s.labels["severity"]: s.exemplar for s in families["lm_telemetry_events"].samples}
    assert exemplars["info"] is None
    assert exemplars["warning"].labels == {"kind": "k" * 64, "step": "4"}
    assert float(exemplars["warning"].timestamp) == 4
    assert exemplars["other"].labels == {"kind": "_odd___", "step": "5"}


def test_what_a_capture_took_leads_to_its_step(latest, rows):
    for step in (10, 20):
        latest.observe("overhead", rows("overhead", step, instrument=["trace"], seconds=[step], captures=[1]))
    families = {f.name: f for f in openmetrics_families(render([latest], openmetrics=True).decode())}
    (sample,) = families["lm_telemetry_overhead_seconds"].samples
    assert (sample.value, sample.exemplar.value, sample.exemplar.labels) == (30, 20, {"step": "20"})


def test_the_row_of_the_run_gives_the_budget_and_what_it_is(latest, rows):
    latest.observe("runs", rows("runs", 1, n_layers=[32], dtype=["bfloat16"], max_overhead=[0.02], settings=["secret"]))
    found = series(latest)
    assert found["lm_telemetry_max_overhead",] == 0.02
    assert found["lm_telemetry_run_info", ("dtype", "bfloat16"), ("model_class", "Llama"), ("n_layers", "32")] == 1
    assert b"secret" not in render([latest])


@pytest.mark.parametrize("openmetrics", [False, True])
def test_several_runs_on_one_page_have_each_family_once(rows, openmetrics):
    latests = [Latest(run_id=run, rank=rank, info={}) for run in ("a", "b") for rank in (0, 1)]
    for number, latest in enumerate(latests[:3]):
        latest.observe("steps", rows("steps", number + 1, loss=[number]))
    page = render(latests, openmetrics=openmetrics).decode()
    parse = openmetrics_families if openmetrics else text_string_to_metric_families
    families = list(parse(page))
    assert len({f.name for f in families}) == len(families)
    assert page.count("# TYPE lm_telemetry_steps_loss gauge") == 1
    (loss,) = [f for f in families if f.name == "lm_telemetry_steps_loss"]
    found = {(s.labels["run_id"], s.labels["rank"]): s.value for s in loss.samples}
    assert found == {("a", "0"): 0, ("a", "1"): 1, ("b", "0"): 2}


@pytest.mark.parametrize("layers", [12, 100, 1000])
def test_series_are_bounded_and_what_is_left_out_is_counted(everything, latest, layers):
    everything(latest, layers=layers)
    found = series(latest)
    by_layer = {"params": 3 + 2, "layers": 4 * 8, "representations": 8, "heads": 9 * 3 + 2, "key": 2 * 3, "head": 3}
    wanted = 8 + 2 + 4 + layers * sum(by_layer.values())
    served = [name for name, *_ in found if name.split("_")[2] in {"steps", "overhead", "curvature", *by_layer}]
    assert len(found) <= MAX_SERIES
    assert found.keys() >= {("lm_telemetry_last_step", ("table", "heads"))}
    assert len(served) + found["lm_telemetry_left_out_series",] == wanted
    if layers == 12:
        assert found["lm_telemetry_left_out_series",] == 0
    else:
        assert len(found) == MAX_SERIES
        again = set(series(latest))
        everything(latest, layers=layers)
        assert set(series(latest)) == again


def test_series_that_are_kept_are_bounded_too(rows, latest, monkeypatch):
    monkeypatch.setattr(render_module, "KEPT_SERIES", 10)
    for step in range(40):
        layer = {"stack": [f"new-{step}"], "layer": [0], "site": ["resid"]}
        latest.observe("layers", rows("layers", step, **layer, rms=[1.0]))
        latest.observe("layers", rows("layers", step, stack=["new-0"], layer=[0], site=["resid"], rms=[float(step)]))
    found = {key: value for key, value in series(latest).items() if key[0] == "lm_telemetry_layers_rms"}
    assert len(found) == 10
    assert found["lm_telemetry_layers_rms", ("layer", "0"), ("site", "resid"), ("stack", "new-0")] == 39


def test_labels_that_are_alike_once_cut_are_one_series(rows, latest):
    stacks = ["x" * LABEL_LIMIT + end for end in "ab"]
    latest.observe("layers", rows("layers", 1, stack=stacks, layer=[0, 0], site=["resid"] * 2, rms=[1.0, 2.0]))
    assert series(latest)["lm_telemetry_layers_rms", ("layer", "0"), ("site", "resid"), ("stack", "x" * 200)] == 2


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
