"""Shapes in signatures are checked in every test; tests run on the CPU and compile once."""

import os
import secrets
import signal
import tempfile
import time
from types import SimpleNamespace

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What a shell starts in the background ignores Ctrl-C, and so would all that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What one test compiles, no other needs to again, in this process or in those that tests start.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A SeaweedFS that checks keys; see `tests/making/bucket_server.py`."""
    from tests.making.bucket_server import bucket_server

    with bucket_server(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """An `s3://` address that holds nothing yet; the environment has the keys to it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://tests/{secrets.token_hex(6)}"


@pytest.fixture
def hurried(monkeypatch):
    """A store's pauses before it tries again are a twentieth as long."""
    from decant.store import patience

    hurry = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: time.sleep(s / 20))
    monkeypatch.setattr(patience, "time", hurry)


@pytest.fixture
def sent(monkeypatch):
    """Bytes of each object that was read of buckets, a number a request, by file name."""
    from decant.store.objects import ObjectStore

    counted: dict[str, list[int]] = {}
    get = ObjectStore.get

    def counting(self, key, **kwargs):
        data = get(self, key, **kwargs)
        counted.setdefault(key.rpartition("/")[2], []).append(len(data))
        return data

    monkeypatch.setattr(ObjectStore, "get", counting)
    return counted
