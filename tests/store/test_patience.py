"""How often a verb is tried: by time, but at least a few times, and as a busy server asks."""

import datetime
import email.utils
import threading
import time
from collections import Counter

import pytest

from decant.store import StoreError, open_store
from decant.store.clients import client_of
from decant.store.objects import ObjectStore
from decant.store.patience import Patience
from decant.store.retry_after import seconds_of
from decant.store.urls import bucket_url
from tests.making.fault_proxy import FaultProxy


@pytest.fixture
def sleeps(monkeypatch):
    """Pauses that were made, in seconds, without making them."""
    made: list[float] = []
    monkeypatch.setattr("decant.store.patience.time.sleep", made.append)
    return made


@pytest.mark.parametrize(
    ("again", "tries"), [("damaged", 8), ("absent", 2), ("busy", 4), ("long", 4), ("no", 1)]
)
def test_on_a_machine_so_busy_that_a_try_takes_all_time_there_are_still_some(again, tries, sleeps):
    patience = Patience(started=time.monotonic() - 1000.0)
    made = 1
    while patience.wait(again):
        made += 1
    assert made == tries


def test_failures_of_one_kind_do_not_use_up_the_tries_of_another(sleeps):
    patience = Patience(started=time.monotonic() - 10.0)
    assert all(patience.wait("long") for _ in range(3))
    assert patience.wait("damaged")


def test_a_pause_is_as_long_as_the_server_asks_and_never_beyond_the_limit(sleeps):
    patience = Patience()
    assert patience.wait("busy", asked=20.0)
    assert 20.0 <= sleeps[0] <= 22.0
    assert not patience.wait("busy", asked=90.0), "longer than the limit: told at once"
    assert len(sleeps) == 1


def test_a_time_is_named_in_seconds_or_by_a_date():
    now = datetime.datetime.now(datetime.UTC)
    soon = email.utils.format_datetime(now + datetime.timedelta(seconds=30), usegmt=True)
    past = email.utils.format_datetime(now - datetime.timedelta(seconds=30), usegmt=True)
    assert seconds_of("7") == 7.0
    assert 25 < seconds_of(soon) <= 30
    assert [seconds_of(text) for text in (past, "", "soon", "-3", "1.5")] == [0.0] * 5


class BusyUntil(FaultProxy):
    """Answers 503 with this Retry-After up to a time, and counts what it answered."""

    def __init__(self, endpoint: str, *, seconds: float, header: str):
        super().__init__(endpoint, share=0.0)
        self.until, self.header = time.monotonic() + seconds, header
        self.answered: Counter[str] = Counter()
        self._counting = threading.Lock()

    def forward(self, request):
        is_busy = time.monotonic() < self.until
        with self._counting:
            self.answered["busy" if is_busy else "done"] += 1
        if is_busy:
            return 503, [("Retry-After", self.header)], b"<Error><Code>SlowDown</Code></Error>"
        return super().forward(request)


def through(proxy_address, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy_address)
    return ObjectStore(client_of(bucket_url(bucket)), url=bucket)


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(bucket, s3_server, monkeypatch):
    open_store(bucket).put("a", b"x")
    proxy = BusyUntil(s3_server.endpoint, seconds=1.9, header="2")
    with proxy.serving() as address:
        store = through(address, bucket, monkeypatch)
        began = time.monotonic()
        assert store.get("a") == b"x"
        assert time.monotonic() - began > 1.9
    # Two tries and the look at the header. Pauses without it would fit six tries in.
    assert proxy.answered["busy"] <= 3
    assert proxy.answered["done"] == 1


def test_a_server_that_asks_for_longer_than_the_limit_is_an_error_at_once(
    bucket, s3_server, monkeypatch
):
    proxy = BusyUntil(s3_server.endpoint, seconds=1e9, header="3600")
    with proxy.serving() as address:
        store = through(address, bucket, monkeypatch)
        with pytest.raises(StoreError, match=r"busy or failing \(503 SlowDown.*, not before 3,6"):
            store.put("a", b"x")
    assert sum(proxy.answered.values()) <= 3


class Away:
    """A client whose server cannot be reached at times."""

    def __init__(self, client, failures: int):
        self.client, self.failures = client, failures

    def get(self, key, **named):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("tcp connect error: ConnectionRefused")
        return self.client.get(key, **named)

    def __getattr__(self, name):
        return getattr(self.client, name)


def test_a_server_that_has_answered_may_be_away_for_longer_than_one_that_never_did(bucket, sleeps):
    store = open_store(bucket)
    store.put("a", b"x")
    known = ObjectStore(Away(store.client, 0), url=bucket, patience=lambda: Patience(soon=0.1))
    assert known.get("a") == b"x"
    known.client.failures = 9
    assert known.get("a") == b"x"
    unknown = ObjectStore(Away(store.client, 9), url=bucket, patience=lambda: Patience(soon=0.1))
    with pytest.raises(StoreError, match="does not answer"):
        unknown.get("a")
