"""The pathways of the probe sentence: which heads and positions its last token came through, drawn over its tokens."""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.asking import on_rank_0
from lm_telemetry.exporters.report.model import Edge, Figure, Pathways
from lm_telemetry.exporters.report.words import percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source
    from lm_telemetry.exporters.report.model import Array

EDGES = 250
"""Edges that are drawn, those of largest share."""


def pathway_figures(source: Source) -> Iterator[Figure | str]:
    """A figure for each run, and a sentence for the runs that have none."""
    captured = set()
    for run, run_id in enumerate(source.run_ids):
        for figure in _pathways(source, run, run_id):
            captured.add(run_id)
            yield figure
    yield from source.absent(captured, "pathways were", "instrument `pathways`")


def _pathways(source: Source, run: int, run_id: str) -> Iterator[Figure]:
    sql = f"""WITH routes AS (
    SELECT
        step, to_position, share, string_split(route, ' > ') AS edges, string_split(positions, ' > ') AS places
    FROM pathways
    WHERE {on_rank_0(run_id)} AND sequence = 0
        AND stack = ({_stack(run_id)})
    QUALIFY to_position = max(to_position) OVER ()
),
passed AS (
    SELECT
        step, to_position, share, string_split(edges[i], '.') AS edge,
        CAST(places[i] AS INTEGER) AS query, CAST(places[i + 1] AS INTEGER) AS key
    FROM routes, unnest(range(1, len(edges) + 1)) AS t(i)
)
SELECT
    step, to_position, CAST(edge[1] AS INTEGER) AS layer, coalesce(TRY_CAST(edge[2] AS INTEGER), -1) AS head,
    query, key, sum(share) AS share
FROM passed
GROUP BY ALL
ORDER BY share DESC, layer, head, query, key
LIMIT {EDGES}"""
    found = source.columns(sql)
    if not len(found["step"]):
        return
    step, target = int(found["step"][0]), int(found["to_position"][0])
    names = ("layer", "head", "query", "key", "share")
    edges = tuple(
        Edge(layer=int(layer), head=int(head), query=int(query), key=int(key), share=float(share))
        for layer, head, query, key, share in zip(*(found[name] for name in names), strict=True)
    )
    tokens = _tokens(source, run_id, int(max(found["query"].max(), found["key"].max())) + 1)
    yield Figure(
        id=source.figure_id("pathways", run_id),
        section="Attention",
        title="Pathways of the probe sentence",
        caption=f"The 100 strongest routes by which position {target} at the top came from the input, at step"
        f" {step:,}; together they bring {_brought(found)} of what arrives there. A line is what a head moved from one"
        " position to another in a layer, or what stayed in place, and its width the share of the target that came"
        " along it. It tells how much was written, not what that did (arXiv 2005.00928, 2004.10102).",
        body=Pathways(
            tokens=tokens, layers=int(found["layer"].max()) + 1, target=target, edges=edges, run=run, step=step
        ),
        sql=sql,
    )


def _brought(found: dict[str, Array]) -> str:
    """Share of the target that all routes bring: that of the edges of the top layer, which each passes once."""
    return percent(float(found["share"][found["layer"] == found["layer"].max()].sum()))


def _stack(run_id: str) -> str:
    """The query for the tower that is drawn."""
    return f"SELECT min(stack) FROM edges WHERE {on_rank_0(run_id)}"


def _tokens(source: Source, run_id: str, least: int) -> tuple[str, ...]:
    """The text of each position, at least `least` of them; its token's id or its own number where it has none."""
    sql = f"""SELECT position, coalesce(text, 'id ' || token_id) AS text
FROM probe
WHERE {on_rank_0(run_id)} AND sequence = 0 AND stack = ({_stack(run_id)})
QUALIFY attempt = max(attempt) OVER ()"""
    texts = {row["position"]: row["text"] for row in source.rows(sql)}
    length = max(least, max(texts, default=-1) + 1)
    return tuple(texts.get(position, str(position)) for position in range(length))
