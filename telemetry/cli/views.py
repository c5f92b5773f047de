"""`lmt views [NAME]`: the questions that have a view, or one of them with its columns, source and SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.errors import QueryError

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "views",
        help="list the questions that have a view",
        description="List the views with the questions they answer; with NAME, show its columns, source and SQL.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the view to show")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print; QueryError if there is no such view."""
    from lm_telemetry.queries.view import list_views

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
