"""`lmt verify`: is the store whole, and with `--repair`, what a crash has left of it mended.

A store at an URL is only looked at (`verify_remote`). Exit code 1 if something is wrong that was not mended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.cli.output import add_store
from lm_telemetry.errors import StoreError
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    import argparse

    from lm_telemetry.verify import Finding


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
    from lm_telemetry.verify import verify

    if is_url(arguments.store):
        return _remote(arguments)
    if arguments.repair:
        from lm_telemetry.repair import repair

        for done in repair(arguments.store, deep=arguments.deep):
            print(one_line(f"repaired  {done.kind}  {done.file}: {done.message}"))
    return _tell(verify(arguments.store, deep=arguments.deep), "`lmt verify --repair` mends what can be mended")


def _remote(arguments: argparse.Namespace) -> int:
    from lm_telemetry.verify_remote import verify_remote

    if arguments.repair:
        raise StoreError(
            "a store at an URL is not mended where it is; copy it to a directory, mend it there, and copy it back",
            path=arguments.store,
        )
    return _tell(verify_remote(arguments.store, deep=arguments.deep), "each says what to do")


def _tell(findings: list[Finding], remedy: str) -> int:
    for found in findings:
        print(one_line(f"{found.severity:<8}  {found.kind}  {found.file}: {found.message}"))
    wrong = sum(found.severity != "info" for found in findings)
    print("the store is whole" if not wrong else f"{wrong} findings; {remedy}")
    return 1 if wrong else 0
