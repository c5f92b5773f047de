"""`lmt stack DIR`: Prometheus and Grafana for a store, as files: dashboards, alert rules, provisioning, compose file.

Nothing is started: the answer is the next command. Files of yours that differ are left alone unless `--force`.
"""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.terminal import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from lm_telemetry.exporters.grafana.stack import Stack

PORT = 9108
"""Of a run's endpoint, in the example."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "stack",
        help="write Prometheus and Grafana for a store: dashboards, alerts, compose file",
        description="Write a directory with dashboards, alert rules, provisioning and a compose file, and say what to"
        " start next.",
    )
    parser.add_argument("directory", metavar="DIR", help="where to write; made if it is not there")
    output.add_store(parser)
    parser.add_argument(
        "--targets",
        metavar="DIR",
        help="where runs announce themselves, their setting `prometheus_targets` (default: prometheus/targets in DIR)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write, and print what comes next."""
    from lm_telemetry.exporters.grafana.stack import write_stack

    stack = write_stack(arguments.directory, store=arguments.store, targets=arguments.targets, force=arguments.force)
    print(printable("\n".join(_next(stack, arguments.store))))
    return 0


def _next(stack: Stack, store: str) -> Iterator[str]:
    directory, targets = shlex.quote(str(stack.directory)), shlex.quote(str(stack.targets))
    there = f"; {len(stack.unchanged)} were there already" if stack.unchanged else ""
    yield f"{len(stack.written)} files written to {directory}{there}"
    yield ""
    if shutil.which("docker"):
        yield "Start Prometheus and Grafana, then open http://127.0.0.1:3000 :"
        yield f"  cd {directory} && docker compose up -d"
    else:
        yield "There is no Docker here. A Prometheus of your own reads the directory as it is:"
        yield f"  cd {directory} && prometheus --config.file=prometheus/prometheus.yml"
        yield "Into a Grafana of your own, import the files of `dashboards`; README.md there has more."
    yield "Have runs announce themselves:"
    yield f"  export LM_TELEMETRY_PROMETHEUS_PORT={PORT} LM_TELEMETRY_PROMETHEUS_TARGETS={targets}"
    yield "Serve runs that are over, or have no endpoint:"
    yield f"  lmt export --store {shlex.quote(store)}"
