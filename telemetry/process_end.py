"""What is to be done when a process ends without a word, earlier than `atexit` would do it.

When functions of `atexit` run, the threads of concurrent.futures are gone already, and with them every asyncio client
that has a connection to open (s3fs). So this uses the hook by which concurrent.futures itself learns of the end:
`threading._register_atexit`, called when the main thread is over, the latest first. A forked child does nothing.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_unfinished: dict[Callable[[], object], int] = {}
"""What to call, and the process that it is for."""


def before_exit(end: Callable[[], object]) -> None:
    """Call `end` when this process's main thread is over, unless it is `finished` by then."""
    if not _unfinished:
        threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
    _unfinished[end] = os.getpid()


def finished(end: Callable[[], object]) -> None:
    """Take back `before_exit`."""
    _unfinished.pop(end, None)


def _finish_all() -> None:
    for end, pid in list(_unfinished.items()):
        if pid == os.getpid():
            end()
