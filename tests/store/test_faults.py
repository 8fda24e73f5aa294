"""Answers are lost, cut, shortened and falsified on the way: nothing wrong is ever believed."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from decant.store import open_store
from decant.store.clients import client_of
from decant.store.objects import ObjectStore
from decant.store.patience import Patience
from decant.store.urls import bucket_url
from tests.making.fault_proxy import FAULTS, FaultProxy

VERBS = ("get", "range", "head", "create", "swap", "put", "list", "delete")
QUICK = partial(Patience, pause=0.003)


@pytest.mark.parametrize(
    ("share", "rounds"), [(0.4, 5), pytest.param(0.4, 160, marks=pytest.mark.slow)]
)
def test_spoiled_on_the_way_every_verb_still_tells_the_truth(
    share, rounds, bucket, s3_server, monkeypatch
):
    proxy = FaultProxy(s3_server.endpoint, share=share)
    direct = open_store(bucket)
    with proxy.serving() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        spoiled = ObjectStore(client_of(bucket_url(bucket)), url=bucket, patience=QUICK)
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda number: one_round(spoiled, direct, number), range(rounds)))
    verbs = {verb: sum(n for (of, _), n in proxy.done.items() if of == verb) for verb in VERBS}
    faults = {fault: sum(n for (_, of), n in proxy.done.items() if of == fault) for fault in FAULTS}
    print(f"{sum(verbs.values()):,} faults; {verbs}; {faults}")
    if rounds > 100:
        assert sum(verbs.values()) >= 1000
        assert min(verbs.values()) >= 40
        assert min(faults.values()) >= 20


def test_a_file_sent_in_parts_arrives_whole_whatever_is_spoiled(
    bucket, s3_server, monkeypatch, tmp_path
):
    monkeypatch.setattr("decant.store.objects._PART", 5 << 20)  # the least of S3
    data = random.Random(0).randbytes(11 << 20)
    (tmp_path / "weights").write_bytes(data)
    proxy = FaultProxy(s3_server.endpoint, share=0.3)
    with proxy.serving() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for _ in range(3):
            open_store(bucket).upload("a/weights", tmp_path / "weights")
            assert open_store(bucket).get("a/weights", length=len(data)) == data
    assert {"put", "post"} <= {verb for verb, _ in proxy.done}


def one_round(spoiled: ObjectStore, direct: ObjectStore, number: int) -> None:
    """Every verb once through the proxy; what it did or said is compared at the server itself."""
    key, data = f"{number}/a", random.Random(number).randbytes(20_000)
    other = data[::-1]
    assert spoiled.head(key) is None
    assert spoiled.create(key, data)
    assert direct.get(key) == data
    assert not spoiled.create(key, other), "somebody else's bytes are there"
    assert direct.get(key) == data
    assert spoiled.get(key) == data
    assert spoiled.get(key, sha256=hashlib.sha256(data).hexdigest()) == data
    assert spoiled.get(key, start=5_000, length=10_000, sha256=_sha(data[5_000:15_000]))
    head = spoiled.head(key)
    assert head == direct.head(key)
    assert head.md5 == hashlib.md5(data).hexdigest()
    assert spoiled.swap(key, other, head.version)
    assert direct.get(key) == other
    assert not spoiled.swap(key, b"late", head.version)
    assert direct.get(key) == other
    spoiled.put(f"{number}/b", data)
    assert direct.get(f"{number}/b") == data
    assert sorted(spoiled.list(str(number))) == [(key, 20_000), (f"{number}/b", 20_000)]
    spoiled.delete(key)
    assert direct.head(key) is None


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
