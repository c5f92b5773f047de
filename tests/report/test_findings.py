"""What the report says of planted runs whose state is known."""

from __future__ import annotations

import numpy as np
import planted
import pytest
from planted_runs import curvature, heads, healthy, launch, layers, losses, steps

from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.exporters.report.asking import Source
from lm_telemetry.exporters.report.findings import findings
from lm_telemetry.exporters.report.findings_loss import read_course
from lm_telemetry.exporters.report.reading import MOST_RUNS, read
from lm_telemetry.queries import connect
from lm_telemetry.store import Store

NAN = float("nan")
CAPTURES = range(10, 1001, 10)


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


def report(store, *run_ids):
    with connect(store.path) as connection:
        return read(connection, run_ids or ["r"], store_name="store")


def judged(store, run_id="r"):
    """The findings alone."""
    with connect(store.path) as connection:
        source = Source(connection=connection, run_ids=(run_id,), columns_shown=1)
        return findings(source, run_id, read_course(source, run_id))


def levels(found):
    return {finding.title: finding.level for finding in found}


def finding(found, word):
    """The only finding whose title has `word`."""
    (one,) = [f for f in found if word in f.title]
    return one


def test_a_healthy_run_is_called_so_and_why(store):
    healthy(store)
    found = report(store)
    assert {f.level for f in found.findings} == {"ok"}, levels(found.findings)
    assert found.verdict.startswith(f"Healthy in {len(found.findings)} checks: the loss fell from 5.8")
    assert found.verdict.endswith("nats over 1,000 steps.")
    assert "No loss spike" in levels(found.findings)
    assert "Nothing non-finite in 200 captures" in levels(found.findings)
    assert finding(found.findings, "Below the edge").text.endswith("it is at 0.3 of it.")
    assert (found.store, found.runs[0].run_id) == ("store", "r")
    assert dict(found.runs[0].facts)["Parameters"] == "6.74 B"
    assert found.runs[0].state.startswith("ended, or quiet since 1970")


def test_what_was_not_captured_is_missing_and_not_well(store):
    steps(store, losses(200))
    found = report(store)
    assert not [f for f in found.findings if "ttention" in f.title or "non-finite" in f.title or "edge" in f.title]
    text = "\n".join(found.missing)
    for instrument in ("attention", "activations", "sharpness", "spectrum", "representation", "pathways", "parameters"):
        assert f"`{instrument}`" in text
    assert found.missing[0].startswith("No gradient noise scale was captured (")


def test_a_spike_is_told_with_its_step_and_height(store):
    values = losses(1000)
    values[499] += 3
    steps(store, values)
    found = report(store)
    spike = finding(found.findings, "spike")
    assert (spike.level, spike.since, spike.title, spike.figure) == ("note", 500, "1 loss spike, all recovered", "loss")
    assert f"at step 500, went to {values[499]:.3g} nats" in spike.text
    assert found.verdict.startswith("Healthy")


def test_a_run_that_ends_in_nan_is_lost_since_then(store):
    values = losses(1000)
    values[699:] = NAN
    values[200] = NAN  # a step that was skipped is not when it was lost
    steps(store, values)
    layers(store, CAPTURES, nonfinite=lambda step, layer: int(step >= 700 and layer > 0))
    found = report(store)
    worst = found.findings[0]
    assert (worst.level, worst.since, worst.title) == ("critical", 700, "The loss is not a number")
    assert finding(found.findings, "NaN or infinite activations").since == 700
    assert finding(found.findings, "NaN or infinite activations").level == "critical"
    assert found.verdict.startswith("Not healthy: the loss is not a number since step 700; the loss was 5.81 nats")


def test_a_loss_that_was_nan_for_a_step_came_back(store):
    values = losses(400)
    values[200] = NAN
    steps(store, values)
    one = finding(judged(store), "came back")
    assert (one.level, one.since) == ("warning", 201)
    assert "No loss spike" not in levels(judged(store))


def test_a_loss_that_jumps_and_stays_is_diverging_since_the_jump(store):
    values = losses(1000)
    values[811:] += 5
    steps(store, values)
    found = report(store)
    worst = finding(found.findings, "diverging")
    assert (worst.level, worst.since) == ("critical", 812)
    assert "it has lost all of what it had gained" in worst.text
    assert found.verdict.startswith("Not healthy: the loss is diverging since step 812")


def test_a_loss_that_creeps_up_has_risen_since_its_lowest(store):
    values = losses(1000)
    values[600:] += np.linspace(0, 1.2, 400)
    values[800] += 5  # comes back
    steps(store, values)
    one = finding(judged(store), "risen")
    assert one.level == "warning"
    assert 560 < one.since < 660


def test_noise_about_a_flat_loss_is_no_rise(store):
    steps(store, np.random.default_rng(0).normal(3, 0.3, 2000))
    assert {f.level for f in judged(store) if f.figure == "loss"} == {"ok"}


def test_collapsed_heads_are_counted_and_dated(store):
    steps(store, losses(1000))
    heads(store, CAPTURES, normalized_entropy=lambda s, layer, head: 0.01 if s >= 300 and layer == 1 else 0.5)
    found = report(store)
    one = finding(found.findings, "collapsed")
    assert (one.level, one.since, one.figure) == ("warning", 300, "entropy")
    assert one.title == "Attention entropy has collapsed in 4 heads of 12"
    assert "layer 1 head 0, layer 1 head 1, layer 1 head 2 and 1 more" in one.text
    assert found.verdict.startswith("Needs a look: attention entropy has collapsed in 4 heads of 12 since step 300;")


def test_logits_above_the_bound_and_on_their_way_to_it(store):
    steps(store, losses(1000))
    heads(store, CAPTURES, max_logit=lambda s, layer, head: 60.0 if s >= 500 and (layer, head) == (2, 3) else 8.0)
    one = finding(judged(store), "logits")
    assert (one.level, one.since, one.title) == ("warning", 500, "Attention logits are above 50 in 1 head of 12")
    steps(store, losses(1000), run_id="b")
    heads(store, CAPTURES, run_id="b", max_logit=lambda s, layer, head: 5 * 2 ** (s / 400) if head == 1 else 8.0)
    one = finding(judged(store, "b"), "logits grow")
    assert (one.level, one.title) == ("note", "Attention logits grow in 3 heads of 12")
    assert "doubles every 400 steps" in one.text


def test_sinks_and_induction_heads_are_told_calmly(store):
    heads(store, CAPTURES, sink_mass=lambda s, layer, head: 0.8 if head == 1 or (s >= 200 and head == 0) else 0.1)
    heads(store, CAPTURES, run_id="b", induction_score=lambda s, layer, head: 0.6 if s > 400 and layer == 2 else 0.01)
    sink = finding(judged(store), "sink")
    assert (sink.level, sink.since, sink.title) == ("note", 200, "6 heads with an attention sink")
    induction = finding(judged(store, "b"), "induction")
    assert (induction.level, induction.since, induction.title) == ("ok", 410, "4 induction heads")


def test_a_dead_layer_is_a_warning_and_a_write_that_grows_a_note(store):
    steps(store, losses(1000))
    layers(store, CAPTURES, rms=lambda s, layer: 1e-9 if layer == 1 and s >= 600 else 1.0)
    layers(store, CAPTURES, site="attn_out", rms=lambda s, layer: 0.01 if s < 900 else 1.0)
    found = judged(store)
    dead = finding(found, "died")
    assert (dead.level, dead.since, dead.title) == ("warning", 600, "1 place died")
    grown = finding(found, "grew")
    assert (grown.level, grown.since) == ("note", 900)
    assert "No layer dies or explodes" not in levels(found)


def test_a_stream_that_explodes_is_a_warning(store):
    layers(store, CAPTURES, rms=lambda s, layer: 1.0 if s < 500 else 20.0)
    one = finding(judged(store), "grew")
    assert (one.level, one.since) == ("warning", 500)


def test_the_edge_of_stability_is_dated_and_no_fault(store):
    healthy(store)
    steps(store, losses(1000), run_id="b")
    curvature(store, range(20, 1001, 20), lambda step: min(step / 500, 1.0), run_id="b")
    found = report(store, "b")
    edge = finding(found.findings, "came to the edge")
    assert (edge.level, edge.since, edge.figure) == ("note", 460, "sharpness-hessian-lanczos")
    assert found.verdict.startswith("Healthy")


def test_a_last_capture_above_the_threshold_is_not_called_below_it(store):
    steps(store, losses(1000))
    curvature(store, range(20, 1001, 20), lambda step: 1.3 if step == 1000 else 0.3)
    found = levels(report(store).findings)
    near = [title for title in found if "the edge of stability" in title]
    assert [(title.partition(" ")[0], found[title]) for title in near] == [("Near", "note")]


def test_updates_are_judged_by_the_last_capture(store):
    rows = [
        {"step": s, "stack": "decoder", "layer": layer, "name": f"m.{layer}.w", "norm": 10.0}
        | {"update_norm": 1.0 if layer == 1 and s >= 400 else 0.01}
        for s in CAPTURES
        for layer in range(2)
    ]
    steps(store, losses(1000))
    planted.plant(store, "params", rows)
    one = finding(judged(store), "Updates")
    assert (one.level, one.since, one.title) == ("warning", 400, "Updates are large in 1 place")
    assert "layer 1 (ratio 0.1)" in one.text


def test_weights_that_rest_while_the_rate_is_0_are_no_fault(store):
    steps(store, losses(200), learning_rate=0.0)
    row = {"stack": "decoder", "layer": 0, "name": "w", "norm": 1.0, "update_norm": 0.0}
    planted.plant(store, "params", [{"step": s} | row for s in range(10, 200, 10)])
    assert not [f for f in judged(store) if "Weights" in f.title]
    steps(store, losses(200), run_id="b")
    planted.plant(store, "params", [{"step": s} | row for s in range(10, 200, 10)], run_id="b")
    assert finding(judged(store, "b"), "Weights do not move").level == "warning"


def test_the_worst_rank_decides(store):
    values = losses(1000)
    launch(store)
    steps(store, values)
    for rank, lost in ((1, 949), (3, 899)):
        values = losses(1000)
        values[lost:] = NAN
        steps(store, values, rank=rank)
    worst = judged(store)[0]
    assert (worst.level, worst.since) == ("critical", 900)
    assert worst.text.startswith("The loss is NaN or infinite from step 900 to the last step, 1,000 (rank 3).")


def test_a_restart_is_told(store):
    steps(store, losses(400))
    steps(store, losses(1000)[300:], attempt=1, first=301)
    one = finding(judged(store), "Taken up again")
    assert (one.level, one.since, one.title) == ("note", 301, "Taken up again 1 time")


def test_cost_is_held_against_the_budget(store):
    launch(store)
    steps(store, losses(200))
    assert finding(judged(store), "Telemetry kept to its budget").text.startswith(
        "0.4 % of the training time; 1 % were"
    )
    launch(store, run_id="b")
    steps(store, losses(200), run_id="b", telemetry_seconds=0.1)
    over = finding(judged(store, "b"), "more than its budget")
    assert (over.level, over.figure) == ("warning", "cost")


def test_events_are_told_by_severity(store):
    steps(store, losses(200))
    rows = [{"step": 5, "severity": "error", "kind": "capture_failed", "message": "it broke"}]
    rows += [{"step": s, "severity": "warning", "kind": "slow", "message": "it is slow"} for s in (7, 9)]
    planted.plant(store, "events", rows)
    found = judged(store)
    assert (finding(found, "1 error").level, finding(found, "2 warnings").level) == ("warning", "note")
    assert "`capture_failed` (1). The last: it broke" in finding(found, "1 error").text


def test_a_single_step_is_too_little_to_judge(store):
    steps(store, [4.0])
    found = report(store)
    assert finding(found.findings, "too few").title == "1 step: too few to judge the loss"
    assert "the loss was 4 nats at its one step" in found.verdict
    assert "No loss spike" not in levels(found.findings)


def test_a_run_without_training_is_judged_by_its_captures(store):
    heads(store, range(1, 20))
    layers(store, range(1, 20))
    found = report(store)
    assert "no training step was captured" in found.verdict
    assert finding(found.findings, "Nothing non-finite in 38 captures").level == "ok"
    assert "No loss was captured (no training step)" in found.missing


def test_several_runs_are_summed_up_one_by_one(store):
    healthy(store, run_id="good")
    values = losses(1000) - 1
    values[994:] = NAN
    steps(store, values, run_id="bad")
    found = report(store, "bad", "good")
    assert found.verdict.startswith("1 of 2 runs are healthy; good has the lowest loss, 2.0")
    assert "bad: Not healthy: the loss is not a number since step 995" in found.verdict
    assert [run.run_id for run in found.runs] == ["bad", "good"]
    assert found.findings[0].run_id == "bad"
    order = [("critical", "warning", "note", "ok").index(f.level) for f in found.findings]
    assert order == sorted(order)


def test_an_unknown_run_an_empty_store_and_too_many_runs_are_refused_with_words(store):
    with pytest.raises(StoreError, match="there is no run r; `lmt runs` lists them"):
        report(store)
    steps(store, losses(20), run_id="llama-1")
    with pytest.raises(StoreError, match="there is no run lama-1; near it: llama-1"):
        report(store, "lama-1")
    with pytest.raises(QueryError, match=rf"1 to {MOST_RUNS} runs; got 9"):
        report(store, *(f"r{i}" for i in range(9)))


@pytest.mark.parametrize("run_id", ["it's; DROP TABLE steps", 'a"b', "123"])
def test_a_hostile_name_is_a_name(store, run_id):
    healthy(store, run_id=run_id, n=120)
    steps(store, losses(120), run_id="other")
    found = report(store, run_id)
    assert found.runs[0].run_id == run_id
    assert {f.level for f in found.findings} == {"ok"}
    with connect(store.path) as connection:
        for one in (*found.findings, *found.figures):
            assert connection.execute(one.sql).fetchall() is not None
    both = report(store, "other", run_id)
    assert {line.run for line in both.figures[0].body.lines} == {0, 1}


def test_a_finding_does_not_point_to_a_figure_that_is_not_there(store):
    rows = [{"step": s, "name": "head.weight", "norm": 1.0, "update_norm": 0.001} for s in range(10, 200, 10)]
    planted.plant(store, "params", rows)
    one = finding(report(store).findings, "Updates are of a usual size")
    assert one.figure is None


def test_each_finding_carries_a_query_that_answers(store):
    healthy(store)
    found = report(store)
    with connect(store.path) as connection:
        for one in found.findings:
            assert "'r'" in one.sql
            connection.execute(one.sql).fetchall()
    assert {f.figure for f in found.findings if f.figure} <= {f.id for f in found.figures}
