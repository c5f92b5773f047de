"""The view on a terminal: drawn on the alternate screen, again every few seconds, until `q` or Ctrl-C.

- What the terminal showed before is there again afterwards, with its cursor and its line discipline, also after SIGTERM
  and SIGHUP. Ctrl-Z does nothing meanwhile.
- A new size is drawn at once.
- A look that takes long is followed by a longer pause, so that watching takes a tenth of one core at most.
- Where a terminal cannot be drawn on, or the output is none, there is one frame.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from lm_telemetry.exporters.watch.frame import Frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from lm_telemetry.exporters.watch.reading import Reading

UNBOUNDED = (100, 40)
"""Characters and lines of a frame that goes to no terminal."""
REST = 9.0
"""Seconds of pause, at least, for each that a look took."""
_TICK = 0.2
"""Seconds after which a key or a new size is seen."""


class Screen:
    """A terminal, or what standard output is instead.

    Args:
        look: gives what is known of the run.
        every: seconds between looks.
        max_steps: step at which the run is to end, if not the one it told.
        store: name of the store.
    """

    def __init__(
        self, look: Callable[[], Reading], *, every: float, max_steps: int | None = None, store: str = ""
    ) -> None:
        self._look = look
        self._every = every
        self._max_steps = max_steps
        self._store = store
        self._console = Console(highlight=False, markup=False, emoji=False)

    def once(self) -> None:
        """Print one frame."""
        width, height = shutil.get_terminal_size(UNBOUNDED)
        self._console.width = width
        self._console.print(self._drawn(self._look(), width, height), crop=False, no_wrap=True)

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal that can be drawn on again and again."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def watch(self) -> None:
        """Draw until the user has had enough."""
        with (
            _signals(),
            _keys() as key,
            Live(
                console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            ) as live,
        ):
            while True:
                began = time.monotonic()
                reading = self._look()
                pause = max(self._every, REST * (time.monotonic() - began))
                if not self._wait(live, reading, time.monotonic() + pause, key):
                    return

    def _wait(self, live: Live, reading: Reading, until: float, key: Callable[[float], str]) -> bool:
        """Show a reading until the next look is due; False if the user leaves."""
        drawn: tuple[int, int] | None = None
        while (left := until - time.monotonic()) > 0 or drawn is None:
            if (size := self._size()) != drawn:
                drawn = size
                live.update(self._drawn(reading, *size), refresh=True)
            if key(min(_TICK, max(0.0, left))) in {"q", "Q"}:
                return False
        return True

    def _size(self) -> tuple[int, int]:
        return self._console.size.width, self._console.size.height

    def _drawn(self, reading: Reading, width: int, height: int) -> RenderableType:
        frame = Frame(width, height, ascii_only=self._console.options.ascii_only)
        return frame.draw(reading, datetime.now(UTC), max_steps=self._max_steps, store=self._store)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, "" for none; the terminal gives keys one by one meanwhile."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def key(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        pressed = os.read(descriptor, 64) if ready else b""
        if ready and not pressed:  # nobody is there any more
            time.sleep(seconds)
        return pressed.decode("ascii", "replace")[-1:]

    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        modes: list[Any] = termios.tcgetattr(descriptor)
        modes[6][termios.VSUSP] = b"\0"
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextmanager
def _signals() -> Iterator[None]:
    """A context that SIGTERM and SIGHUP leave as Ctrl-C does, so that the terminal is put in order."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
