"""`lmt watch [RUN]`: a live view of a run in the terminal, also over ssh.

`q` or Ctrl-C ends it. Into a pipe, on a terminal that cannot be drawn on, or with `--once`, it prints one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.cli.asking import asking
from lm_telemetry.meant import require_runs

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from datetime import datetime

    from lm_telemetry.exporters.watch.reading import Reading
    from lm_telemetry.queries import Connection


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "watch",
        help="watch a run in the terminal",
        description="A live view of a run: how far it is, whether it is well, its loss, its layers, its newest events. "
        "`q` ends it.",
    )
    parser.add_argument("run_id", nargs="?", metavar="RUN", help="name of the run (default: the one that began last)")
    parser.add_argument("--once", action="store_true", help="print one frame; so it is where the output is no terminal")
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="between looks (default: %(default)g)"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="rank that is shown (default: %(default)s)")
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="step at which the run is to end, if it did not tell"
    )
    output.add_store(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Watch, or print one frame."""
    from lm_telemetry.exporters.watch.screen import Screen

    with asking(arguments.store) as connection:
        if arguments.run_id is not None:
            require_runs(connection, [arguments.run_id])
        look = _looking(connection, arguments)
        screen = Screen(look, every=arguments.every, max_steps=arguments.max_steps, store=str(arguments.store))
        if arguments.once or not screen.is_live:
            screen.once()
        else:
            screen.watch()
    return 0


def _looking(connection: Connection, arguments: argparse.Namespace) -> Callable[[], Reading]:
    """A function that looks at the run; at the first that comes, while there is none."""
    from lm_telemetry.exporters.watch.reading import Reading, Watcher
    from lm_telemetry.meant import newest_run

    watcher: Watcher | None = None

    def look() -> Reading:
        nonlocal watcher
        if watcher is None:
            run_id = arguments.run_id or newest_run(connection)
            if run_id is None:
                return Reading(run_id=None, answers={})
            is_live = _life(arguments.store, run_id)
            watcher = Watcher(connection, run_id, rank=arguments.rank, is_live=is_live)
        return watcher.look()

    return look


def _life(store: str, run_id: str) -> Callable[[datetime | None], bool]:
    """Whether the run is being written, from the time of its last row, UTC."""
    from datetime import UTC

    from lm_telemetry.liveness import life_of

    is_live = life_of(store)
    return lambda last: is_live(run_id, 0.0 if last is None else last.replace(tzinfo=UTC).timestamp())


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds < float("inf"):
        raise ValueError(text)
    return seconds
