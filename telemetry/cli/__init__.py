"""The command line, `lmt`: one command a file.

Exit codes: 0 it was done; 1 the store, a file or a setting is not as needed; 2 the command line or the query is wrong;
130 interrupted; 141 whoever read the output stopped reading.

Nothing heavy is imported before a command runs: `lmt --help` costs what Python costs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import TYPE_CHECKING

from lm_telemetry.cli import (
    compact,
    curvature,
    demo,
    describe,
    diff,
    du,
    export,
    fit,
    report,
    runs,
    sql,
    stack,
    upload,
    verify,
    views,
    watch,
)
from lm_telemetry.errors import QueryError, TelemetryError
from lm_telemetry.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (
    sql,
    views,
    describe,
    runs,
    watch,
    report,
    diff,
    fit,
    du,
    compact,
    verify,
    upload,
    export,
    stack,
    curvature,
    demo,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="lmt",
        description="Ask what a training run recorded: telemetry of language models.",
        epilog="exit codes: 0 done; 1 the store is not as needed; 2 wrong command line or query; 130 interrupted",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = build_parser().parse_args(argv)
    if sys.stdout is None:  # a descriptor that is closed
        return _complain("standard output is closed", 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a box is no reason to fail where there is only ASCII
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except QueryError as error:
        return _complain(error, 2)
    except TelemetryError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:  # a full disk behind standard output, a directory that may not be read
        _discard_output()
        return _complain(error, 1)
    except UnicodeError as error:
        return _complain(error, 1)
    return code


def _discard_output() -> None:
    """Give what standard output still holds somewhere to go: the interpreter flushes it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: Exception | str, code: int) -> int:
    print(f"lmt: {printable(str(error))}", file=sys.stderr)
    return code
