"""Every query of every panel, put to a Prometheus that watches a real run."""

from __future__ import annotations

import re
import time

import pytest
from grafana_boards import STEPS, boards, panels, queries

EMPTY_WHEN_HEALTHY = {"Alerts": "a healthy run has none"}
"""Panels that may have nothing to show, with the reason."""

BUILT_IN = {"__rate_interval": "5s", "__range": "5m"}


def variables(board, watched):
    """The values that Grafana would choose: all where several may be, else the given one, else the first."""
    chosen = dict(BUILT_IN)
    for variable in board["templating"]["list"]:
        if variable["type"] == "datasource":
            continue
        selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", substituted(variable["query"], chosen)).groups()
        values = watched.label_values(selector, label)
        assert values, f"nothing to choose for {variable['name']}"
        current = variable.get("current", {}).get("value", min(values))
        assert current in values
        chosen[variable["name"]] = variable.get("allValue") or current
    return chosen


def substituted(text, chosen):
    for name in sorted(chosen, key=len, reverse=True):
        text = text.replace(f"${name}", chosen[name])
    assert "$" not in text, f"a variable is left: {text}"
    return text


@pytest.mark.parametrize("name", boards())
def test_variables_have_values(watched, name):
    assert set(variables(boards()[name], watched)) > set(BUILT_IN)


@pytest.mark.parametrize(
    ("name", "panel"), [pytest.param(n, p, id=f"{n}-{p['title']}") for n, b in boards().items() for p in panels(b)]
)
def test_a_panel_shows_something(watched, name, panel):
    chosen = variables(boards()[name], watched)
    for target in panel["targets"]:
        expr = substituted(target["expr"], chosen)
        series = watched.ask(expr) if target.get("instant") else watched.ask_range(expr)
        assert series or panel["title"] in EMPTY_WHEN_HEALTHY, f"{panel['title']} is empty: {expr}"
        for label in re.findall(r"{{(\w+)}}", target.get("legendFormat", "")):
            assert all(label in found["metric"] for found in series), f"no label {label} in {expr}"
        names = [legend(target, found["metric"]) for found in series]
        assert len(set(names)) == len(names) or target.get("instant"), f"series of one name: {names}"


def legend(target, labels):
    return re.sub(r"{{(\w+)}}", lambda m: labels[m[1]], target.get("legendFormat", str(sorted(labels.items()))))


@pytest.mark.parametrize("name", boards())
def test_marks_of_alerts_are_a_query(watched, name):
    chosen = variables(boards()[name], watched)
    for annotation in boards()[name]["annotations"]["list"]:
        assert watched.ask(substituted(annotation["expr"], chosen)) == []


def test_every_metric_that_is_served_is_on_a_panel(watched):
    """By the run itself and by `lmt export`; what rules have recorded has a colon."""
    served = {name for name in watched.get("label/__name__/values") if re.fullmatch(r"lm_telemetry_\w+", name)}
    asked = {name for expr in queries() for name in re.findall(r"lm_telemetry_\w+", expr)}
    assert len(served) > 60
    assert not served - asked


def test_the_page_is_as_prometheus_wants_it(watched, promtool):
    promtool("check", "metrics", given=watched.page)


def test_a_run_that_is_scraped_twice_counts_once(watched):
    assert {found["metric"]["job"] for found in watched.ask("lm_telemetry_steps_loss")} > {"lm-telemetry"}
    panel = {p["title"]: p for p in panels(boards()["agent"])}["Captures"]
    shown = watched.ask(substituted(panel["targets"][0]["expr"], BUILT_IN | {"run_id": ".*", "rank": ".*"}))
    served = watched.ask('lm_telemetry_overhead_captures_total{job="lm-telemetry"}')
    counts = {found["metric"]["instrument"]: float(found["value"][1]) for found in served}
    assert {found["metric"]["instrument"]: float(found["value"][1]) for found in shown} == counts
    assert all("max by (run_id" in expr for expr in queries() if re.search(r"sum\b.*lm_telemetry_", expr))


def test_every_rule_is_evaluated(watched):
    rules = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    for rule in rules:
        if rule["type"] == "recording":
            assert watched.ask(rule["name"]), f"{rule['name']} is empty"
        else:
            assert rule["state"] != "firing"


def test_a_run_that_is_over_is_still_told_of(watched):
    """Its endpoint is gone, and no target is left that would be unreachable."""
    panel = {p["title"]: p for p in panels(boards()["overview"])}["Runs"]
    exprs = [substituted(t["expr"], BUILT_IN | {"run_id": ".*", "rank": ".*"}) for t in panel["targets"]]
    deadline = time.time() + 30
    own = '{__name__=~"lm_telemetry_steps_loss|up", job="lm-telemetry"}'
    stored = f'lm_telemetry_last_step{{table="steps", job="lm-telemetry-store"}} == {STEPS}'
    while watched.get("query", query=own)["result"] or not watched.get("query", query=stored)["result"]:
        assert time.time() < deadline, "the target did not go, or the store's did not come"
        time.sleep(0.2)
    told = [watched.get("query", query=expr)["result"] for expr in exprs]
    heads = [panel["transformations"][1]["options"]["renameByName"][f"Value #{t['refId']}"] for t in panel["targets"]]
    last = {head: float(series[0]["value"][1]) for head, series in zip(heads, told, strict=True) if series}
    assert last["Step"] == STEPS
    assert {"Loss", "Sharpness / threshold", "Since last step"} <= set(last)


def test_a_healthy_run_reads_so(watched):
    """The words of the first row, from the values that its panels have."""
    board = boards()["overview"]
    chosen = variables(board, watched)
    words = {}
    for panel in panels(board):
        if panel["type"] == "stat":
            ((_, value),) = [
                f["values"][-1] for f in watched.ask_range(substituted(panel["targets"][0]["expr"], chosen))
            ]
            mapped = [m["options"] for m in panel["fieldConfig"]["defaults"]["mappings"] if m["type"] == "value"]
            words[panel["title"]] = mapped[0].get(value, {}).get("text", value) if mapped else float(value)
    assert words["Loss"] == "finite"
    assert words["Unreachable"] == "all answer"
    assert words["Non-finite activations"] == words["Lost captures"] == words["Dead layers"] == "none"
    assert 0 < words["Lowest attention entropy"] <= 1
    assert 0 <= words["Since the last step"] < 10
    assert 0 < words["Telemetry budget used"] < 1
