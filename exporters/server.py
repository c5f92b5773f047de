"""A very small HTTP server: one page of bytes, to whoever may ask.

It never computes: it hands out what was last `publish`ed, so that a scrape costs the training next to nothing, and
publishing waits for no lock. Why not `prometheus_client.start_http_server`: that one renders at each request, listens
on all interfaces by default, and has no limit on connections that say nothing.

Decisions:

- One thread and a selector, rather than a thread for each connection. Under a main thread that runs pure Python, every
  call that gives up the interpreter's lock waits about 5 ms to have it back, and each new thread makes several of them:
  few calls are what makes a scrape fast. So a connection is read as soon as it is accepted, and the answer goes out in
  one call.
- A connection has a deadline for each thing it does (shake hands and ask, stay idle, take the answer), so that slow
  clients, half-open ones and handshakes that never end cost a place for seconds and hold up nobody.
- Places are bounded. When all are taken, the connection that has been idle longest gives way to a new one, and if none
  is idle the one that has been at it longest.
- Who may read is looked up anew with each connection and each request, for passwords and certificates that change.
- A connection that ends is first shut down for writing and read to its end, so that the answer is not lost to a reset.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import ssl
import threading
import time
from enum import Enum, auto
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters import request
from lm_telemetry.exporters.access import Access
from lm_telemetry.exporters.exposition import Exposition
from lm_telemetry.exporters.page import Page

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPBACK = "127.0.0.1"
IDLE_SECONDS = 3.0
"""How long a client may take to ask, from its connection or from its first byte, and to hang up at the end."""
KEPT_SECONDS = 150.0
"""How long a connection that was answered is kept for the next scrape, which usually comes within a minute."""
TAKE_SECONDS = 10.0
"""How long a client may take to receive the answer."""
MAX_CONNECTIONS = 128
"""Connections at once."""
_SEND_BUFFER = 2**18
"""What the system may hold of an answer: a page goes out in one call."""
_READ = 4096
_PAUSE_SECONDS = 0.1
"""Pause when a connection cannot be accepted, such as for want of file descriptors."""


class _State(Enum):
    SHAKING = auto()
    IDLE = auto()
    ASKING = auto()
    ANSWERING = auto()
    LEAVING = auto()


_PATIENCE = {
    _State.SHAKING: lambda: IDLE_SECONDS,
    _State.IDLE: lambda: KEPT_SECONDS,
    _State.ASKING: lambda: IDLE_SECONDS,
    _State.ANSWERING: lambda: TAKE_SECONDS,
    _State.LEAVING: lambda: IDLE_SECONDS,
}


class _Connection:
    """A client, what it has said, and what it is still to get."""

    __slots__ = ("deadline", "keep", "out", "received", "since", "socket", "state", "waits_for")

    def __init__(self, client: socket.socket, state: _State) -> None:
        self.socket = client
        self.received = b""
        self.out: list[memoryview] = []
        self.keep = False
        self.waits_for = 0
        self.turn(state)

    def turn(self, state: _State) -> None:
        self.state, self.since = state, time.monotonic()
        self.deadline = self.since + _PATIENCE[state]()


class PageServer:
    """Serves one page at `address` from a daemon thread until `close`.

    Args:
        port: port to listen on; 0 for any free one.
        host: address of the interface to listen on.
        access: who may read, and whether by TLS.

    Raises:
        SettingsError: the address cannot be had; `.setting` is `prometheus_port` or `prometheus_host`, and its cause
            the OSError.
    """

    def __init__(self, port: int, *, host: str = LOOPBACK, access: Access | None = None) -> None:
        self._access = access or Access()
        self._page = Page(Exposition(text=b""))
        self._listener = _listen(host, port)
        self._pid = os.getpid()
        self.host, self.port = host, self._listener.getsockname()[1]
        self.is_loopback = ip_address(self._listener.getsockname()[0].partition("%")[0]).is_loopback
        self._selector = selectors.DefaultSelector()
        self._waker, self._wake = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._connections: dict[Any, _Connection] = {}
        """by their sockets"""
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="lm-telemetry-metrics", daemon=True)
        self._thread.start()

    @property
    def netloc(self) -> str:
        """`HOST:PORT` under which another process reaches it."""
        host = self.host
        if host in {"0.0.0.0", "::", ""}:  # noqa: S104 compared with, not listened on
            host = socket.gethostname()
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def address(self) -> str:
        """Where to scrape: `http://127.0.0.1:PORT/metrics`."""
        return f"{self._access.scheme}://{self.netloc}{request.PATH}"

    def publish(self, exposition: Exposition) -> None:
        """Serve this from now on."""
        self._page = Page(exposition, before=self._page)

    def close(self) -> None:
        """Stop, and free the port. A second call, and one in a forked child, does nothing."""
        if os.getpid() != self._pid or self._closing:
            return
        self._closing = True
        self._waker.send(b"\0")
        self._thread.join()

    # On the server's thread.

    def _serve(self) -> None:
        while not self._closing:
            deadline = min((c.deadline for c in self._connections.values()), default=None)
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._listener:
                    self._accept()
                    continue
                connection = self._connections.get(key.fileobj)  # none where it has just made way for another
                if connection is not None:
                    self._advance(connection)
            now = time.monotonic()
            for late in [c for c in self._connections.values() if c.deadline <= now]:
                self._drop(late)
        for connection in list(self._connections.values()):
            self._drop(connection)
        # Forked children (data loaders) hold copies of the socket; this ends its listening for them too.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._selector.close()
        for each in (self._listener, self._wake, self._waker):
            each.close()

    def _accept(self) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            self._drop(min(self._connections.values(), key=lambda c: (c.state is not _State.IDLE, c.since)))
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return  # it is gone already
        except OSError:
            time.sleep(_PAUSE_SECONDS)
            return
        state = _State.ASKING
        self._access = self._access.renewed()
        try:
            client.setblocking(False)
            if self._access.tls is not None:
                state = _State.SHAKING
                client = self._access.tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):
            client.close()
            return
        connection = self._connections[client] = _Connection(client, state)
        self._advance(connection)

    def _advance(self, connection: _Connection) -> None:
        """Do what can be done for a connection without waiting, then wait for what is missing."""
        act: dict[_State, Callable[[_Connection], bool]] = {
            _State.SHAKING: _shake,
            _State.IDLE: self._listen_to,
            _State.ASKING: self._listen_to,
            _State.ANSWERING: _send,
            _State.LEAVING: _drain,
        }
        try:
            while act[connection.state](connection):
                pass
            self._wait(connection, selectors.EVENT_READ)
        except ssl.SSLWantReadError:
            self._wait(connection, selectors.EVENT_READ)
        except (BlockingIOError, ssl.SSLWantWriteError):
            answering = connection.state is _State.ANSWERING
            self._wait(connection, selectors.EVENT_WRITE if answering else selectors.EVENT_READ)
        except (OSError, ValueError):
            self._drop(connection)

    def _listen_to(self, connection: _Connection) -> bool:
        data = connection.socket.recv(_READ)
        if not data:
            raise ConnectionResetError
        if connection.state is _State.IDLE:
            connection.turn(_State.ASKING)
            self._access = self._access.renewed()
        connection.received += data
        answer = request.answer(connection.received, self._page, self._access.credentials)
        if answer is not None:
            connection.received = b""
            connection.out = [memoryview(part) for part in (answer.head, answer.body) if part]
            connection.keep = answer.keep
            connection.turn(_State.ANSWERING)
        return True

    def _wait(self, connection: _Connection, events: int) -> None:
        if connection.waits_for == 0:
            self._selector.register(connection.socket, events)
        elif connection.waits_for != events:
            self._selector.modify(connection.socket, events)
        connection.waits_for = events

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.socket]
        if connection.waits_for:
            self._selector.unregister(connection.socket)
        # Forked children may hold a copy, which would keep the connection up.
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)
        connection.socket.close()


# What can be done for a connection in each state; whether there may be more to do at once.


def _shake(connection: _Connection) -> bool:
    assert isinstance(connection.socket, ssl.SSLSocket)
    connection.socket.do_handshake()
    connection.turn(_State.ASKING)
    return True


def _send(connection: _Connection) -> bool:
    tls = isinstance(connection.socket, ssl.SSLSocket)
    while connection.out:
        sent = connection.socket.send(connection.out[0]) if tls else connection.socket.sendmsg(connection.out)
        while connection.out and sent >= len(connection.out[0]):
            sent -= len(connection.out.pop(0))
        if connection.out:
            connection.out[0] = connection.out[0][sent:]
    if not connection.keep:
        connection.turn(_State.LEAVING)
        connection.socket.shutdown(socket.SHUT_WR)
        return False
    connection.turn(_State.IDLE)
    return isinstance(connection.socket, ssl.SSLSocket) and connection.socket.pending() > 0


def _drain(connection: _Connection) -> bool:
    if not connection.socket.recv(_READ):
        raise ConnectionResetError
    return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, and does not block."""
    listener = None
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, (name, _, *more) = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listener.setblocking(False)
        listener.bind((name, port, *more))
        listener.listen(MAX_CONNECTIONS)
    except (OSError, UnicodeError, OverflowError) as error:
        if listener is not None:
            listener.close()
        number = getattr(error, "errno", None)
        of_host = isinstance(error, socket.gaierror | UnicodeError) or number == errno.EADDRNOTAVAIL
        raise SettingsError(
            f"{'prometheus_host' if of_host else 'prometheus_port'}: cannot listen on {host}:{port}:"
            f" {getattr(error, 'strerror', None) or error}; choose another, port 0 for any free one, or None for no"
            " endpoint (on several ranks of one machine, the local rank is added to the port)",
            setting="prometheus_host" if of_host else "prometheus_port",
            value=host if of_host else port,
        ) from error
    return listener
