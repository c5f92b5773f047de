"""Recording rules and alerts, by Prometheus' own promtool: each fires on what it is for, and on nothing beside it."""

from __future__ import annotations

import re

import pytest
import yaml
from alert_cases import CASES, ENDPOINTS

from lm_telemetry.exporters.grafana.stack import SOURCE
from lm_telemetry.exporters.naming import PREFIX
from lm_telemetry.queries.view import list_views

RULES = sorted((SOURCE / "prometheus" / "rules").glob("*.yml"))


def rules(kind):
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


ALERTS = {rule["alert"]: rule for rule in rules("alert")}


def scraped_twice(series):
    """Every series as two jobs have it."""
    return [
        {"series": f'{name[:-1]}, job="{job}", instance="{job}:1"}}', "values": spelled_out(values)}
        for job in ("lm-telemetry", "lm-telemetry-store")
        for name, values in series.items()
    ]


def spelled_out(values):
    """`NaNx3` and `Infx3`, which promtool does not know."""
    return re.sub(r"(NaN|Inf)x(\d+)", lambda m: " ".join([m[1]] * (int(m[2]) + 1)), values)


def captures(series, stale):
    """When the runs of these series captured last: at each sample, or long ago."""
    runs = dict.fromkeys(re.findall(r'run_id="(\w+)"', " ".join(series)))
    return {
        f'{PREFIX}_last_capture_timestamp_seconds{{run_id="{run}", rank="0", table="steps"}}': (
            "0x2000" if run in stale else "0+15x2000"
        )
        for run in runs
    }


@pytest.fixture
def check(promtool, tmp_path):
    """`check(series, at, **expected)` runs the rules over the series and compares."""

    def run(series, at, *, exprs=(), alerts=()):
        document = {
            "rule_files": [str(path) for path in RULES],
            "evaluation_interval": "15s",
            "tests": [
                {
                    "interval": "15s",
                    "input_series": series,
                    "promql_expr_test": [{"expr": e, "eval_time": at, "exp_samples": s} for e, s in exprs],
                    "alert_rule_test": [{"alertname": n, "eval_time": at, "exp_alerts": a} for n, a in alerts],
                }
            ],
        }
        path = tmp_path / "test.yml"
        path.write_text(yaml.safe_dump(document))
        promtool("test", "rules", path)

    return run


def firing(alert, labels):
    own = {"alertname": alert, "alertstate": "firing", "severity": ALERTS[alert]["labels"]["severity"], **labels}
    pairs = ", ".join(f'{name}="{value}"' for name, value in own.items())
    return {"labels": f"ALERTS{{{pairs}}}", "value": 1}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}-{case.at}")
def test_it_fires_on_what_it_is_for_and_on_nothing_beside_it(check, case):
    series = scraped_twice(case.series | captures(case.series, case.stale_runs))
    expected = [firing(case.alert, {"rank": "0", **labels}) for labels in case.fires]
    check(series, case.at, exprs=[(f'ALERTS{{alertname="{case.alert}", alertstate="firing"}}', expected)])


@pytest.mark.parametrize("name", ENDPOINTS)
def test_an_alert_of_an_endpoint_fires_on_what_it_is_for(check, name):
    given, labels = ENDPOINTS[name]
    series = [{"series": key, "values": values} for key, values in given.items()]
    expected = [firing(name, labels)]
    check(series, "12m", exprs=[(f'ALERTS{{alertname="{name}", alertstate="firing"}}', expected)])


def test_every_alert_has_a_case():
    assert {case.alert for case in CASES} | set(ENDPOINTS) == set(ALERTS)
    assert all(case.fires for case in CASES)


def test_annotations_are_filled_in(check):
    labels = {"run_id": "sick", "rank": "0", "severity": "critical"}
    wanted = {
        "summary": "The loss of sick is NaN.",
        "description": "Rank 0 of sick has had a loss of NaN for a minute.",
        "runbook": ALERTS["LmTelemetryLossNotFinite"]["annotations"]["runbook"],
    }
    series = {'lm_telemetry_steps_loss{run_id="sick", rank="0"}': "2x4 NaNx40"}
    alert = ("LmTelemetryLossNotFinite", [{"exp_labels": labels, "exp_annotations": wanted}])
    check(scraped_twice(series | captures(series, ())), "5m", alerts=[alert])


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_is_and_what_to_do(name):
    rule = ALERTS[name]
    assert rule["for"]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    labels = {key for case in CASES if case.alert == name for fired in case.fires for key in ("rank", *fired)}
    assert named <= (labels or {"instance", "job"})
    if "run_id" in labels:
        assert labels <= named | {"run_id"}, "a label that tells alerts apart, and is not told"


def test_runbooks_name_views_that_exist():
    known = {view.name for view in list_views()}
    for rule in ALERTS.values():
        assert set(re.findall(r'FROM (\w+)"', rule["annotations"]["runbook"])) <= known


def test_recordings_are_named_by_level_metric_and_operation():
    names = [rule["record"] for rule in rules("record")]
    assert all(re.fullmatch(r"[a-z_]+:lm_telemetry_\w+:[a-z0-9]+", name) for name in names)
    used = " ".join(rule["expr"] for kind in ("alert", "record") for rule in rules(kind))
    assert not [name for name in names if name not in used and "share" not in name]


def test_promtool_finds_no_fault(promtool):
    assert "0 rules" not in promtool("check", "rules", *RULES)
    promtool("check", "config", SOURCE / "prometheus" / "prometheus.yml")
