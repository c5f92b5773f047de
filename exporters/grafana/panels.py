"""Panels in one style: words and colours for verdicts, lines for runs, maps for layers, bars, tables.

Decisions:

- A verdict takes its colour from thresholds that lie between its minimum and maximum, and says in words what a number
  cannot: NaN, or that nothing was captured.
- A model of 32 layers is a map (layer by time, colour for the value), not 32 lines.
- A line connects what sparse captures leave apart; gauges hold their last value, so a flat line means no new capture.
- Loss, norms and ratios have logarithmic axes: what matters there are factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models import prometheus as prom

from lm_telemetry.exporters.grafana.promql import Query, described

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GREEN, ORANGE, RED, BLUE, GRAY = "green", "orange", "red", "blue", "#808080"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
NOT_CAPTURED = "not captured"

Steps = tuple[tuple[float | None, str], ...]
"""Thresholds: from each value on, its colour; the first holds from below."""

_EVERYTHING = -1e30
"""Cells of a map that are smaller are left out; by default all that are not positive are."""


def verdict(
    title: str,
    about: str,
    expr: str,
    *,
    now: bool = False,
    steps: Steps = ((None, BLUE),),
    bounds: tuple[float, float] | None = None,
    unit: str = "short",
    words: Mapping[int, str] | None = None,
    decimals: int | None = None,
    nan: str = "NaN",
) -> stat.Panel:
    """One value in words and colour.

    Args:
        title: what is judged.
        about: how to read it.
        expr: PromQL of one series without labels.
        now: whether to show its value at the end of the chosen time, and not its last one within.
        steps: thresholds; none, and blue, for what is neither good nor bad.
        bounds: with thresholds, the smallest and largest value that colours tell apart.
        unit: Grafana's unit.
        words: what to say for a value.
        decimals: digits after the point; None for as many as fit.
        nan: what to say for NaN.
    """
    query = Query(expr=expr, now=now)
    panel = (
        stat.Panel()
        .title(title)
        .description(described(about, query))
        .datasource(SOURCE)
        .with_target(_target(query))
        .span(4)
        .height(4)
        .unit(unit)
        .thresholds(_thresholds(steps))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .mappings(_words(words or {}, steps, nan))
        .no_value(NOT_CAPTURED)
        .color_mode(options.BigValueColorMode.BACKGROUND)
        .graph_mode(options.BigValueGraphMode.NONE)
        .text_mode(options.BigValueTextMode.VALUE)
        .justify_mode(options.BigValueJustifyMode.CENTER)
        # the last value, be it NaN: `lastNotNull` would pass over it
        .reduce_options(common.ReduceDataOptions().calcs(["last"]))
    )
    if bounds is not None:
        panel = panel.min(bounds[0]).max(bounds[1])
    return panel if decimals is None else panel.decimals(decimals)


def lines(
    title: str,
    about: str,
    *queries: Query,
    unit: str = "short",
    log: bool = False,
    steps: Steps = (),
    bounds: tuple[float | None, float | None] = (None, None),
    stacked: bool = False,
    span: int = 8,
) -> timeseries.Panel:
    """Series over time; `steps` are drawn as dashed lines, and `bounds` are shown unless values lie beyond them."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(described(about, *queries))
        .datasource(SOURCE)
        .targets([_target(query, chr(ord("A") + index)) for index, query in enumerate(queries)])
        .span(span)
        .height(8)
        .unit(unit)
        .no_value(NOT_CAPTURED)
        .mappings(_words({}, (), "NaN"))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .draw_style(options.GraphDrawStyle.LINE)
        .line_width(1)
        .fill_opacity(40 if stacked else 0)
        .show_points(options.VisibilityMode.AUTO)
        .span_nulls(True)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(options.LegendDisplayMode.TABLE)
            .placement(options.LegendPlacement.BOTTOM)
            .calcs(["last", "min", "max"])
        )
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    )
    if log:
        panel = panel.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if steps:
        panel = panel.thresholds(_thresholds(steps)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED)
        )
    low, high = bounds
    if low is not None:
        panel = panel.axis_soft_min(low)
    return panel if high is None else panel.axis_soft_max(high)


def layer_map(
    title: str,
    about: str,
    expr: str,
    *,
    unit: str = "short",
    bounds: tuple[float | None, float | None] = (None, None),
    scheme: str = "Viridis",
    reverse: bool = False,
) -> heatmap.Panel:
    """Layers by time, the value as colour.

    Args:
        title: what is drawn.
        about: how to read it.
        expr: PromQL with a series per value of the label `layer`, which are numbers: rows are sorted by them.
        unit: Grafana's unit.
        bounds: values at the ends of the colour scale; None for those of the data.
        scheme: Grafana's colour scheme.
        reverse: whether its colours go the other way.
    """
    query = Query(expr=expr, legend="{{layer}}")
    colour = heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme(scheme).steps(64).reverse(reverse)
    low, high = bounds
    if low is not None:
        colour = colour.min(low)
    if high is not None:
        colour = colour.max(high)
    return (
        heatmap.Panel()
        .title(title)
        .description(described(about, query))
        .datasource(SOURCE)
        .with_target(_target(query))
        .span(8)
        .height(8)
        .unit(unit)
        .no_value(NOT_CAPTURED)
        .calculate(False)
        .color(colour)
        .cell_gap(0)
        .cell_values(heatmap.CellValues().unit(unit))
        .filter_values(heatmap.FilterValueRange().le(_EVERYTHING))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(options.HeatmapCellLayout.AUTO).value(title))
        .y_axis(heatmap.YAxisConfig().unit("none").axis_placement(options.AxisPlacement.LEFT).axis_label("layer"))
        .show_legend()
        .mode(options.TooltipDisplayMode.SINGLE)
        .show_color_scale(True)
    )


def bars(title: str, about: str, query: Query) -> bargauge.Panel:
    """The last value of each series as a bar; the longest fills its row."""
    return (
        bargauge.Panel()
        .title(title)
        .description(described(about, query))
        .datasource(SOURCE)
        .with_target(_target(query))
        .span(8)
        .height(8)
        .unit("short")
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.FIXED).fixed_color(BLUE))
        .mappings(_words({}, (), "NaN"))
        .no_value(NOT_CAPTURED)
        .orientation(options.VizOrientation.HORIZONTAL)
        .display_mode(options.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["last"]))
    )


def states(
    title: str, about: str, query: Query, *, words: Mapping[int, str], steps: Steps, bounds: tuple[float, float]
) -> statetimeline.Panel:
    """A few states over time, in words and colours."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(described(about, query))
        .datasource(SOURCE)
        .with_target(_target(query))
        .span(8)
        .height(8)
        .unit("none")
        .min(bounds[0])
        .max(bounds[1])
        .thresholds(_thresholds(steps))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .mappings(_words(words, steps, "NaN"))
        .no_value(NOT_CAPTURED)
        .merge_values(True)
        .show_value(options.VisibilityMode.AUTO)
        .row_height(0.8)
    )


def rows(
    title: str,
    about: str,
    queries: Mapping[str, Query],
    *,
    units: Mapping[str, str] | None = None,
    hidden: Sequence[str] = (),
    height: int = 8,
    empty: str = NOT_CAPTURED,
) -> table.Panel:
    """A table as of the end of the chosen time: a row per set of labels, a column per query.

    Args:
        title: what is listed.
        about: how to read it.
        queries: by the head of their column.
        units: Grafana's units by head of column.
        hidden: labels that are no column.
        height: of the panel, in rows of the grid.
        empty: what to say if there are no rows.
    """
    asked = list(queries.values())
    refs = dict(zip("ABCDEFGH", queries, strict=False))
    values = {f"Value #{ref}" if len(asked) > 1 else "Value": head for ref, head in refs.items()}
    panel = (
        table.Panel()
        .title(title)
        .description(described(about, *asked))
        .datasource(SOURCE)
        .targets([_target(query, ref, rows=True) for ref, query in zip(refs, asked, strict=True)])
        .span(24)
        .height(height)
        .unit("short")
        .no_value(empty)
        .mappings(_words({}, (), "NaN"))
        .with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            model.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": dict.fromkeys(["Time", "__name__", "instance", "job", *hidden], True),
                    "renameByName": values,
                },
            )
        )
    )
    for head, unit in (units or {}).items():
        panel = panel.override_by_name(head, [model.DynamicConfigValue(id_val="unit", value=unit)])
    return panel


def _target(query: Query, ref: str = "A", *, rows: bool = False) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(ref).expr(query.expr).editor_mode(prom.QueryEditorMode.CODE)
    if query.legend:
        target = target.legend_format(query.legend)
    target = target.format(prom.PromQueryFormat.TABLE if rows else prom.PromQueryFormat.TIME_SERIES)
    return target.instant() if rows or query.now else target.range()


def _thresholds(steps: Steps) -> build.ThresholdsConfig:
    return (
        build.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=color) for value, color in steps])
    )


def _words(words: Mapping[int, str], steps: Steps, nan: str) -> list[Any]:
    """Mappings of values to words: `words` in the colours of `steps`, NaN, and what was never captured."""
    mappings: list[Any] = []
    if words:
        mappings.append(
            model.ValueMap(
                options={
                    str(value): model.ValueMappingResult(text=text, color=_colour(value, steps), index=index)
                    for index, (value, text) in enumerate(words.items())
                }
            )
        )
    for index, (match, text, colour) in enumerate(
        (
            (model.SpecialValueMatch.NA_N, nan, RED if nan == "NaN" else GRAY),
            (model.SpecialValueMatch.NULL, NOT_CAPTURED, GRAY),
        ),
        start=len(words),
    ):
        result = model.ValueMappingResult(text=text, color=colour, index=index)
        mappings.append(
            model.SpecialValueMap(options=model.DashboardSpecialValueMapOptions(match=match, result=result))
        )
    return mappings


def _colour(value: int, steps: Steps) -> str:
    return [colour for start, colour in steps if start is None or start <= value][-1]
