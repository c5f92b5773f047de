"""`lmt demo`: train a small model on real text with telemetry on, and ask what was captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, then print."""
    from lm_telemetry.demo import demo

    demo(store=arguments.store, steps=arguments.steps, port=arguments.port)
    return 0
