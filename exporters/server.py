"""A very small HTTP server: one page of bytes, to whoever asks on this machine.

It never computes: it hands out what was last `publish`ed, so that a scrape costs the training next to nothing. Why not
`prometheus_client.start_http_server`: that one renders at each request, listens on all interfaces by default, and has
no limit on connections that say nothing.
"""

from __future__ import annotations

import errno
import os
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

HOST = "127.0.0.1"
PATH = "/metrics"
IDLE_SECONDS = 3.0
"""How long a connection may say nothing."""
MAX_CONNECTIONS = 16
"""Connections at once; further ones are closed at the door."""


class PageServer:
    """Serves one page at `address` from a daemon thread until `close`.

    Raises:
        SettingsError: the port cannot be had.
    """

    def __init__(self, port: int, content_type: str) -> None:
        self._body = b""
        try:
            self._server = _Server((HOST, port), lambda *a: _Handler(*a, page=self._page, content_type=content_type))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise SettingsError(
                f"prometheus_port: cannot listen on {HOST}:{port}, {'it is in use' if taken else error.strerror};"
                " choose another, 0 for any free one, or None for no endpoint (on several ranks of one machine, the"
                " local rank is added to it)",
                setting="prometheus_port",
                value=port,
            ) from error
        self._pid = os.getpid()
        self.address = f"http://{HOST}:{self._server.server_address[1]}{PATH}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="lm-telemetry-metrics", daemon=True
        )
        self._thread.start()

    def publish(self, body: bytes) -> None:
        """Serve `body` from now on."""
        self._body = body

    def close(self) -> None:
        """Stop, and free the port. A second call, and one in a forked child, does nothing."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return
        self._server.shutdown()
        self._thread.join()
        # Forked children (data loaders) hold copies of the socket; this ends its listening for them too.
        self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def _page(self) -> bytes:
        return self._body


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that hangs up is no news, and standard error belongs to the training."""


class _Handler(BaseHTTPRequestHandler):
    timeout = IDLE_SECONDS
    server_version = "lm-telemetry"
    sys_version = ""

    def __init__(self, *args: Any, page: Callable[[], bytes], content_type: str) -> None:
        self._page, self._content_type = page, content_type
        super().__init__(*args)

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == PATH:
            self._answer(HTTPStatus.OK, self._page(), self._content_type)
        else:
            self._answer(HTTPStatus.NOT_FOUND, f"there is only {PATH}\n".encode())

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Any other method of HTTP (the base class looks for `do_<METHOD>`) is refused."""
        if name.startswith("do_"):
            return lambda: self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n")
        raise AttributeError(name)

    def log_message(self, *_: Any) -> None:
        """Nothing: standard error belongs to the training."""

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
