"""`lmt views [NAME]`: the questions that have a view, or one of them with its columns, source and SQL.

With `--dialect`, the statements that make the views, and the tables they read, on an engine for many machines.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.cli.output import add_store
from lm_telemetry.errors import QueryError

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "views",
        help="list the questions that have a view",
        description="List the views with the questions they answer; with NAME, show its columns, source and SQL. With"
        " --dialect, write the statements that make them, and the tables they read, on another engine.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the view to show")
    parser.add_argument("--dialect", metavar="ENGINE", help="spark or trino")
    parser.add_argument(
        "--location",
        metavar="URL",
        help="where that engine finds the store, s3a://bucket/store say (default: its path)",
    )
    add_store(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print; QueryError if there is no such view or dialect."""
    from lm_telemetry.queries.view import list_views

    if arguments.dialect is not None:
        print(_script(arguments))
        return 0
    if arguments.location is not None:
        raise QueryError("--location goes with --dialect: DuckDB finds the store by --store")
    views = {view.name: view for view in list_views()}
    if arguments.name is None:
        width = max(map(len, views))
        for view in views.values():
            print(f"{view.name:<{width}}  {view.question}")
        return 0
    if arguments.name not in views:
        raise QueryError(f"there is no view {arguments.name!r}; there are {', '.join(views)}")
    view = views[arguments.name]
    print(f"{view.header}\n{view.sql}")
    return 0


def _script(arguments: argparse.Namespace) -> str:
    from lm_telemetry.catalogue import TABLES
    from lm_telemetry.queries.dialect_script import script

    store = Path(arguments.store).absolute()
    # Of a store that is elsewhere nothing can be seen here; it is taken to have all tables.
    present = [table for table in TABLES if (store / table).is_dir()] if store.is_dir() else TABLES
    names = None if arguments.name is None else [arguments.name]
    return script(arguments.dialect, arguments.location or str(store), names, present=present)
