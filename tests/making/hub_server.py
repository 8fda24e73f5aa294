"""A hub for tests: serves from memory the few addresses that huggingface_hub requests."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.making.serving import serving

_LARGE = (".parquet", ".gz", ".zst", ".jsonl")


class Hub:
    """Repositories in memory, and a list of the files that were fetched.

    `files` maps repository → commit → path → content, `branches` maps repository → branch → commit,
    `gated` names the repositories whose terms must be accepted first. A dataset's name begins with
    `datasets/`; its large files, by their suffix, are listed with their sha256.
    """

    def __init__(self):
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.sent: Counter[str] = Counter()
        """Bytes of each file that were sent."""

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

    def serving(self):
        """Serve the hub on this machine; yields its address."""
        return serving(type("Handler", (_Handler,), {"hub": self}))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._answer(body=True, asked=body.get("paths", []))

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body: bool, asked: Sequence[str] = ()) -> None:
        # A slash in a revision comes quoted.
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            kind, parts = parts[1], parts[2:]
            prefix = "datasets/" if kind == "datasets" else ""
        else:
            prefix = "datasets/" if parts[0] == "datasets" else ""
            parts = parts[len(prefix) > 0 :]
        repo, path = prefix + "/".join(parts[:2]), "/".join(parts[4:])
        what, revision = parts[2:4] or ("revision", "main")
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
            inside = [name for name in files if not path or name.startswith(f"{path}/")]
            return self._json([_entry(name, files[name]) for name in inside])
        if what == "paths-info":
            folders = [{"type": "directory", "path": p, "oid": ""} for p in asked if p not in files]
            there = [d for d in folders if any(n.startswith(f"{d['path']}/") for n in files)]
            return self._json([*(_entry(p, files[p]) for p in asked if p in files), *there])
        if path not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        data, status = files[path], 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_entry(path, data)["etag"]}"'}
        if asked_range := self.headers.get("Range"):
            first, last = asked_range.removeprefix("bytes=").split("-")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[int(first) : int(last) + 1], 206
        if body:
            self.hub.fetched.append(path)
            self.hub.sent[path] += len(data)
        return self._send(status, headers, data, body=body)

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
    entry = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    if not name.endswith(_LARGE):
        return entry | {"etag": entry["oid"]}
    sha256 = hashlib.sha256(data).hexdigest()
    lfs = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return entry | {"etag": sha256, "lfs": lfs}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
