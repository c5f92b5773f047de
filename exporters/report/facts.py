"""What a run is, for the head of the page: model, optimizer, extent, hardware, versions; and whether it goes on.

Left out: what the page has as a figure or finding.
"""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.report.asking import of
from lm_telemetry.exporters.report.model import RunFacts
from lm_telemetry.exporters.report.words import count, duration, large, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source

QUIET_SECONDS = 900.0
"""A run is taken to go on until nothing has come for this long."""

_SETTINGS = ("betas", "momentum", "weight_decay", "eps")
_VERSIONS = ("lm-telemetry", "torch", "transformers", "python")


def facts(source: Source, run_id: str, now: datetime) -> RunFacts:
    """What the store knows of a run; `now` is the moment of the report, in UTC."""
    overview = next(iter(source.rows(f"FROM overview WHERE {of(run_id)}")), {})
    launches = source.rows(f"FROM raw.runs WHERE {of(run_id)} ORDER BY attempt DESC, rank, time DESC LIMIT 1")
    launch = next(iter(launches), {})
    peak = f"SELECT max(learning_rate) FILTER (isfinite(learning_rate)) AS peak FROM steps WHERE {of(run_id)}"
    rates = source.rows(peak)
    pairs = (*_model(launch), *_optimizer(launch, rates[0]["peak"]), *_extent(overview), *_machine(launch))
    return RunFacts(run_id=run_id, facts=pairs, state=_state(overview, now))


def _model(launch: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if launch.get("model_class"):
        yield "Model", launch["model_class"]
    if launch.get("n_parameters"):
        trained = launch.get("n_trainable")
        part = f", {large(trained)} of them trained" if trained and trained != launch["n_parameters"] else ""
        yield "Parameters", large(launch["n_parameters"]) + part
    shape = (("n_layers", "layers"), ("n_heads", "heads a layer"), ("hidden_size", "wide"), ("vocab_size", "tokens"))
    known = [f"{launch[key]:,} {word}" for key, word in shape if launch.get(key)]
    if known:
        yield "Shape", ", ".join(known)
    kept = [launch[key] for key in ("dtype", "attention") if launch.get(key)]
    if kept:
        yield "Precision and attention", ", ".join(kept)


def _optimizer(launch: dict[str, Any], peak: float | None) -> Iterator[tuple[str, str]]:
    if launch.get("optimizer"):
        settings = _json(launch.get("optimizer_settings"))
        known = [f"{name.replace('_', ' ')} {settings[name]}" for name in _SETTINGS if settings.get(name)]
        yield "Optimizer", ", ".join([launch["optimizer"], *known])
    if peak is not None:
        yield "Learning rate", f"{number(peak)} at most"


def _extent(overview: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if overview.get("last_step") is not None:
        yield "Steps", f"{overview['last_step']:,}"
    if overview.get("tokens"):
        yield "Tokens", large(overview["tokens"])
    began, last = overview.get("began"), overview.get("last_row")
    if began is not None and last is not None:
        yield "Began", f"{began:%Y-%m-%d %H:%M} UTC"
        yield "Duration", duration((last - began).total_seconds())
    if overview.get("ranks"):
        launches = f" in {overview['attempts']:,} launches" if (overview["attempts"] or 1) > 1 else ""
        yield "Ranks", f"{overview['ranks']:,}{launches}"
    if overview.get("telemetry_share") is not None:
        yield "Telemetry", f"{percent(overview['telemetry_share'])} of the time"


def _machine(launch: dict[str, Any]) -> Iterator[tuple[str, str]]:
    hardware, versions = _json(launch.get("hardware")), _json(launch.get("versions"))
    known = [str(hardware[key]) for key in ("device", "machine") if hardware.get(key)]
    known += [count(hardware["cpus"], "core")] if isinstance(hardware.get("cpus"), int) else []
    if known:
        yield "Hardware", ", ".join(known)
    known = [f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name)]
    if known:
        yield "Versions", ", ".join(known)


def _state(overview: dict[str, Any], now: datetime) -> str:
    last = overview.get("last_row")
    if last is None:
        return "nothing captured yet"
    ago = (now - last.replace(tzinfo=UTC)).total_seconds()
    if ago < QUIET_SECONDS:
        return f"running, or ended just now: last row {duration(max(ago, 0))} ago"
    return f"ended, or quiet since {last:%Y-%m-%d %H:%M} UTC"


def _json(text: str | None) -> dict[str, Any]:
    """The object in a column that holds JSON; empty for none, and for anything else."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
