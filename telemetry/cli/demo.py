"""`lmt demo`: train a small model on real text with telemetry on, ask what was captured, and write the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.cli.report import require_place, write

if TYPE_CHECKING:
    import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="train a small model with telemetry on, and show what was captured",
        description="Train a byte-level Llama on Python's own standard library, and show what was captured.",
    )
    parser.add_argument("--store", metavar="DIR", default="telemetry-store", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port of the Prometheus endpoint (default: any free one)")
    parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="report (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, print, and write the report; StoreError, before any of it, if that cannot be written."""
    from lm_telemetry.demo import demo

    target = Path(arguments.output)
    require_place(target, force=False)
    run_id = demo(store=arguments.store, steps=arguments.steps, port=arguments.port)
    size = write(arguments.store, [run_id], target)
    print(f"\nThe report of this run, {output.size(size)}, for a browser: {target.absolute()}")
    return 0
