"""`lmt report [RUN ...]`: one offline HTML file about a run, or about several side by side.

The file is written beside its place and then renamed, so that a reader never sees half of it. One report may replace
another; anything else that stands in the place is left alone unless `--force` says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.cli.asking import asking
from lm_telemetry.errors import StoreError
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lm_telemetry.queries import Connection


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="write a report of runs as one offline HTML file",
        description="Write a report of a run as one HTML file that needs no network: the verdict first, then figures,"
        " each with the SQL that made it. Several runs are laid over each other.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of runs (default: the one that began last)")
    parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace FILE even if it is no report")
    output.add_store(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file and print its path and size; StoreError if there is no such run, or no such file may be made."""
    target = Path(arguments.output)
    require_place(target, force=arguments.force)
    print(one_line(f"{target}: {output.size(write(arguments.store, arguments.runs, target))}"))
    return 0


def write(store: str, runs: Sequence[str], target: Path) -> int:
    """Put the report of `runs` (none: the one that began last) of the store at `target`; its size in bytes.

    Raises:
        StoreError: there is no such run, or no such file may be made.
    """
    from lm_telemetry.exporters.report.page import page
    from lm_telemetry.exporters.report.reading import read

    with asking(store) as connection:
        names = list(dict.fromkeys(runs)) or [_newest(connection)]
        report = read(connection, names, store_name=Path(store).name or store)
    content = page(report).encode("utf-8", "replace")
    _put(target, content)
    return len(content)


def _newest(connection: Connection) -> str:
    from lm_telemetry.meant import newest_run

    name = newest_run(connection)
    if name is None:
        raise StoreError("the store has no run to report on", path=connection.snapshot.base)
    return name


def require_place(target: Path, *, force: bool) -> None:
    """StoreError if something stands in the place that is no report; before any work is done."""
    from lm_telemetry.exporters.report.page import is_page

    if target.is_dir():
        raise StoreError(f"{target} is a directory; give a file with -o", path=str(target))
    if force or not target.exists():
        return
    try:
        with target.open("rb") as file:
            beginning = file.read(1024).decode("utf-8", "replace")
    except OSError as error:
        raise _unwritable(target, error) from error
    if not is_page(beginning):
        raise StoreError(
            f"{target} is there already and is no report; give another -o, or --force to replace it", path=str(target)
        )


def _put(target: Path, content: bytes) -> None:
    """Write a file so that its place holds the old or the new at every moment; through a link, what it points to."""
    from lm_telemetry.durable import put_file

    try:
        put_file(target.resolve(), lambda file: file.write(content))
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> StoreError:
    return StoreError(f"cannot write {target}: {error.strerror}; give another -o", path=str(target))
