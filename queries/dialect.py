"""A SELECT over the store's tables and views, in the SQL of Spark and Trino.

sqlglot translates; the rules here are for what it passes on as it is though it means something else there, or turns
into an approximation. Those for Spark are held to DuckDB by running every view on a real one; those for Trino, of which
there is none in the tests, rest on its manual.

Decisions:

- Where DuckDB follows IEEE 754 and Spark raises or says NULL (division by zero, logarithm of zero), the translation
  follows DuckDB.
- Quantiles are exact and interpolated, as `quantile_cont` is: Spark's `percentile`, and on Trino, which has only
  approximate ones, the sorted values.
- `max_by(x, y)` passes over rows without x, as in DuckDB; both others would answer NULL.

Left out, since values may be either: `corr` and the `regr_` family of a constant, NaN in DuckDB and NULL elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from lm_telemetry.errors import QueryError
from lm_telemetry.queries.portable import LIST_COSINE, names_of_ctes, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlglot import exp

    from lm_telemetry.queries.view import View

    _Rule = Callable[[exp.Expr], None]

Dialect = Literal["spark", "trino"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

_SPARK_COSINE = """
    GREATEST(LEAST(
        AGGREGATE(ZIP_WITH(:a, :b, (x, y) -> CAST(x AS DOUBLE) * CAST(y AS DOUBLE)), CAST(0 AS DOUBLE), (s, v) -> s + v)
        / NULLIF(SQRT(
            AGGREGATE(:a, CAST(0 AS DOUBLE), (s, v) -> s + CAST(v AS DOUBLE) * CAST(v AS DOUBLE))
            * AGGREGATE(:b, CAST(0 AS DOUBLE), (s, v) -> s + CAST(v AS DOUBLE) * CAST(v AS DOUBLE))
        ), 0), 1.0), -1.0)"""
_TRINO_COSINE = """
    GREATEST(LEAST(
        REDUCE(ZIP_WITH(:a, :b, (x, y) -> CAST(x AS DOUBLE) * y), CAST(0 AS DOUBLE), (s, v) -> s + v, s -> s)
        / NULLIF(SQRT(
            REDUCE(:a, CAST(0 AS DOUBLE), (s, v) -> s + CAST(v AS DOUBLE) * v, s -> s)
            * REDUCE(:b, CAST(0 AS DOUBLE), (s, v) -> s + CAST(v AS DOUBLE) * v, s -> s)
        ), 0), 1.0), -1.0)"""
_TRINO_QUANTILE = """
    ELEMENT_AT(TRANSFORM(
        ARRAY[FILTER(ARRAY_SORT(:items), v -> v IS NOT NULL)],
        s -> IF(CARDINALITY(s) > 0,
            s[CAST(FLOOR((CARDINALITY(s) - 1) * :q) AS INTEGER) + 1]
            + (s[CAST(CEIL((CARDINALITY(s) - 1) * :q) AS INTEGER) + 1]
                - s[CAST(FLOOR((CARDINALITY(s) - 1) * :q) AS INTEGER) + 1])
            * ((CARDINALITY(s) - 1) * :q - FLOOR((CARDINALITY(s) - 1) * :q)))
    ), 1)"""


def translate(query: View | str, dialect: Dialect) -> str:
    """A SELECT in the SQL of another engine.

    Raises:
        QueryError: it is outside the portable subset (`portable`), or there is no such dialect.
    """
    require_known(dialect)
    tree = parsed(query)
    from sqlglot import ErrorLevel

    rules = _RULES[dialect]
    if dialect == "trino":
        _name_columns_of_recursion(tree)
    for node in reversed(list(tree.walk())):  # what is inside comes first
        rule = rules.get(type(node).__name__)
        if rule is not None:
            rule(node)
    return tree.sql(dialect, pretty=True, unsupported_level=ErrorLevel.RAISE)


def tables_of(query: View | str) -> list[str]:
    """Tables and views that a SELECT reads, in alphabetical order (QueryError if it is outside the subset)."""
    tree = parsed(query)
    from sqlglot import exp

    own = {cte.alias for cte in tree.find_all(exp.CTE)}
    return sorted({table.name for table in tree.find_all(exp.Table)} - own)


def parsed(query: View | str) -> exp.Query:
    """The syntax tree of a view or of the text of a SELECT (QueryError if it is outside the subset)."""
    return parse("the query", query) if isinstance(query, str) else parse(f"the view {query.name}", query.sql)


def require_known(dialect: str) -> None:
    """QueryError if there is no such dialect."""
    if dialect not in DIALECTS:
        raise QueryError(f"there is no dialect {dialect!r}; there are {', '.join(DIALECTS)}")


def _fill(template: str, dialect: Dialect, **parts: exp.Expr) -> exp.Expr:
    """The template, an expression, with `:name` replaced by its part."""
    import sqlglot
    from sqlglot import exp

    tree = sqlglot.parse_one(template, read=dialect)
    return tree.transform(lambda node: parts[node.name].copy() if isinstance(node, exp.Placeholder) else node)


# Rules: each puts something else into the place of a node.


def _of_present(node: exp.Expr) -> None:
    """max_by(x, y): rows without x do not count."""
    from sqlglot import exp

    present = exp.Not(this=exp.Is(this=node.this.copy(), expression=exp.Null()))
    node.set("expression", exp.Case(ifs=[exp.If(this=present, true=node.expression.copy())]))


def _ieee_division(node: exp.Expr) -> None:
    """In doubles, and with infinities and NaN for division by zero."""
    from sqlglot import exp

    one, two = node.this, node.expression
    quotient = exp.Div(this=exp.cast(one.copy(), "double"), expression=two.copy(), typed=False, safe=False)
    if _is_nonzero(two):
        node.replace(quotient)
    else:
        template = "CASE WHEN :two = 0 THEN :one * CAST('Infinity' AS DOUBLE) ELSE :quotient END"
        node.replace(_fill(template, "spark", one=_closed(one), two=_closed(two), quotient=quotient))


def _ieee_logarithm(node: exp.Expr) -> None:
    """Of zero it is minus infinity."""
    argument = node.args.get("expression") or node.this
    if not _is_nonzero(argument):
        template = "CASE WHEN :argument = 0 THEN CAST('-Infinity' AS DOUBLE) ELSE :log END"
        node.replace(_fill(template, "spark", argument=_closed(argument), log=node))


def _is_nonzero(node: exp.Expr) -> bool:
    """Whether a value cannot be 0, for all that can be seen: a number, nullif(x, 0), CASE WHEN x > 0 THEN x END."""
    from sqlglot import exp

    match node:
        case exp.Literal():
            return float(node.name) != 0
        case exp.Nullif():
            return isinstance(node.expression, exp.Literal) and float(node.expression.name) == 0
        case exp.Paren() | exp.Cast() | exp.Abs() | exp.Sqrt() | exp.Neg():
            return _is_nonzero(node.this)
        case exp.Mul():
            return _is_nonzero(node.this) and _is_nonzero(node.expression)
        case exp.Case(args={"ifs": [exp.If(this=exp.GT() as positive, args={"true": value})], "default": None}):
            bound = positive.expression
            return positive.this == value and isinstance(bound, exp.Literal) and float(bound.name) >= 0
        case _:
            return False


def _closed(node: exp.Expr) -> exp.Expr:
    """In parentheses if it is an operation."""
    from sqlglot import exp

    return exp.Paren(this=node.copy()) if isinstance(node, exp.Binary) else node


def _is_nan(node: exp.Expr) -> None:
    """Spark's isnan says false of NULL; its NaN equals itself."""
    node.replace(_fill("(:x = CAST('NaN' AS DOUBLE))", "spark", x=_closed(node.this)))


def _percentile(node: exp.Expr) -> None:
    """The only exact quantile of Spark's that takes any q."""
    from sqlglot import exp

    node.replace(exp.Anonymous(this="PERCENTILE", expressions=[node.this.copy(), node.expression.copy()]))


def _sorted_values(node: exp.Expr) -> None:
    from sqlglot import exp

    q = node.args.get("expression") or exp.Literal.number("0.5")
    place, over = _place(node)
    items = over(exp.Anonymous(this="ARRAY_AGG", expressions=[node.this.copy()]))
    place.replace(_fill(_TRINO_QUANTILE, "trino", items=items, q=q))


def _regression_sum(node: exp.Expr) -> None:
    """The sums of squares and products as a covariance times the number of pairs."""
    from sqlglot import exp

    y, x = node.this, node.expression
    x_of_pairs = _fill("CASE WHEN :y IS NOT NULL THEN :x END", "trino", x=_closed(x), y=_closed(y))
    y_of_pairs = _fill("CASE WHEN :x IS NOT NULL THEN :y END", "trino", x=_closed(x), y=_closed(y))
    one, two = {"RegrSxx": (x, x_of_pairs), "RegrSxy": (y, x), "RegrSyy": (y, y_of_pairs)}[type(node).__name__]
    place, over = _place(node)
    covariance = over(exp.CovarPop(this=one.copy(), expression=two.copy()))
    pairs = over(exp.Count(this=x_of_pairs.copy()))
    place.replace(exp.Paren(this=exp.Mul(this=covariance, expression=pairs)))


def _place(node: exp.Expr) -> tuple[exp.Expr, Callable[[exp.Expr], exp.Expr]]:
    """What an aggregate's replacement replaces, and how to run another aggregate over the same rows."""
    from sqlglot import exp

    clause = node.parent
    if not isinstance(clause, exp.Window | exp.Filter) or clause.this is not node:
        return node, lambda aggregate: aggregate

    def over(aggregate: exp.Expr) -> exp.Expr:
        copy = clause.copy()
        copy.set("this", aggregate)
        return copy

    return clause, over


def _of_those_there(node: exp.Expr) -> None:
    """Trino's greatest and least are NULL if any argument is."""
    from sqlglot import exp

    items = exp.Array(expressions=[v.copy() for v in (node.this, *node.expressions)])
    name = {"Greatest": "ARRAY_MAX", "Least": "ARRAY_MIN"}[type(node).__name__]
    node.replace(_fill(f"{name}(FILTER(:items, v -> v IS NOT NULL))", "trino", items=items))


def _cosine(template: str, dialect: Dialect) -> _Rule:
    """list_cosine_similarity(a, b), in doubles; NULL if a list is all zeros, where DuckDB has NaN."""

    def rule(node: exp.Expr) -> None:
        if node.name.lower() == LIST_COSINE:
            a, b = node.expressions
            node.replace(_fill(template, dialect, a=a, b=b))

    return rule


def _name_columns_of_recursion(tree: exp.Query) -> None:
    """Trino wants the columns of recursive CTEs named; sqlglot does so for all of the clause, but for what `*` is."""
    from sqlglot import exp

    names = names_of_ctes(tree)
    for clause in tree.find_all(exp.With):
        for cte in clause.expressions if clause.recursive else ():
            cte.args["alias"].set("columns", [exp.to_identifier(name) for name in names[cte.alias]])


_RULES: dict[Dialect, dict[str, _Rule]] = {
    "spark": {
        "Anonymous": _cosine(_SPARK_COSINE, "spark"),
        "ArgMax": _of_present,
        "ArgMin": _of_present,
        "Div": _ieee_division,
        "IsNan": _is_nan,
        "Ln": _ieee_logarithm,
        "Log": _ieee_logarithm,
        "PercentileCont": _percentile,
    },
    "trino": {
        "Anonymous": _cosine(_TRINO_COSINE, "trino"),
        "ArgMax": _of_present,
        "ArgMin": _of_present,
        "Greatest": _of_those_there,
        "Least": _of_those_there,
        "Median": _sorted_values,
        "PercentileCont": _sorted_values,
        "RegrSxx": _regression_sum,
        "RegrSxy": _regression_sum,
        "RegrSyy": _regression_sum,
    },
}
