"""A hub for tests: serves from memory the few addresses that huggingface_hub requests."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory, and a list of the files that were fetched.

    `files` maps repository → commit → path → content, `branches` maps repository → branch → commit,
    `gated` names the repositories whose terms must be accepted first.
    """

    def __init__(self):
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []

    def push(self, repo: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Add a commit with these files to the branch; returns the commit's name."""
        listing = repr(sorted((name, data) for name, data in files.items())).encode()
        commit = hashlib.sha1(listing).hexdigest()
        self.files.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def push_directory(self, repo: str, directory: Path, **others: bytes) -> str:
        """Add a commit with the directory's files and `others` by name."""
        return self.push(repo, {p.name: p.read_bytes() for p in directory.iterdir()} | others)

    @contextmanager
    def serving(self):
        """Serve the hub on this machine; yields its address."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, what, revision = "/".join(parts[2:4]), *parts[4:6]
            path = ""
        else:
            repo, what, revision = "/".join(parts[:2]), *parts[2:4]
            path = "/".join(parts[4:])
        if repo not in self.hub.files:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if repo in self.hub.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        commit = self.hub.branches[repo].get(revision, revision)
        files = self.hub.files[repo].get(commit)
        if files is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": repo, "sha": commit, "siblings": siblings})
        if what == "tree":
            return self._json([_entry(name, data) for name, data in files.items()])
        data = files[path]
        if body:
            self.hub.fetched.append(path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"'}
        return self._send(200, headers, data, body=body)

    def _json(self, value) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status, headers, data: bytes = b"", *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
