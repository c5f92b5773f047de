"""What each alert must fire on and what it must not, as series of several runs at once.

A case is a map from a series to its values, one each 15 seconds, in promtool's notation; the moment to look; and the
labels of what fires then. Every run is scraped by two jobs, so that what is counted twice shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HOUR = 240
"""samples"""


@dataclass(frozen=True, kw_only=True)
class Case:
    alert: str
    series: dict
    fires: list = field(default_factory=list)
    at: str
    stale_runs: tuple = ()
    """runs whose last capture was at the start"""


def loss(run, values):
    return {f'lm_telemetry_steps_loss{{run_id="{run}", rank="0"}}': values}


def usual(samples, jump=""):
    """A loss of mean 2.05 and standard deviation 0.05."""
    return " ".join(["2 2.1"] * (samples // 2)) + f" {jump}"


def edge(run, value, threshold, scope="all", index="0"):
    labels = f'{{run_id="{run}", rank="0", operator="hessian", scope="{scope}", estimator="lanczos", index="{index}"}}'
    return {f"lm_telemetry_curvature_value{labels}": value, f"lm_telemetry_curvature_threshold{labels}": threshold}


def refreshed(host, values):
    labels = f'job="lm-telemetry-store", instance="{host}:1"'
    return {f"lm_telemetry_export_refresh_timestamp_seconds{{{labels}}}": values}


def head(run, column, stat, values, layer="3"):
    labels = f'run_id="{run}", rank="0", stack="decoder", layer="{layer}", kind="self", stat="{stat}"'
    return {f"lm_telemetry_heads_{column}{{{labels}}}": values}


def place(run, table, column, values, layer="3"):
    labels = f'run_id="{run}", rank="0", stack="decoder", layer="{layer}", site="resid"'
    return {f"lm_telemetry_{table}_{column}{{{labels}}}": values}


def norms(run, update, norm, layer="3"):
    labels = f'run_id="{run}", rank="0", stack="decoder", layer="{layer}"'
    return {f"lm_telemetry_params_update_norm{{{labels}}}": update, f"lm_telemetry_params_norm{{{labels}}}": norm}


def cost(run, telemetry, seconds, budget):
    labels = f'{{run_id="{run}", rank="0"}}'
    return {
        f"lm_telemetry_telemetry_seconds_total{labels}": telemetry,
        f"lm_telemetry_run_seconds_total{labels}": seconds,
        f"lm_telemetry_max_overhead{labels}": budget,
    }


def losses(run, **counts):
    names = ("dropped_captures", "dropped_rows", "flush_failures")
    return {f'lm_telemetry_{n}_total{{run_id="{run}", rank="0"}}': counts.get(n, "0x99") for n in names}


def rank(run, ranks, anisotropy):
    return place(run, "representations", "effective_rank", ranks) | place(
        run, "representations", "anisotropy", anisotropy
    )


CASES = [
    Case(
        alert="LmTelemetryLossNotFinite",
        series=loss("sick", "2x4 NaNx40")
        | loss("infinite", "2x4 Infx40")
        | loss("once", "2x4 NaN 2x40")
        | loss("new", "2x18 NaNx20")
        | loss("gap", "2x4 _x4 2x40")
        | loss("high", "2x4 1e30x40")
        | loss("over", f"NaNx{6 * HOUR}"),
        at="5m",
        fires=[{"run_id": "sick"}, {"run_id": "infinite"}, {"run_id": "over"}],
    ),
    Case(
        alert="LmTelemetryLossNotFinite",  # a run that is over, and is served from the store
        series=loss("over", f"NaNx{6 * HOUR}") | loss("sick", f"NaNx{6 * HOUR}"),
        at="90m",
        fires=[{"run_id": "sick"}],
        stale_runs=("over",),
    ),
    Case(
        alert="LmTelemetryLossSpike",
        series=loss("sick", usual(60, "3x20"))
        | loss("near", usual(60, "2.34x20"))
        | loss("new", usual(62, "2 3x20"))
        | loss("young", f"_x50 {usual(10)} 3x20")
        | loss("gap", usual(60, "_x2 2.1x20"))
        | loss("nan", usual(60, "NaNx20"))
        | loss("flat", "2x99")
        | loss("falling", "10-0.1x80"),
        at="16m",
        fires=[{"run_id": "sick"}],
    ),
    Case(
        alert="LmTelemetryEdgeOfStability",
        series=edge("sick", "110x40", "100x40")
        | edge("sick", "20x40", "100x40", index="1")
        | edge("near", "99x40", "100x40")
        | edge("short", "110x10 90x40", "100x40")
        | edge("new", "90x25 110x20", "100x40")
        | edge("block", "500x40", "100x40", scope="decoder.3")
        | edge("nan", "NaNx40", "100x40")
        | edge("warmup", "5x40", "0x40"),
        at="8m",
        fires=[{"run_id": "sick", "operator": "hessian", "estimator": "lanczos"}],
    ),
    Case(
        alert="LmTelemetryExplodingUpdates",
        series=norms("sick", f"0.1x{HOUR} 5x60", f"100x{HOUR + 60}")
        | norms("sick", f"0.1x{HOUR + 60}", f"100x{HOUR + 60}", layer="4")
        | norms("wild", f"20x{HOUR + 60}", f"100x{HOUR + 60}")
        | norms("near", f"0.05x{HOUR} 0.9x60", f"100x{HOUR + 60}")
        | norms("new", f"0.1x{HOUR + 10} 5x50", f"100x{HOUR + 60}")
        | norms("fast", f"2x{HOUR} 3x60", f"100x{HOUR + 60}")
        | norms("still", f"0x{HOUR + 60}", f"0x{HOUR + 60}")
        | norms("short", f"0.1x{HOUR} 5x8 0.1x52", f"100x{HOUR + 60}"),
        at="66m",
        fires=[
            {"run_id": "sick", "stack": "decoder", "layer": "3"},
            {"run_id": "wild", "stack": "decoder", "layer": "3"},
        ],
    ),
    Case(
        alert="LmTelemetryActivationsNotFinite",
        series=place("sick", "layers", "nonfinite", "0x4 7x40")
        | place("fine", "layers", "nonfinite", "0x44")
        | place("once", "layers", "nonfinite", "0x4 7x2 0x40")
        | place("new", "layers", "nonfinite", "0x18 7x20"),
        at="5m",
        fires=[{"run_id": "sick", "stack": "decoder", "layer": "3", "site": "resid"}],
    ),
    Case(
        alert="LmTelemetryEntropyCollapse",
        series=head("sick", "normalized_entropy", "mean", "0.5x4 0.04x80")
        | head("sick", "normalized_entropy", "mean", "0.5x84", layer="4")
        | head("near", "normalized_entropy", "mean", "0.051x84")
        | head("one_head", "normalized_entropy", "min", "0.001x84")
        | head("one_head", "normalized_entropy", "mean", "0.4x84")
        | head("nan", "normalized_entropy", "mean", "NaNx84")
        | head("short", "normalized_entropy", "mean", "0.5x40 0.04x10 0.5x40")
        | head("new", "normalized_entropy", "mean", "0.5x30 0.04x50"),
        at="15m",
        fires=[{"run_id": "sick", "stack": "decoder", "layer": "3", "kind": "self"}],
    ),
    Case(
        alert="LmTelemetryLogitGrowth",
        series=head("sick", "max_logit", "max", "20x4 60x80")
        | head("near", "max_logit", "max", "50x84")
        | head("mean", "max_logit", "mean", "60x84")
        | head("new", "max_logit", "max", "20x30 60x50")
        | head("nan", "max_logit", "max", "NaNx84"),
        at="15m",
        fires=[{"run_id": "sick", "stack": "decoder", "layer": "3", "kind": "self"}],
    ),
    Case(
        alert="LmTelemetryRankCollapse",
        series=rank("sick", "40x80 15x80", "0.2x80 0.8x80")
        | rank("near", "40x80 21x80", "0.2x80 0.8x80")
        | rank("new", "40x110 15x50", "0.2x110 0.8x50")
        | rank("spread", "40x80 15x80", "0.2x160")
        | rank("always", "15x160", "0.8x160")
        | rank("nan", "40x80 NaNx80", "0.8x160")
        | rank("growing", "15x80 40x80", "0.8x160"),
        at="35m",
        fires=[{"run_id": "sick", "stack": "decoder", "layer": "3", "site": "resid"}],
    ),
    Case(
        alert="LmTelemetryDeadLayer",
        series=place("sick", "layers", "rms", "1x4 1e-8x80")
        | place("zeros", "layers", "rms", "1x84")
        | place("zeros", "layers", "zero_fraction", "0.9995x84")
        | place("near", "layers", "rms", "2e-6x84")
        | place("near", "layers", "zero_fraction", "0.998x84")
        | place("waking", "layers", "rms", "0x20 1x64")
        | place("new", "layers", "rms", "1x30 0x50")
        | place("nan", "layers", "rms", "NaNx84"),
        at="15m",
        fires=[
            {"run_id": "sick", "stack": "decoder", "layer": "3", "site": "resid"},
            {"run_id": "zeros", "stack": "decoder", "layer": "3", "site": "resid"},
        ],
    ),
    Case(
        alert="LmTelemetryOverBudget",
        series=cost("sick", "0+0.3x200", "0+15x200", "0.01x200")
        | cost("near", "0+0.14x200", "0+15x200", "0.01x200")
        | cost("new", "0+0.01x110 2+1x80", "0+15x200", "0.01x200")
        | cost("allowed", "0+0.3x200", "0+15x200", "0.05x200")
        | cost("idle", "5x200", "100x200", "0.01x200")
        | cost("restarted", "0+0.1x100 0+0.1x100", "0+15x100 0+15x100", "0.01x200")
        | cost("dense_start", "0+1x20 20+0.01x180", "0+15x200", "0.01x200"),
        at="40m",
        fires=[{"run_id": "sick"}],
    ),
    Case(
        alert="LmTelemetryLosesRows",
        series=losses("sick", dropped_captures="0x20 5x79")
        | losses("disk", flush_failures="0+1x99")
        | losses("rows", dropped_rows="0x20 900x79")
        | losses("fine")
        | losses("new", dropped_rows="0x30 900x60")
        | losses("past", dropped_rows="900x99")
        | losses("restarted", dropped_rows="900x20 0x79"),
        at="8m",
        fires=[{"run_id": "sick"}, {"run_id": "disk"}, {"run_id": "rows"}],
    ),
]

ENDPOINTS = {
    "LmTelemetryExporterGone": (
        {
            'up{job="lm-telemetry", instance="killed:1"}': "1x20 0x60",
            'up{job="lm-telemetry", instance="alive:1"}': "1x80",
            'up{job="lm-telemetry", instance="ended:1"}': "1x20 _x60",
            'up{job="lm-telemetry", instance="flaky:1"}': "1x40 0x4 1x36",
            'up{job="lm-telemetry", instance="new:1"}': "1x42 0x40",
            'up{job="lm-telemetry-store", instance="never:1"}': "0x80",
            'up{job="node", instance="other:1"}': "1x20 0x60",
        },
        {"job": "lm-telemetry", "instance": "killed:1"},
    ),
    "LmTelemetryStoreUnread": (
        {
            **refreshed("damaged", "0+15x20 300x60"),
            **refreshed("fine", "0+15x80"),
            **refreshed("slow", "0x16 240x16 480x48"),
            **refreshed("again", "0+15x10 150x24 525+15x44"),
            **refreshed("ended", "0+15x20 _x60"),
        },
        {"job": "lm-telemetry-store", "instance": "damaged:1"},
    ),
}
"""What alerts of endpoints must fire on after twelve minutes, and what not: series, and the labels of what fires."""
