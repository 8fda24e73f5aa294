"""A proxy before an S3 server that spoils answers and requests, and counts what it did."""

import contextlib
import http.client
import random
import socket
import threading
from collections import Counter
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.making.serving import serving

FAULTS = (
    "lost answer",
    "409",
    "412",
    "429",
    "500",
    "503",
    "cut answer",
    "cut request",
    "short answer",
    "wrong answer",
    "wrong request",
)
"""`lost answer`: the server did it, and nobody hears. Numbers: the server never saw the request.
`cut`: the connection ends in the middle of a body. `short answer`: a part of the body, with a
length that fits. `wrong`: one bit differs."""
_CODES = {"409": "ConditionalRequestConflict", "412": "PreconditionFailed", "429": "SlowDown"}


class Request(NamedTuple):
    """One request as the proxy got it."""

    verb: str
    """get, range (a get of a part), head, create, swap, put, list, delete, or post: of uploads
    in parts."""
    path: str
    headers: dict[str, str]
    body: bytes
    method: str


class FaultProxy:
    """Spoils a `share` of the requests while it is not paused; `done` counts (verb, fault)."""

    def __init__(self, endpoint: str, *, share: float, seed: int = 0):
        self.upstream = urlsplit(endpoint).netloc
        self.share = share
        self.done: Counter[tuple[str, str]] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def fault_for(self, request: Request) -> str | None:
        """The next fault, of those done least to this verb; None to leave the request alone."""
        with self._lock:
            if self._random.random() >= self.share:
                return None
            fitting = [fault for fault in FAULTS if _fits(fault, request)]
            least = min(self.done[request.verb, fault] for fault in fitting)
            fault = self._random.choice(
                [fault for fault in fitting if self.done[request.verb, fault] == least]
            )
            self.done[request.verb, fault] += 1
            return fault

    def forward(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        """The server's status, headers and body."""
        upstream = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            # With the proxy's own name as the host, because the client signed that.
            upstream.putrequest(
                request.method, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(request.body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def serving(self) -> AbstractContextManager[str]:
        """Serve on this machine; yields the address."""
        return serving(type("Handler", (_Handler,), {"proxy": self}))


def faults_of(verb: str) -> tuple[str, ...]:
    """The faults that can happen to a request of a verb, one with a body if it can have one."""
    with_body = verb in ("put", "create", "swap", "post")
    request = Request(verb, "", {}, b"xx" if with_body else b"", "")
    return tuple(fault for fault in FAULTS if _fits(fault, request))


def _fits(fault: str, request: Request) -> bool:
    """Whether such a fault can happen to the request, and can be noticed."""
    if fault in ("409", "412"):
        return request.verb in ("create", "swap")
    if fault in ("cut request", "wrong request"):
        return len(request.body) > 1
    if fault == "cut answer":
        return request.verb in ("get", "range", "list")
    if fault in ("short answer", "wrong answer"):
        return request.verb in ("get", "range")  # a listing has no checksum, and decides nothing
    return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a short body waits until its header was acknowledged
    proxy: FaultProxy

    def _serve(self) -> None:
        headers = dict(self.headers.items())
        lower = {name.lower(): value for name, value in headers.items()}
        length = int(lower.get("content-length", 0))
        verb = self._verb(lower)
        request = Request(verb, self.path, headers, b"x" * length, self.command)
        fault = self.proxy.fault_for(request)
        if fault == "cut request":
            self.rfile.read(length // 2)
            return self._hang_up()
        request = request._replace(body=self.rfile.read(length))
        if fault and fault.isdigit():
            return self._answer(*_error(int(fault)))
        if fault == "wrong request":
            request = request._replace(body=_one_bit_off(request.body))
        status, answered, body = self.proxy.forward(request)
        if fault == "lost answer":
            return self._hang_up()
        if fault == "short answer":
            body = body[: len(body) // 2]
        if fault == "wrong answer":
            body = _one_bit_off(body)
        return self._answer(status, answered, body, cut=fault == "cut answer")

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _serve

    def _verb(self, headers: dict[str, str]) -> str:
        if self.command == "PUT":
            return (
                "create"
                if "if-none-match" in headers
                else "swap"
                if "if-match" in headers
                else "put"
            )
        if self.command == "GET" and "list-type" in self.path:
            return "list"
        if self.command == "GET" and "range" in headers:
            return "range"
        return {"GET": "get", "HEAD": "head", "POST": "post"}.get(self.command, "delete")

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        length = dict(headers).get("Content-Length", "0") if is_head else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if cut:
            self.wfile.write(body[: len(body) // 2])
            return self._hang_up()
        if not is_head:
            self.wfile.write(body)
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            return super().handle_one_request()
        self.close_connection = True
        return None

    def log_message(self, *_: object) -> None:
        pass


def _error(status: int) -> tuple[int, list[tuple[str, str]], bytes]:
    code = _CODES.get(str(status), "InternalError")
    headers = [("Content-Type", "application/xml")]
    if status in (429, 503):
        headers.append(("Retry-After", "1"))
    return status, headers, f"<Error><Code>{code}</Code></Error>".encode()


def _one_bit_off(data: bytes) -> bytes:
    at = random.randrange(len(data)) if data else 0
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else data
