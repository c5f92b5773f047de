"""The frame of a dashboard: variables, links to its siblings, alerts as marks, panels in sections.

Links keep variables and time, so that a question can be followed from one dashboard to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import dashboard as model

from lm_telemetry.exporters.grafana.panels import SOURCE

if TYPE_CHECKING:
    from collections.abc import Sequence

TAG = "lm-telemetry"

_LABELS = {"run_id": "Run", "rank": "Rank", "stack": "Stack", "layer": "Layer", "site": "Site"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Panels under a heading."""

    title: str
    panels: Sequence[Any]
    """builders of panels"""
    each_run: bool = False
    """whether it is drawn once for each run, which the title then names"""


def board(
    name: str, title: str, about: str, sections: Sequence[Section], *, layers: str = "", sites: bool = False
) -> model.Dashboard:
    """A dashboard.

    Args:
        name: file and end of the identifier.
        title: what it is called.
        about: the question it answers.
        sections: its panels, from the top.
        layers: metric whose stacks and layers can be chosen; none if empty.
        sites: whether its sites can be chosen, too.
    """
    board = (
        build.Dashboard(title)
        .uid(f"{TAG}-{name}")
        .description(about)
        .tags([TAG])
        .readonly()
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("30s")
        .link(
            build.DashboardLink("lm-telemetry")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .annotation(
            build.AnnotationQuery()
            .name("Alerts")
            .datasource(SOURCE)
            .enable(True)
            .icon_color("red")
            .expr('ALERTS{alertname=~"LmTelemetry.*", alertstate="firing", run_id=~"$run_id"}')
        )
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in _variables(layers, sites=sites):
        board = board.with_variable(variable)
    number = 0
    for section in sections:
        number += 1
        row = build.Row(section.title).id(number)
        board = board.with_row(row.repeat("run_id") if section.each_run else row)
        for panel in section.panels:
            number += 1
            board = board.with_panel(panel.id(number))
    return board.build()


def _variables(layers: str, *, sites: bool) -> list[build.QueryVariable]:
    info = "lm_telemetry_run_info"
    chosen = 'run_id=~"$run_id"'
    variables = [_variable("run_id", info), _variable("rank", f"{info}{{{chosen}}}")]
    if layers:
        variables.append(_variable("stack", f"{layers}{{{chosen}}}", multi=False))
        variables.append(_variable("layer", f'{layers}{{{chosen}, stack=~"$stack"}}'))
    if sites:
        site = _variable("site", f'{layers}{{{chosen}, stack=~"$stack"}}', multi=False)
        variables.append(site.current(model.VariableOption(text="resid", value="resid")))
    return variables


def _variable(name: str, metric: str, *, multi: bool = True) -> build.QueryVariable:
    """A label's values to choose from: several or all of them, or one, the first unless chosen."""
    variable = (
        build.QueryVariable(name)
        .label(_LABELS[name])
        .datasource(SOURCE)
        .query(f"label_values({metric}, {name})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(
            model.VariableSort.NUMERICAL_ASC
            if name in {"rank", "layer"}
            else model.VariableSort.ALPHABETICAL_CASE_INSENSITIVE_ASC
        )
        .multi(multi)
    )
    return variable.include_all(True).all_value(".*") if multi else variable
