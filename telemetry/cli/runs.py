"""`lmt runs`: which runs are in the store and how far they got, from the view `overview`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.cli import output

if TYPE_CHECKING:
    import argparse

_SHORT = """
    SELECT run_id, model_class AS model, n_parameters AS parameters, attempts, ranks,
        strftime(began, '%Y-%m-%d %H:%M') AS began_utc, last_step, round(last_loss, 4) AS last_loss, tokens,
        CAST(round(100 * telemetry_share, 2) AS VARCHAR) || ' %' AS telemetry
    FROM overview
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "runs", help="list the runs in the store", description="List the runs in the store and how far they got."
    )
    output.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print; the box is rounded for people, the other formats are the view `overview` as it is."""
    from lm_telemetry.queries import connect

    connection = connect(arguments.store)
    output.write(connection.sql(_SHORT if arguments.format == "table" else "FROM overview"), arguments)
    return 0
