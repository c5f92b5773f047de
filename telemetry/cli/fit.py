"""`lmt fit`: power laws through the loss of a run, or through the losses that runs ended with."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from lm_telemetry.cli import output
from lm_telemetry.cli.asking import asking
from lm_telemetry.meant import require_runs

if TYPE_CHECKING:
    import argparse

    from lm_telemetry.queries.fits import Estimate, Fit


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its two kinds."""
    parser = commands.add_parser(
        "fit",
        help="fit a power law to the loss of a run, or of runs",
        description="Fit E + A x^-a to the loss of a run, or E + A N^-a + B D^-b to the losses that runs ended with;"
        " with 95 % intervals, and a word where a bound of the search decided.",
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    loss = kinds.add_parser("loss", help="the course of one run", description="Fit the course of one run's loss.")
    loss.add_argument("run_id", metavar="RUN", help="name of the run")
    loss.add_argument("--against", choices=("tokens", "step"), default="tokens", help="default: %(default)s")
    loss.add_argument(
        "--first-step",
        type=int,
        metavar="N",
        help="where the curve begins (default: where the learning rate has first been highest)",
    )
    loss.set_defaults(run=run_loss)
    scaling = kinds.add_parser("scaling", help="the last losses of runs", description="Fit the last losses of runs.")
    scaling.add_argument("runs", nargs="*", metavar="RUN", help="names of the runs that count (default: all)")
    scaling.add_argument(
        "--against",
        choices=("both", "n_parameters", "tokens"),
        default="both",
        help="parameters, tokens, or both (default: %(default)s)",
    )
    scaling.set_defaults(run=run_scaling)
    for kind in (loss, scaling):
        kind.add_argument(
            "--exponents",
            nargs=2,
            type=float,
            metavar=("LOW", "HIGH"),
            help="where exponents are searched for (default: 0.01 3)",
        )
        output.add_options(kind)


def run_loss(arguments: argparse.Namespace) -> int:
    """Fit and print; StoreError if there is no such run, FitError if there is nothing to fit."""
    from lm_telemetry.queries.fit_runs import fit_loss_curve

    with asking(arguments.store) as connection:
        require_runs(connection, [arguments.run_id])
        fit = fit_loss_curve(
            connection,
            arguments.run_id,
            against=arguments.against,
            first_step=arguments.first_step,
            bounds=_bounds(arguments, "a"),
        )
    return _write(fit, ("E", "A", "a"), arguments)


def run_scaling(arguments: argparse.Namespace) -> int:
    """Fit and print; StoreError if there is no such run, FitError if there is nothing to fit."""
    from lm_telemetry.queries.fit_runs import fit_scaling

    names = ("E", "A", "B", "a", "b") if arguments.against == "both" else ("E", "A", "a")
    with asking(arguments.store) as connection:
        require_runs(connection, arguments.runs)
        fit = fit_scaling(
            connection,
            against=arguments.against,
            runs=arguments.runs or None,
            bounds=_bounds(arguments, *(name for name in names if name.islower())),
        )
    return _write(fit, names, arguments)


def _bounds(arguments: argparse.Namespace, *names: str) -> dict[str, tuple[float, float]] | None:
    return None if arguments.exponents is None else dict.fromkeys(names, tuple(arguments.exponents))


def _write(fit: Fit, names: tuple[str, ...], arguments: argparse.Namespace) -> int:
    import duckdb
    import pyarrow as pa

    rows = [{"parameter": name, **_row(getattr(fit, name))} for name in names]
    columns: dict[str, pa.DataType] = {
        "parameter": pa.string(),
        **dict.fromkeys(_NUMBERS, pa.float64()),
        "at_bound": pa.string(),
    }
    if arguments.format == "table":
        rows = [row | {name: _digits(row[name]) for name in _NUMBERS} for row in rows]
        columns |= dict.fromkeys(_NUMBERS, pa.string())
    else:
        columns |= {"n": pa.int64(), "dropped": pa.int64(), "residual": pa.float64(), "r_squared": pa.float64()}
        columns |= {"converged": pa.bool_()}
        rows = [row | {name: getattr(fit, name) for name in columns if name not in row} for row in rows]
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns))
    with duckdb.connect() as memory:
        output.write(memory.from_arrow(table), arguments)
    print(
        f"lmt: {fit.n} points, {fit.dropped} dropped; residual {fit.residual:.3g}, R^2 {fit.r_squared:.4f}",
        file=sys.stderr,
    )
    if fit.at_bound:
        print(
            f"lmt: {', '.join(fit.at_bound)} at a bound of the search, and the rest is what it is given that",
            file=sys.stderr,
        )
    if not fit.converged:
        print("lmt: the search did not come to rest", file=sys.stderr)
    return 0


_NUMBERS = ("value", "stderr", "gauss_newton_stderr", "bound_share", "low", "high")
"""In this order: of a box that is too wide the middle is left out."""


def _digits(number: float | None) -> str | None:
    return None if number is None else f"{number:.5g}"


def _row(estimate: Estimate) -> dict[str, Any]:
    """Its columns; what could not be told is NULL."""
    numbers = {name: getattr(estimate, name) for name in _NUMBERS}
    return {name: None if math.isnan(v) else v for name, v in numbers.items()} | {"at_bound": estimate.at_bound}
