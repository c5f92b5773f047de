"""`lmt upload SPOOL URL`: bring to a remote store what runs have left in the spool.

A run that ends while its remote store does not answer leaves rows in the spool, and says so in an event. The next run
with that spool takes them along; this does it without one. It may be interrupted and called again, beside live runs,
too: their rows are left to them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lm_telemetry.cli.output import size
from lm_telemetry.errors import StoreError
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    import argparse

    from lm_telemetry.uploader import UploadStats

PATIENCE_SECONDS = 60.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "upload",
        help="bring to a remote store what runs have left in the spool",
        description="Bring to a remote store what runs have left in the spool; files go from there as they arrive.",
    )
    parser.add_argument("spool", metavar="SPOOL", help="the setting `spool` of the runs, or a directory in it")
    parser.add_argument("url", metavar="URL", help="the setting `store` of the runs")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_SECONDS,
        metavar="SECONDS",
        help="how long to go on while nothing arrives (default: %(default).0f)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what arrived; StoreError if anything did not."""
    from lm_telemetry.remote import is_url
    from lm_telemetry.spool import upload_spool

    if not is_url(arguments.url):
        raise StoreError(f"expected an URL, like s3://bucket/path; got {arguments.url}", path=arguments.url)
    is_shown = sys.stderr.isatty()
    try:
        stats = upload_spool(
            arguments.spool, arguments.url, seconds=arguments.patience, progress=_show if is_shown else None
        )
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr)
    if stats.parts or not stats.busy:
        print(one_line(f"{stats.parts} files, {size(stats.bytes)}, went to {arguments.url}; nothing else is left"))
    if stats.busy:
        print(f"rows of {stats.busy} ranks are brought by the processes that write them")
    return 0


def _show(stats: UploadStats) -> None:
    waiting = f"{stats.waiting_parts} files, {size(stats.waiting_bytes)}, wait"
    print(f"\r\x1b[K{stats.parts} files, {size(stats.bytes)}, arrived; {waiting}", end="", file=sys.stderr, flush=True)
