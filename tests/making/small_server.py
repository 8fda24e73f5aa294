"""Small HTTP servers for tests of `decant.store`: one that always answers alike, and a bucket."""

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.making.serving import serving


@contextlib.contextmanager
def answering(
    status: int,
    body: str = "",
    headers: dict[str, str] | None = None,
    *,
    asked: list[dict[str, str]] | None = None,
) -> Iterator[str]:
    """A server that answers every request with this status and body; yields its address.

    `asked` gets the headers of each request, their names in lower case.
    """

    class Same(_Quiet):
        def serve(self, sent: bytes) -> None:
            if asked is not None:
                asked.append({name.lower(): value for name, value in self.headers.items()})
            self.answer(status, body.encode(), headers or {})

    with serving(Same) as address:
        yield address


@contextlib.contextmanager
def google_bucket(*, heeds_conditions: bool = True) -> Iterator[tuple[str, dict[str, bytes]]]:
    """A bucket as Google's XML interface serves it; yields its address, and its objects by name.

    `heeds_conditions` False: it overwrites, whatever generation was expected.
    """
    objects: dict[str, bytes] = {}
    generations: dict[str, int] = {}
    lock = threading.Lock()

    class Bucket(_Quiet):
        def serve(self, sent: bytes) -> None:
            place = urlsplit(self.path)
            key = unquote(place.path).split("/", 2)[2] if place.path.count("/") > 1 else ""
            with lock:
                if self.command == "PUT":
                    self._put(key, sent)
                elif "list-type" in place.query:
                    self._list(parse_qs(place.query).get("prefix", [""])[0])
                elif key not in objects:
                    self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                elif self.command == "DELETE":
                    del objects[key]
                    self.answer(204)
                else:
                    self._get(key)

        def _put(self, key: str, sent: bytes) -> None:
            expected = self.headers.get("x-goog-if-generation-match")
            now = generations[key] if key in objects else 0
            if heeds_conditions and expected is not None and int(expected) != now:
                return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            objects[key], generations[key] = sent, max(generations.values(), default=1000) + 1
            return self.answer(200, headers=self._facts(key))

        def _get(self, key: str) -> None:
            data, facts = objects[key], self._facts(key)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not wanted:
                return self.answer(200, data, facts)
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return self.answer(206, data[first : last + 1], facts | part)

        def _list(self, prefix: str) -> None:
            entries = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
                "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
                for key, data in sorted(objects.items())
                if key.startswith(prefix)
            )
            self.answer(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode())

        def _facts(self, key: str) -> dict[str, str]:
            return {
                "ETag": f'"{generations[key]}"',
                "x-goog-generation": str(generations[key]),
                "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            }

    with serving(Bucket) as address:
        yield address, objects


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def serve(self, sent: bytes) -> None:
        """Answer; `sent` is the request's body."""
        raise NotImplementedError

    def _read_and_serve(self) -> None:
        self.serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _read_and_serve

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
