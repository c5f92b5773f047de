"""`lmt verify`: is the store whole, and with `--repair`, what a crash has left of it mended.

Exit code 1 if something is wrong that was not mended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.cli.output import add_store, one_line
from lm_telemetry.errors import StoreError

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "verify",
        help="check that the store is whole",
        description="Hold the manifests against the files: what is missing, damaged, left over or foreign.",
    )
    add_store(parser)
    parser.add_argument("--deep", action="store_true", help="also read every value and compare checksums")
    parser.add_argument(
        "--repair", action="store_true", help="mend it first; damaged files are put aside, no row is deleted"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was mended and what was found."""
    from lm_telemetry.remote import is_url
    from lm_telemetry.repair import repair
    from lm_telemetry.verify import verify

    if is_url(arguments.store):
        raise StoreError("only a store in a directory can be verified, not one at an URL", path=arguments.store)
    if arguments.repair:
        for done in repair(arguments.store, deep=arguments.deep):
            print(one_line(f"repaired  {done.kind}  {done.file}: {done.message}"))
    findings = verify(arguments.store, deep=arguments.deep)
    for found in findings:
        print(one_line(f"{found.severity:<8}  {found.kind}  {found.file}: {found.message}"))
    wrong = sum(found.severity != "info" for found in findings)
    print("the store is whole" if not wrong else f"{wrong} findings; `lmt verify --repair` mends what can be mended")
    return 1 if wrong else 0
