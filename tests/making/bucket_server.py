"""A real S3 server for tests: SeaweedFS, started on this machine with keys that it checks."""

import contextlib
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from decant.store import StoreError, open_store

BUCKET = "tests"
"""The bucket that the server has. Tests write below prefixes of their own."""


@dataclass(frozen=True)
class BucketServer:
    """An S3 server; its keys are (id, secret)."""

    endpoint: str
    owner: tuple[str, str]
    reader: tuple[str, str]
    """May read and list `BUCKET`, and nothing else."""
    process: int

    def environment(self, keys: tuple[str, str] | None = None) -> dict[str, str]:
        """What a program needs to use the server, the owner's keys unless others are given."""
        key, secret = keys or self.owner
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
        }


@contextlib.contextmanager
def bucket_server(folder: Path) -> Iterator[BucketServer]:
    """A running server with the bucket `BUCKET`, which keeps its files in `folder`."""
    owner, reader = ((f"{who}key", f"{who}{secrets.token_hex(8)}") for who in ("owner", "reader"))
    keys = folder / "keys.json"
    keys.write_text(json.dumps({"identities": [_identity(owner), _identity(reader, BUCKET)]}))
    ports = _ports(4)
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        _command(folder, keys, ports), stdout=log, stderr=log, start_new_session=True
    )
    server = BucketServer(f"http://127.0.0.1:{ports[3]}", owner, reader, process.pid)
    try:
        _wait_until_it_writes(server, process)
        yield server
    finally:
        process.kill()  # it takes more than ten seconds to end by itself
        process.wait()
        log.close()


def _command(folder: Path, keys: Path, ports: list[int]) -> list[str]:
    master, volume, filer, s3 = ports
    return [
        str(Path(sys.executable).with_name("weed")),
        *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"),
        *("-s3", f"-s3.port={s3}", f"-s3.config={keys}"),
        # Without these two a second server ends at once, because their ports are fixed.
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]


def _identity(keys: tuple[str, str], only: str = "") -> dict:
    rights = ["Read", "List"] if only else ["Admin", "Read", "Write", "List", "Tagging"]
    return {
        "name": keys[0],
        "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}],
        "actions": [f"{right}:{only}" if only else right for right in rights],
    }


def _ports(count: int) -> list[int]:
    """Ports that are free, and 10,000 above them too, where the server speaks to itself."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(12_000, 32_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_it_writes(server: BucketServer, process: subprocess.Popen) -> None:
    before = dict(os.environ)
    os.environ |= server.environment()
    try:
        for _ in range(30):
            assert process.poll() is None, "the server ended; see its log"
            with contextlib.suppress(StoreError):
                open_store(f"s3://{BUCKET}").put("ready", b"")  # the owner's first PUT makes it
                return
            time.sleep(0.3)
        raise TimeoutError("the server does not write")
    finally:
        os.environ.clear()
        os.environ.update(before)
