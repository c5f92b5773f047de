"""`lmt compact [RUN ...]`: merge the small files of runs into few sorted ones, while they are read and written.

What fails for one rank is told, and the others go on. With `--max-age-days` or `--max-bytes` whole runs are given up
first, the oldest before others, never one that is live.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.cli.output import add_store
from lm_telemetry.errors import StoreError
from lm_telemetry.meant import missing
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    import argparse

    from lm_telemetry.store import Store

GRACE_SECONDS = 600.0
"""As in `compaction`, which is not imported before it is needed."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compact",
        help="merge small files into few sorted ones",
        description="Merge the small files of runs into few sorted ones, under readers and beside live writers.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs to compact (default: all)")
    add_store(parser)
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        metavar="SECONDS",
        help="how long replaced files are kept for queries that began before (default: %(default).0f)",
    )
    parser.add_argument("--max-age-days", type=float, metavar="N", help="give up runs last written earlier than that")
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="give up the oldest runs until the store is as small"
    )
    parser.add_argument("--keep", action="append", default=[], metavar="RUN", help="a run that is never given up")
    parser.add_argument("--dry-run", action="store_true", help="only say which runs would be given up")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was done."""
    from lm_telemetry.remote import is_url
    from lm_telemetry.store import Store

    if is_url(arguments.store):
        raise StoreError(
            "only a store in a directory can be compacted, not one at an URL: copy runs that are over to a directory,"
            " compact them there with --grace 0, and copy them back, _manifests last; a larger `flush_seconds` makes"
            " fewer files to begin with",
            path=arguments.store,
        )
    store = Store(Path(arguments.store).absolute())
    if not store.path.is_dir():
        raise StoreError(f"there is no store at {store.path}; give its directory as --store", path=str(store.path))
    _prune(store, arguments)
    return 0 if arguments.dry_run or _compact(store, arguments) else 1


def _prune(store: Store, arguments: argparse.Namespace) -> None:
    if arguments.max_age_days is None and arguments.max_bytes is None:
        return
    from lm_telemetry.retention import prune

    for pruned in prune(
        store,
        max_age_days=arguments.max_age_days,
        max_bytes=arguments.max_bytes,
        keep=arguments.keep,
        grace_seconds=arguments.grace,
        dry_run=arguments.dry_run,
    ):
        word = "would give up" if arguments.dry_run else "deleted" if pruned.deleted else "gave up"
        print(one_line(f"{word} {pruned.run_id}: {pruned.bytes:,} bytes, {pruned.reason or 'too old'}"))


def _compact(store: Store, arguments: argparse.Namespace) -> bool:
    """Compact; whether nothing failed."""
    from lm_telemetry.compaction import compact, delete_retired
    from lm_telemetry.inventory import ranks, run_ids

    known = run_ids(store)
    for run_id in arguments.runs:
        if run_id not in known:
            raise StoreError(missing("run", run_id, known, "`lmt runs` lists them"), path=str(store.path))
    succeeded = True
    for run_id in arguments.runs or known:
        for rank in ranks(store, run_id):
            try:
                done = compact(store, run_id, rank, grace_seconds=arguments.grace)
            except StoreError as error:
                print(f"lmt: {one_line(str(error))}", file=sys.stderr)
                succeeded = False
                continue
            if done.busy:
                print(one_line(f"{run_id}, rank {rank}: another process is compacting it"))
                continue
            deleted = done.deleted
            if arguments.grace == 0:  # what this very call replaced, too: other engines read all files there are
                deleted += delete_retired(store, run_id, rank, grace_seconds=0)
            print(
                one_line(
                    f"{run_id}, rank {rank}: {done.files_before} files became {done.files_after}, "
                    f"{done.bytes_before:,} bytes became {done.bytes_after:,}, {deleted} replaced files deleted"
                )
            )
    return succeeded
