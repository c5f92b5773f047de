"""The dashboard `overview`: is my run healthy?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.grafana import limits, verdicts
from lm_telemetry.exporters.grafana.board import Section, board
from lm_telemetry.exporters.grafana.panels import GREEN, ORANGE, RED, lines, rows, verdict
from lm_telemetry.exporters.grafana.promql import (
    EVENTS,
    LOSS,
    RUNS,
    SMOOTH,
    Query,
    budget_used,
    lately,
    meaning,
    once,
    per_run,
    unit_of,
    where,
)

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

_RUN = "{{run_id}} r{{rank}}"
_RECENT = f"({LOSS} > -Inf < Inf)[30m:15s] offset 1m"
_SPIKING = f"max({LOSS} > bool (avg_over_time({_RECENT}) + {limits.SPIKE_SIGMAS} * stddev_over_time({_RECENT})))"
_RANK = "lm_telemetry_representations_effective_rank"
_DEPTH = (
    f"min({once(_RANK + where(site='resid|final'), 'stack', 'layer')}"
    f" / on (run_id, rank, stack) group_left () {once(_RANK + where(site='embed'), 'stack')})"
)
_DEAD = once(
    f"clamp_max((lm_telemetry_layers_rms{RUNS} < bool {limits.DEAD_RMS:g})"
    f" + (lm_telemetry_layers_zero_fraction{RUNS} > bool {limits.DEAD_ZEROS}), 1)",
    "stack",
    "layer",
    "site",
)
_TOKENS = f"{per_run('steps', 'tokens')} / {per_run('steps', 'seconds')}"
_WHEN = lately(f"lm_telemetry_last_capture_timestamp_seconds{where(table='steps')}")


_LAST_EDGE = once(
    " / ".join(lately(f"lm_telemetry_curvature_{name}{where(scope='all')}") for name in ("value", "threshold"))
)


def dashboard() -> Dashboard:
    """Built anew."""
    return board(
        "overview",
        "Overview: is my run healthy?",
        "One look at the chosen runs: the worst of them in each field above, all of them below.",
        [
            Section(title="Is my run healthy?", panels=_verdicts()),
            Section(title="Learning", panels=_learning()),
            Section(title="Runs", panels=_runs()),
        ],
    )


def _verdicts() -> list[Any]:
    return [
        verdicts.unreachable(),
        verdict(
            "Loss",
            f"Spiking: above the mean of the last 30 minutes by more than {limits.SPIKE_SIGMAS} standard deviations."
            " NaN or infinite: the run is lost unless the next steps are finite again.",
            f"clamp_max(2 * max(({LOSS} != bool {LOSS}) + (abs({LOSS}) == bool Inf)) + ({_SPIKING} or vector(0)), 2)",
            steps=((None, GREEN), (1, ORANGE), (2, RED)),
            bounds=(0, 2),
            words={0: "finite", 1: "spiking", 2: "NaN"},
        ),
        verdicts.nonfinite(),
        verdicts.edge(),
        verdicts.update_ratio(),
        verdicts.lost(),
        verdicts.entropy(),
        verdicts.logits(),
        verdict(
            "Dead layers",
            f"Places in the model whose activations have an RMS below {limits.DEAD_RMS:g}, or more than"
            f" {limits.DEAD_ZEROS:.1%} exact zeros.",
            f"sum({_DEAD})",
            steps=((None, GREEN), (1, RED)),
            bounds=(0, 10),
            words={0: "none"},
        ),
        verdict(
            "Effective rank with depth",
            "The smallest effective rank of the residual stream over that of the embedding. Below"
            f" {limits.RANK_LOSS:.0%} the model narrows its input to few directions.",
            _DEPTH,
            steps=((None, RED), (limits.RANK_LOSS, ORANGE), (0.75, GREEN)),
            bounds=(0, 2),
            unit="percentunit",
            decimals=0,
        ),
        verdicts.budget(),
        verdict(
            "Since the last step",
            "Time since the newest step of any chosen run. A run that is over, or waits, grows old here.",
            f"time() - max({_WHEN})",
            now=True,
            steps=((None, GREEN), (300, ORANGE), (1800, RED)),
            bounds=(0, 3600),
            unit="s",
            decimals=0,
        ),
    ]


def _learning() -> list[Any]:
    def steps(column: str) -> Query:
        return Query(expr=per_run("steps", column), legend=_RUN)

    return [
        lines(
            "Loss",
            f"{meaning('steps', 'loss')} Single jumps are batches; what counts is the mean of five minutes.",
            Query(expr=LOSS, legend=_RUN),
            Query(expr=f"avg_over_time(({LOSS} > -Inf < Inf)[5m:])", legend=f"{_RUN}, 5 min mean"),
            unit="suffix:nats",
            log=True,
            span=12,
        ),
        lines(
            "Gradient norm",
            f"{meaning('steps', 'grad_norm')} A jump with the loss is a spike; a slow rise comes before one.",
            steps("grad_norm"),
            log=True,
            span=12,
        ),
        lines(
            "Learning rate", f"{meaning('steps', 'learning_rate')} The schedule.", steps("learning_rate"), unit="sci"
        ),
        lines(
            "Update norm",
            f"{meaning('steps', 'update_norm')} It follows the learning rate; with Adam hardly the gradient.",
            steps("update_norm"),
            log=True,
        ),
        lines(
            "Parameter norm",
            f"{meaning('steps', 'param_norm')} Weight decay bends it; steady growth lowers the effective rate.",
            steps("param_norm"),
        ),
        lines(
            "Tokens per second",
            "Tokens of the last step over its time, on each rank. A drop on one rank holds all others up.",
            Query(expr=_TOKENS, legend=_RUN),
            unit="suffix:tok/s",
            bounds=(0, None),
        ),
        lines(
            "Tokens per step",
            f"{meaning('steps', 'tokens')} Jumps are batches of uneven length.",
            steps("tokens"),
            unit=unit_of("steps", "tokens"),
            bounds=(0, None),
        ),
        lines(
            "Seconds per step",
            f"{meaning('steps', 'seconds')} Tall single steps are evaluation, checkpoints, or sampled ones.",
            steps("seconds"),
            unit="s",
            log=True,
        ),
    ]


def _runs() -> list[Any]:
    return [
        rows(
            "Runs",
            "One row per run and rank, with its last values. Speed and budget are of runs that go on.",
            {
                "Step": Query(expr=once(lately(f"lm_telemetry_last_step{where(table='steps')}"))),
                "Loss": Query(expr=once(lately(f"lm_telemetry_steps_loss{RUNS}"))),
                "Sharpness / threshold": Query(expr=_LAST_EDGE),
                "Tokens per second": Query(expr=_TOKENS),
                "Budget used": Query(expr=budget_used(SMOOTH)),
                "Since last step": Query(expr=f"time() - {once(_WHEN)}"),
            },
            units={
                "Step": "none",
                "Loss": "suffix:nats",
                "Sharpness / threshold": "percentunit",
                "Budget used": "percentunit",
                "Since last step": "s",
            },
        ),
        lines(
            "Events",
            'Events that the runs have recorded, by severity. What they say: `lmt sql "FROM events_summary"`.',
            Query(expr=EVENTS, legend="{{run_id}} {{severity}}"),
            unit="none",
            bounds=(0, None),
            span=24,
        ),
        rows(
            "Alerts",
            "Alerts of these runs that are pending or fire. Each names the layer, and what to do.",
            {"State": Query(expr='ALERTS{alertname=~"LmTelemetry.*", run_id=~"$run_id|"}')},
            hidden=("Value",),
            empty="nothing fires",
        ),
    ]
