"""The committed dashboards: as the code makes them, as Grafana's schema has them, and as a reader needs them."""

from __future__ import annotations

import json
import re

import pytest
from grafana_boards import boards, panels, queries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import units

from lm_telemetry.catalogue import CATALOGUE
from lm_telemetry.exporters.grafana.generate import DASHBOARDS, to_json
from lm_telemetry.exporters.grafana.promql import NAME
from lm_telemetry.exporters.grafana.stack import SOURCE
from lm_telemetry.exporters.naming import metric_stats, series_name

UNITS = {value for name, value in vars(units).items() if isinstance(value, str) and not name.startswith("_")}
BOARDS = boards()
PANELS = [pytest.param(p, id=f"{n}-{p['title']}") for n, b in BOARDS.items() for p in panels(b)]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_committed_one_is_what_the_code_makes(name):
    committed = (SOURCE / "dashboards" / f"{name}.json").read_text(encoding="utf-8")
    assert committed == to_json(DASHBOARDS[name]()), "run `python -m lm_telemetry.exporters.grafana.generate`"


def test_there_are_no_others():
    assert set(BOARDS) == set(DASHBOARDS) == {"overview", "curvature", "attention", "representation", "agent"}


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_schema_keeps_all_of_it(name):
    """What the schema does not know is lost on the way through its types; what it adds are its defaults."""
    register_default_plugins()
    board = BOARDS[name]
    again = json.loads(json.dumps(model.Dashboard.from_json(board), cls=JSONEncoder))
    assert_kept(board, again)


def assert_kept(given, again, path=""):
    if isinstance(given, dict):
        assert not given.keys() - again.keys(), path
        for key in given:
            assert_kept(given[key], again[key], f"{path}/{key}")
    elif isinstance(given, list):
        assert len(given) == len(again), path
        for index, (one, other) in enumerate(zip(given, again, strict=True)):
            assert_kept(one, other, f"{path}/{index}")
    else:
        assert given == again, path


@pytest.mark.parametrize("name", BOARDS)
def test_siblings_are_one_click_away(name):
    board = BOARDS[name]
    assert board["uid"] == f"lm-telemetry-{name}"
    assert len(board["uid"]) <= 40
    assert board["tags"] == ["lm-telemetry"]
    (link,) = board["links"]
    assert (link["type"], link["tags"]) == ("dashboards", ["lm-telemetry"])
    assert link["includeVars"]
    assert link["keepTime"]


@pytest.mark.parametrize("name", BOARDS)
def test_variables(name):
    found = {v["name"]: v for v in BOARDS[name]["templating"]["list"]}
    assert list(found)[:3] == ["datasource", "run_id", "rank"]
    assert found["datasource"]["query"] == "prometheus"
    assert found["run_id"]["multi"]
    used = set(re.findall(r"\$(\w+)", json.dumps([[p["targets"], p["title"]] for p in panels(BOARDS[name])])))
    assert used <= set(found) | {"__rate_interval", "__range"}
    titles = set(re.findall(r"\$(\w+)", json.dumps([p["title"] for p in BOARDS[name]["panels"]])))
    assert set(found) - {"datasource"} <= used | titles, "a variable that changes nothing"


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_the_grid_without_overlap(name):
    taken = set()
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    ids = [panel["id"] for panel in BOARDS[name]["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_it_shows(panel):
    text, _, names = panel["description"].rpartition("\n\nMetric: ")
    assert len(text) > 20
    assert text.endswith((".", "`"))
    assert "{" not in text
    assert set(names.split(", ")) == {name for target in panel["targets"] for name in NAME.findall(target["expr"])}


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_a_unit(panel):
    found = [panel["fieldConfig"]["defaults"]["unit"]]
    if panel["type"] == "heatmap":
        found.append(panel["options"]["cellValues"]["unit"])
    found += [
        p["value"] for o in panel["fieldConfig"].get("overrides") or () for p in o["properties"] if p["id"] == "unit"
    ]
    assert all(unit in UNITS or unit.startswith("suffix:") for unit in found)


@pytest.mark.parametrize("panel", PANELS)
def test_thresholds_lie_within_the_scale(panel):
    defaults = panel["fieldConfig"]["defaults"]
    steps = [s["value"] for s in defaults.get("thresholds", {}).get("steps", ()) if s["value"] is not None]
    assert steps == sorted(steps)
    axis = defaults.get("custom", {}) if panel["type"] == "timeseries" else defaults
    low, high = ("axisSoftMin", "axisSoftMax") if panel["type"] == "timeseries" else ("min", "max")
    for value in steps:
        assert axis[low] <= value <= axis[high]
    assert not steps or axis[low] < axis[high]


@pytest.mark.parametrize("panel", PANELS)
def test_what_a_number_cannot_say_is_said_in_words(panel):
    if panel["type"] == "heatmap":  # leaves a gap
        return
    defaults = panel["fieldConfig"]["defaults"]
    special = {
        m["options"]["match"]: m["options"]["result"]["text"] for m in defaults["mappings"] if m["type"] == "special"
    }
    assert special["nan"] in {"NaN", "no steps"}
    assert special["null"] == "not captured"
    assert defaults["noValue"]


@pytest.mark.parametrize("panel", PANELS)
def test_sparse_captures_are_connected(panel):
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    if panel["type"] == "timeseries":
        assert custom["spanNulls"] is True
    if panel["type"] == "heatmap":  # Grafana leaves out cells that are not positive, unless told otherwise
        assert panel["options"]["filterValues"]["le"] < -1e20
        assert panel["options"]["calculate"] is False


def test_every_exported_column_is_on_a_panel():
    asked = {name for expr in queries() for name in NAME.findall(expr)}
    exported = {series_name(m.table, m.name) for m in CATALOGUE if m.exported}
    assert not exported - asked


def test_queries_ask_for_statistics_that_are_served():
    served = {series_name(m.table, m.name): metric_stats(m.table, m.name) for m in CATALOGUE if m.exported}
    for expr in queries():
        for name, selector in re.findall(r"(lm_telemetry_\w+)\{(.*?)\}", expr):
            stat = re.search(r'stat=~"(\w+)"', selector)
            if served.get(name):
                if stat:
                    assert stat[1] in served[name], f"{name} has no {stat[1]}"
                else:
                    assert 'layer="other"' in selector, f"{name} would mix statistics"


def test_rates_are_over_grafanas_interval_or_the_alerts():
    for expr in queries():
        windows = re.findall(r"rate\([^[]*\[([^]]*)\]\)", expr)
        assert len(windows) == expr.count("rate(")
        assert set(windows) in ({"$__rate_interval"}, {"15m"}, set())
