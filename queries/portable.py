"""The part of DuckDB's SQL that means the same on Spark and Trino, and the check that a view keeps to it.

A view is held to an allow-list of constructs and functions, since the list of what differs has no end: what a
translator does not know it passes on as it is, and what it knows it may turn into an approximation without a word.
Some of what is allowed takes a rule of ours to come out right (`dialect`). The rest of the subset is a matter of care:

- 32-bit floats are cast to DOUBLE before arithmetic;
- ties in `max_by` are broken by its second argument;
- NaN is the largest number in DuckDB and Spark, while on Trino every comparison with it is false: say `isnan`;
- `corr` and the `regr_` family of a constant are NaN in DuckDB and NULL elsewhere: do not compare with them alone.

Left out: checking types, for which the engines themselves are better (tests run every view on Spark).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lm_telemetry.catalogue import PARTITIONS, TABLES, columns
from lm_telemetry.errors import QueryError
from lm_telemetry.queries.view import list_views

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlglot import exp

_STRUCTURE = (
    "Alias Case CTE Column Distinct Filter From Group Having Identifier If Join Literal Null Order Ordered Paren Select"
    " Star Subquery Table TableAlias Tuple Union Where Window WindowSpec With Boolean DataType Cast Exists"
)
_OPERATORS = "Add And Between Div EQ GT GTE In Is LT LTE Mul NEQ Neg Not Or Sub"
_SCALARS = (
    "Abs Coalesce Concat ConcatWs Exp Floor Ceil Greatest IsNan Least Ln Log Nullif Pow Round Sign Sqrt"
    " Anonymous"  # by its name
)
_AGGREGATES = (
    "ArgMax ArgMin Avg Corr Count CovarPop CovarSamp LogicalAnd LogicalOr Max Median Min PercentileCont RegrSlope"
    " RegrSxx RegrSxy RegrSyy Stddev StddevPop StddevSamp Sum Variance VariancePop"
)
_RANKINGS = "DenseRank FirstValue Lag LastValue Lead Rank RowNumber"
_ALLOWED = frozenset(f"{_STRUCTURE} {_OPERATORS} {_SCALARS} {_AGGREGATES} {_RANKINGS}".split())

LIST_COSINE = "list_cosine_similarity"
"""The one function of lists."""

_TYPES = frozenset({"BIGINT", "BOOLEAN", "DOUBLE", "INT", "TEXT", "TIMESTAMP", "VARCHAR"})
_INTEGERS = frozenset({"BIGINT", "INT"})
_WHOLE = frozenset({"Sum", "Count", "Round", "Floor", "Ceil", "Null"})
"""What may be cast to an integer: DuckDB rounds where Spark cuts off."""

_NO_LISTS = "lists are beyond the subset: use list_cosine_similarity, or tables"
_ADVICE = {
    "AnyValue": "any row may be taken: use max, or max_by with an argument that breaks ties",
    "Array": _NO_LISTS,
    "Bracket": _NO_LISTS,
    "Comprehension": _NO_LISTS,
    "ApproxDistinct": "each engine approximates differently: use count(DISTINCT x)",
    "CountIf": "use count(CASE WHEN ... THEN 1 END)",
    "First": "any row may be taken: use max, or max_by with an argument that breaks ties",
    "IgnoreNulls": "use max_by, or number the rows first",
    "IntDiv": "use floor(a / b)",
    "Lambda": _NO_LISTS,
    "Lateral": "Trino has fewer of them: use a CTE",
    "Mod": "by zero it is an error on Spark and Trino: use a - b * floor(a / b)",
    "Quantile": "use quantile_cont(x, q) with one number q",
    "Qualify": "use a CTE and WHERE",
    "Skewness": "Spark's is another one: use sums of powers",
    "WithinGroup": "Spark approximates it without a word: use quantile_cont(x, q)",
}


def parse(name: str, sql: str) -> exp.Query:
    """The syntax tree of a portable SELECT.

    Args:
        name: what to call it in an error.
        sql: one SELECT in DuckDB's SQL.

    Raises:
        QueryError: sqlglot is not installed; the text is not one SELECT; or something in it is outside the subset:
            `.args[0]` lists all of it, each with what to write instead.
    """
    return _checked(name, sql).copy()


@cache
def _checked(name: str, sql: str) -> exp.Query:
    tree = _tree(name, sql)
    complaints = dict.fromkeys(_complaints(tree)) or dict.fromkeys(_unknown_names(tree))
    if complaints:
        raise QueryError(
            f"{name} is outside the SQL that DuckDB, Spark and Trino agree on: {'; '.join(complaints)}"
            " (the subset: lm_telemetry.queries.portable)"
        )
    return tree


def _tree(name: str, sql: str) -> exp.Query:
    try:
        import sqlglot
        from sqlglot import exp
    except ImportError as error:
        raise QueryError(
            "other dialects take sqlglot, which is not installed: pip install 'lm-telemetry[dialects]'"
        ) from error
    try:
        trees = sqlglot.parse(sql, read="duckdb")
    except sqlglot.errors.SqlglotError as error:
        raise QueryError(f"{name} is not SQL: {error}") from error
    tree = trees[0] if len(trees) == 1 else None
    if not isinstance(tree, exp.Query):
        raise QueryError(f"{name} is not one SELECT")
    return tree


def names_of_ctes(tree: exp.Query) -> dict[str, list[str]]:
    """The names of the columns of each CTE, with `*` expanded."""
    from sqlglot import exp

    return {cte.alias: cte.this.named_selects for cte in _qualified(tree).find_all(exp.CTE)}


def _qualified(tree: exp.Query) -> exp.Expr:
    """The query with each column's table named and `*` expanded (SqlglotError if there is no such column)."""
    from sqlglot.optimizer.qualify import qualify

    return qualify(tree.copy(), schema=_known_columns(), dialect="trino", expand_alias_refs=False)


def _unknown_names(tree: exp.Query) -> Iterator[str]:
    """Columns that the tables in FROM do not have, as Trino sees it."""
    from sqlglot.errors import SqlglotError

    try:
        _qualified(tree)
    except SqlglotError as error:
        yield (
            f"{str(error).partition('. Line')[0]}: it is no column of what is in FROM, and only ORDER BY may name what"
            " the same SELECT defines"
        )


@cache
def _known_columns() -> dict[str, object]:
    """Tables and views with their columns; types do not matter here."""
    known = {table: [*PARTITIONS, *(m.name for m in columns(table))] for table in TABLES}
    known |= {view.name: [column.name for column in view.columns] for view in list_views()}
    return {name: dict.fromkeys(names, "DOUBLE") for name, names in known.items()}


def _complaints(tree: exp.Query) -> Iterator[str]:
    """What is outside the subset, in words."""
    for node in tree.walk():
        kind = type(node).__name__
        if kind not in _ALLOWED:
            advice = _ADVICE.get(kind, "neither tested nor translated; if all three have it, add it to the list")
        else:
            advice = next(_details(kind, node), "")
        if advice:
            text = node.sql("duckdb")
            yield f"`{text if len(text) <= 60 else f'{text[:57]}...'}`: {advice}"


def _details(kind: str, node: exp.Expr) -> Iterator[str]:  # noqa: C901 a table of cases
    """What is wrong with a node whose kind is allowed."""
    from sqlglot import exp

    match kind:
        case "Anonymous" if node.name.lower() != LIST_COSINE:
            yield "no such function on the other engines, as far as is known"
        case "ArgMax" | "ArgMin" if node.args.get("count"):
            yield _NO_LISTS
        case "Star" if node.args.get("except_") or node.args.get("replace") or node.args.get("rename"):
            yield "name the columns"
        case "Join" if node.args.get("method") or node.args.get("kind") in {"SEMI", "ANTI"}:
            yield "use a plain join, or EXISTS"
        case "Select" if node.args.get("qualify"):
            yield _ADVICE["Qualify"]
        case "Distinct" if node.args.get("on"):
            yield "number the rows in a CTE, and keep the first"
        case "Group" if any(node.args.get(a) for a in ("all", "cube", "rollup", "grouping_sets", "totals")):
            yield "name the columns to group by"
        case "Window" if isinstance(node.this, exp.Filter):
            yield "Spark has no FILTER in windows: put a CASE into the argument"
        case "PercentileCont" if not isinstance(node.expression, exp.Literal):
            yield _ADVICE["Quantile"]
        case "DataType" if node.this.name not in _TYPES and not _is_doubles(node):
            yield "types are BIGINT, BOOLEAN, DOUBLE, INTEGER, TIMESTAMP, VARCHAR, and DOUBLE[] for sketches"
        case "Cast" if node.args["to"].this.name in _INTEGERS and not _is_whole(node.this):
            yield "DuckDB rounds where Spark cuts off: put round() or floor() inside"


def _is_doubles(type_: exp.Expr) -> bool:
    return type_.this.name == "ARRAY" and all(t.this.name == "DOUBLE" for t in type_.expressions)


def _is_whole(value: exp.Expr) -> bool:
    """Whether a value is a whole number for all that can be seen."""
    kind = type(value).__name__
    if kind in {"Window", "Filter", "Paren"}:
        return _is_whole(value.this)
    if kind == "Coalesce":
        return all(_is_whole(v) for v in (value.this, *value.expressions))
    return kind in _WHOLE or (kind == "Literal" and not value.args["is_string"] and value.name.isdigit())
