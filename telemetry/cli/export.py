"""`lmt export`: the runs of a store for Prometheus, whether they still train or not.

The endpoint inside a run ends with its process; this one goes by the files, and so outlives it. It looks at the store
every so often; a scrape gets what was there then. SIGTERM and Ctrl-C end it, with exit code 0, since there is no other
end.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.errors import SettingsError
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    from lm_telemetry.exporters.access import Access
    from lm_telemetry.exporters.server import PageServer
    from lm_telemetry.exporters.stored import StoredRuns

END_SECONDS = 5.0
"""How long the end waits for a look at the store that is under way."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="serve the runs of a store to Prometheus",
        description="Serve the latest values of the runs in a store to Prometheus, also when they are over.",
    )
    output.add_store(parser)
    parser.add_argument(
        "--port", type=_port, default=9109, metavar="N", help="0 for any free one; default: %(default)s"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument(
        "--every", type=_duration, default=15.0, metavar="SECONDS", help="how often to look; default: 15"
    )
    parser.add_argument(
        "--run",
        dest="runs",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="serve these alone, however old",
    )
    parser.add_argument(
        "--since",
        type=_duration,
        default="1d",
        metavar="TIME",
        help="serve runs written within 90s, 30m, 12h, 1d, 2w, ...; default: %(default)s",
    )
    parser.add_argument("--max-runs", type=_count, default=20, metavar="N", help="of them the newest; default: 20")
    parser.add_argument("--once", action="store_true", help="print the page, and serve nothing")
    parser.add_argument("--certificate", metavar="FILE", help="serve by TLS, with this certificate (PEM)")
    parser.add_argument("--key", metavar="FILE", help="its key (PEM), if that is in a file of its own")
    parser.add_argument("--client-ca", metavar="FILE", help="who has to have signed a client's certificate (PEM)")
    parser.add_argument(
        "--auth", metavar="FILE", help="lines `bearer TOKEN` or `basic USER:PASSWORD`, of which a client needs one"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes, or print.

    Raises:
        SettingsError: the address cannot be had, or a file not be used.
    """
    if arguments.once:
        runs = _open(arguments)
        sys.stdout.write(runs.poll().text.decode())
        return 0 if runs.served and not runs.failures.total() else 1
    try:
        server = _listen(arguments)
    except SettingsError as error:
        raise SettingsError(_in_options(str(error)), setting=error.setting, value=error.value) from error
    try:
        _serve(_open(arguments), server, arguments.every)
    finally:
        server.close()
    return 0


def _serve(runs: StoredRuns, server: PageServer, every: float) -> None:
    """Look at the store on a thread of its own, so that a signal is not kept waiting by a query."""
    stop = Event()
    ended: SimpleQueue[int] = SimpleQueue()  # of all that threads wait for, what a signal's handler may touch

    def look() -> None:
        while not stop.is_set():
            server.publish(runs.poll())
            stop.wait(every)

    before = {
        number: signal.signal(number, lambda number, _: ended.put(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    thread = Thread(target=look, name="lm-telemetry-store", daemon=True)
    try:
        print(f"metrics at {server.address}", flush=True)
        thread.start()
        ended.get()
    finally:
        stop.set()
        runs.end()
        if thread.ident is not None:
            thread.join(END_SECONDS)
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(arguments: argparse.Namespace) -> StoredRuns:
    from lm_telemetry.exporters.holdings import Holdings
    from lm_telemetry.exporters.stored import Choice, StoredRuns
    from lm_telemetry.liveness import life_of
    from lm_telemetry.remote import is_url

    return StoredRuns(
        Holdings(arguments.store, is_remote=is_url(arguments.store)),
        Choice(runs=tuple(arguments.runs), since_seconds=arguments.since, max_runs=arguments.max_runs),
        is_live=life_of(arguments.store),
        tell=_tell,
    )


def _listen(arguments: argparse.Namespace) -> PageServer:
    from lm_telemetry.exporters.access import Access
    from lm_telemetry.exporters.server import PageServer

    access = Access.load(
        certificate=arguments.certificate, key=arguments.key, client_ca=arguments.client_ca, auth=arguments.auth
    )
    try:
        server = PageServer(arguments.port, host=arguments.host, access=access)
    except SettingsError as error:
        if isinstance(error.__cause__, OSError):
            where, why = f"{arguments.host}:{arguments.port}", error.__cause__.strerror
            message = f"cannot listen on {where}: {why}; give another --port, 0 for any free one, or --host"
            raise SettingsError(message, setting=error.setting, value=error.value) from error
        raise
    _warn_if_open(server, access)
    return server


def _warn_if_open(server: PageServer, access: Access) -> None:
    if not server.is_loopback and not access.asks_who:
        _tell(f"whoever reaches {server.address} can read the metrics; give --auth or --client-ca, or leave out --host")


def _in_options(message: str) -> str:
    """A message about settings in the words of the command line."""
    return re.sub(r"`?\bprometheus_(\w+)`?", lambda found: f"--{found[1].replace('_', '-')}", message)


def _tell(line: str) -> None:
    print(f"lmt: {one_line(line)}", file=sys.stderr, flush=True)


def _duration(text: str) -> float:
    """Seconds, of `90`, `90s`, `30m`, `12h`, `1d` or `2w`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a time like 90s, 30m, 12h, 1d or 2w; got {text}")
    return float(found[1]) * _UNITS[found[2] or "s"]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on; got {text}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port up to 65535; got {text}")
    return int(text)
