"""The dashboard `agent`: what does telemetry itself cost, and does it lose anything?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.grafana import verdicts
from lm_telemetry.exporters.grafana.board import Section, board
from lm_telemetry.exporters.grafana.panels import BLUE, GREEN, ORANGE, RED, lines, rows, states, verdict
from lm_telemetry.exporters.grafana.promql import (
    EVENTS,
    RATE,
    RUNS,
    SMOOTH,
    Query,
    once,
    per_run,
    share,
)

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

_RUN = "{{run_id}} r{{rank}}"
_COST = f"sum by (run_id, instrument) ({once(f'rate(lm_telemetry_overhead_seconds_total{RUNS}{RATE})', 'instrument')})"
_TIME = f"sum by (run_id) ({once(f'rate(lm_telemetry_run_seconds_total{RUNS}{RATE})')})"
_CAPTURES = f"sum by (run_id, instrument) ({once(f'lm_telemetry_overhead_captures_total{RUNS}', 'instrument')})"


def _latest(name: str) -> str:
    return once(f"lm_telemetry_{name}{RUNS}")


def _rate(name: str) -> str:
    return once(f"rate(lm_telemetry_{name}_total{RUNS}{RATE})")


def dashboard() -> Dashboard:
    """Built anew."""
    return board(
        "agent",
        "Agent: what does telemetry cost, and does it lose anything?",
        "Telemetry about telemetry: its share of the training time against the budget, by instrument; the writer's"
        " queue; what was lost; the endpoints.",
        [
            Section(title="Where it stands", panels=_verdicts()),
            Section(title="Cost", panels=_cost()),
            Section(title="Writer", panels=_writer()),
            Section(title="Freshness and endpoints", panels=_endpoints()),
            Section(title="Store", panels=_store()),
            Section(title="What runs", panels=_about()),
        ],
    )


def _verdicts() -> list[Any]:
    return [
        verdicts.budget(),
        verdict(
            "Share of training time",
            "What the agent takes of the training thread, in the last quarter of an hour.",
            f"max({share(SMOOTH)})",
            unit="percentunit",
            decimals=2,
            nan="no steps",
        ),
        verdicts.lost(),
        verdict(
            "Waiting",
            "Captures that wait for the writer's thread. A number that grows means the disk, or the CPU, is behind.",
            f"sum({_latest('queue_captures')})",
            steps=((None, GREEN), (100, ORANGE), (1000, RED)),
            bounds=(0, 5000),
            unit="none",
        ),
        verdict(
            "Left-out series",
            "Series that are not served, to stay within the bound of an endpoint; they are in the store.",
            f"sum({_latest('left_out_series')})",
            steps=((None, GREEN), (1, ORANGE)),
            bounds=(0, 1e6),
            words={0: "none"},
        ),
        verdicts.unreachable(),
    ]


def _cost() -> list[Any]:
    return [
        lines(
            "Share of training time and budget",
            "The share that telemetry takes, and the one that the run allows it.",
            Query(expr=share(), legend=_RUN),
            Query(expr=_latest("max_overhead"), legend=f"budget {_RUN}"),
            unit="percentunit",
            bounds=(0, None),
        ),
        lines(
            "Share by instrument",
            "Who takes it. `agent` is taps and bookkeeping, `shadow` the repeated forward pass, `snapshot` the copy of"
            " parameters before an update. Instruments that fire rarely come in tall steps.",
            Query(expr=f"{_COST} / on (run_id) group_left () {_TIME}", legend="{{run_id}} {{instrument}}"),
            unit="percentunit",
            stacked=True,
            bounds=(0, None),
        ),
        lines(
            "Captures",
            "Captures of each instrument so far. A line that stops has been throttled, or fails: see the events.",
            Query(
                expr=_CAPTURES,
                legend="{{run_id}} {{instrument}}",
            ),
            unit="none",
            bounds=(0, None),
        ),
        lines(
            "Telemetry in a step",
            "Time that the agent took of the last step on the training thread. Sampled steps stand out.",
            Query(expr=per_run("steps", "telemetry_seconds"), legend=_RUN),
            unit="s",
            log=True,
        ),
        lines(
            "Telemetry in all",
            "Time that the agent has taken of the training thread since the process started.",
            Query(expr=_latest("telemetry_seconds_total"), legend=_RUN),
            unit="s",
            bounds=(0, None),
        ),
        lines(
            "Training in all",
            "Time of all steps since the process started, telemetry included.",
            Query(expr=_latest("run_seconds_total"), legend=_RUN),
            unit="s",
            bounds=(0, None),
        ),
    ]


def _writer() -> list[Any]:
    losses = ("dropped_captures", "dropped_rows", "capture_failures", "flush_failures")
    return [
        lines(
            "Rows per second",
            "Rows that reach the disk.",
            Query(expr=_rate("written_rows"), legend=_RUN),
            unit="suffix:rows/s",
            bounds=(0, None),
        ),
        lines(
            "Bytes per second",
            "Parquet that reaches the disk.",
            Query(expr=_rate("written_bytes"), legend=_RUN),
            unit="Bps",
            bounds=(0, None),
        ),
        lines(
            "Waiting captures",
            "Captures that wait for the writer's thread; past its bound they are dropped, never waited for.",
            Query(expr=_latest("queue_captures"), legend=_RUN),
            unit="none",
            bounds=(0, None),
        ),
        lines(
            "Losses",
            "What was dropped or failed so far. Any step upwards has an event that says why.",
            *(Query(expr=_latest(f"{name}_total"), legend=f"{name.replace('_', ' ')} {_RUN}") for name in losses),
            unit="none",
            bounds=(0, None),
        ),
        lines(
            "Events",
            'Events by severity so far. What they say: `lmt sql "FROM events_summary"`.',
            Query(expr=EVENTS, legend="{{run_id}} {{severity}}"),
            unit="none",
            bounds=(0, None),
        ),
        lines(
            "Left-out series",
            "Series that an endpoint does not serve, to stay within its bound.",
            Query(expr=_latest("left_out_series"), legend=_RUN),
            unit="none",
            bounds=(0, None),
        ),
    ]


def _endpoints() -> list[Any]:
    return [
        lines(
            "Age of the last capture",
            "Time since the last row of each table. Gauges hold their last value: this says how old it is.",
            Query(
                expr=f"time() - max by (run_id, table) (lm_telemetry_last_capture_timestamp_seconds{RUNS})",
                legend="{{run_id}} {{table}}",
            ),
            unit="s",
            log=True,
        ),
        lines(
            "Last step of each table",
            "The step of the last row. Tables that lag are sparse, or their instrument fails.",
            Query(expr=f"max by (run_id, table) (lm_telemetry_last_step{RUNS})", legend="{{run_id}} {{table}}"),
            unit="none",
            bounds=(0, None),
        ),
        states(
            "Endpoints",
            "Which endpoints answer. One that ends with its run is gone; one that was killed stays, in red.",
            Query(expr=f"up{verdicts.JOBS}", legend="{{job}} {{instance}}"),
            words={0: "unreachable", 1: "answers"},
            steps=((None, RED), (1, GREEN)),
            bounds=(0, 1),
        ),
        lines(
            "Time of a scrape",
            "A scrape copies a finished page: it should take milliseconds.",
            Query(expr=f"scrape_duration_seconds{verdicts.JOBS}", legend="{{job}} {{instance}}"),
            unit="s",
            bounds=(0, None),
            span=12,
        ),
        lines(
            "Series of an endpoint",
            "Samples in a scrape. It grows as tables are first captured, and then stays.",
            Query(expr=f"scrape_samples_scraped{verdicts.JOBS}", legend="{{job}} {{instance}}"),
            unit="none",
            bounds=(0, None),
            span=12,
        ),
    ]


def _store() -> list[Any]:
    """What `lmt export` says of itself; not captured where none runs."""
    by = "by (job, instance)"
    return [
        states(
            "Runs in the store",
            "Which runs a process is writing, as `lmt export` finds them.",
            Query(expr='max by (run_id) (lm_telemetry_run_live{run_id=~"$run_id"})', legend="{{run_id}}"),
            words={0: "over", 1: "live"},
            steps=((None, BLUE), (1, GREEN)),
            bounds=(0, 1),
        ),
        lines(
            "Looks at the store",
            "How long ago `lmt export` last looked with success, and how long that took. An age that grows means that"
            " the store cannot be read; the last good values are served meanwhile.",
            Query(
                expr=f"time() - max {by} (lm_telemetry_export_refresh_timestamp_seconds)", legend="age, {{instance}}"
            ),
            Query(expr=f"max {by} (lm_telemetry_export_refresh_seconds)", legend="time taken, {{instance}}"),
            unit="s",
            log=True,
        ),
        lines(
            "Left out by the export",
            "Looks that failed so far, by what could not be read; and runs and ranks that are not served, because"
            " there are too many (`--max-runs`, `--run`).",
            Query(
                expr="max by (job, instance, what) (lm_telemetry_export_failures_total)",
                legend="failures, {{what}}, {{instance}}",
            ),
            Query(expr=f"max {by} (lm_telemetry_export_left_out_runs)", legend="runs, {{instance}}"),
            Query(expr=f"max {by} (lm_telemetry_export_left_out_ranks)", legend="ranks, {{instance}}"),
            unit="none",
            bounds=(0, None),
        ),
    ]


def _about() -> list[Any]:
    return [
        rows(
            "Runs",
            "What each run is: model, settings, machine.",
            {"is": Query(expr=f"lm_telemetry_run_info{RUNS}")},
            hidden=("Value",),
        )
    ]
