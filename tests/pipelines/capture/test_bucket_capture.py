"""Captures into a bucket: the ids and the bytes of a capture on the disk."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.capture import unit
from decant.pipelines.capture.job import precompute
from decant.pipelines.capture.remaining_units import CaptureUnits
from decant.pipelines.config import Attention, Hidden, Precompute, Sketch
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.copy import copy
from decant.pipelines.upkeep.forget import forget
from decant.schemas import Cache, open_cache
from decant.schemas.disk import stand_in
from decant.store import open_store
from tests.making.caches import tiny_settings, write_corpus
from tests.making.fault_proxy import FaultProxy, faults_of
from tests.making.grown import hashes
from tests.making.small_server import google_bucket

SIGNALS = {
    "profile": "fast",
    "draws": 3,
    "counts": 20,
    "sketch": Sketch(rank=6, dither=True),
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers="all"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("captured")
    write_corpus(root / "corpus", files=4, words=120)
    return root


@pytest.fixture(scope="module")
def disk(root) -> Cache:
    precompute(tiny_settings(root, **SIGNALS))
    return open_cache(root / "cache")


@pytest.fixture(autouse=True)
def mirror(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


def settings(root: Path, bucket: str, **changes) -> Precompute:
    """The settings of the capture on the disk, with the bucket for its output."""
    config = tiny_settings(root, **{**SIGNALS, **changes})
    return dataclasses.replace(config, output=Path(bucket))


def files(cache: Path) -> dict[str, str]:
    """sha256 of a cache's files by name."""
    return {name: sha for name, sha in hashes(cache).items() if not name.endswith(".lock")}


def test_a_capture_into_a_bucket_has_the_ids_and_values_of_one_on_the_disk_and_copies_to_its_bytes(
    root, disk, bucket, mirror, tmp_path
):
    sealed = precompute(settings(root, bucket))
    assert sealed == disk.manifest
    assert sealed.cache_id == disk.manifest.cache_id
    there = open_cache(bucket)
    assert there.manifest == disk.manifest
    names = list(disk.manifest.signals)
    read, expected = there.read(there.rows(), names), disk.read(disk.rows(), names)
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array)
    assert list(mirror.rglob("scratch/*.array_record")) == [], "units that were sent"
    copy(bucket, tmp_path / "back")
    assert files(tmp_path / "back") == files(disk.path)


def test_a_sealed_capture_in_a_bucket_has_nothing_more_to_do(root, bucket, capsys):
    config = settings(root, bucket, hidden=Hidden(), attention=Attention())
    sealed = precompute(config)
    before = dict(open_store(bucket).list())
    capsys.readouterr()
    assert precompute(config).cache_id == sealed.cache_id
    assert f"{bucket}: sealed already, nothing to do" in capsys.readouterr().err
    assert dict(open_store(bucket).list()) == before


def test_it_is_sealed_in_part_and_finished_from_another_machine(
    root, disk, bucket, tmp_path, monkeypatch
):
    def stop(number: int, part: Path, plan: Path) -> None:
        if number == 2:
            raise ValueError("stopped")
        real(number, part, plan)

    real = unit._capture_unit
    with monkeypatch.context() as stopping:
        stopping.setattr(unit, "_capture_unit", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            precompute(settings(root, bucket))
    forget_buckets(monkeypatch, tmp_path / "second")
    with pytest.raises(ValueError, match=f"{bucket}: this directory holds another capture"):
        precompute(settings(root, bucket, counts=30))
    first = precompute(dataclasses.replace(settings(root, bucket), seal_partial=True))
    assert 0 < sum(len(part.units) for part in first.parts) < len(disk.manifest.parts[0].units)
    part = open_cache(bucket)
    assert len(part.read(part.rows())["tokens"]) == len(part)
    forget_buckets(monkeypatch, tmp_path / "third")
    whole = precompute(settings(root, bucket))
    assert sum(len(part.units) for part in whole.parts) == len(disk.manifest.parts[0].units)
    assert len(open_cache(bucket)) == len(disk)


def test_a_capture_into_google_s_cloud_has_the_same_ids(root, monkeypatch):
    with google_bucket() as (address, objects):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        sealed = precompute(
            settings(root, "gs://b-b/cache", hidden=Hidden(), attention=Attention())
        )
        assert {"cache/manifest.json", "cache/parts/0000/plan.json"} < objects.keys()
        assert len(open_cache("gs://b-b/cache").read([0])["tokens"]) == 1
    config = tiny_settings(root, **{**SIGNALS, "hidden": Hidden(), "attention": Attention()})
    on_disk = precompute(dataclasses.replace(config, output=root / "without-arrays"))
    assert sealed.cache_id == on_disk.cache_id


def test_a_server_that_ignores_conditions_is_refused_before_anything_is_captured(root, monkeypatch):
    with google_bucket(heeds_conditions=False) as (address, objects):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        with pytest.raises(OSError, match="gs://b-b/cache: this server ignores conditions"):
            precompute(settings(root, "gs://b-b/cache"))
        assert objects == {}


VERBS = ("get", "range", "head", "create", "swap", "put", "list", "delete")


@pytest.mark.slow
def test_a_thousand_faults_over_every_verb_during_captures_leave_the_bytes_of_the_disk(
    root, bucket, s3_server, monkeypatch, hurried, tmp_path
):
    """Capture, forget and tidy, again and again, until there were enough of each; then all is
    compared. Half of all requests are spoiled, those that are made again too."""
    here = tmp_path / "here"
    precompute(dataclasses.replace(tiny_settings(root, **SIGNALS), output=here))
    forgotten = [f"document-00{number}.txt" for number in range(3)]
    for source in forgotten:
        forget(here, source=source)
    collect(here)
    proxy, rounds = FaultProxy(s3_server.endpoint, share=0.5), 0
    pairs = [(verb, fault) for verb in VERBS for fault in faults_of(verb)]
    with proxy.serving() as address:
        while proxy.done.total() < 1000 or min(proxy.done[pair] for pair in pairs) < 1:
            rounds += 1
            assert rounds <= 8, proxy.done
            url = f"{bucket}/{rounds}"
            forget_buckets(monkeypatch, tmp_path / f"mirror{rounds}")
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            precompute(settings(root, url))
            for source in forgotten:
                forget(stand_in.working_folder(url), source=source)
            collect(stand_in.working_folder(url), grace_hours=0.0)
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
            copy(url, tmp_path / f"back{rounds}")
            assert files(tmp_path / f"back{rounds}") == files(here)
    print(f"{proxy.done.total():,} faults in {rounds} captures")
    for verb in VERBS:
        print(verb, {fault: proxy.done[verb, fault] for fault in faults_of(verb)})


def test_credentials_that_expire_in_the_middle_end_the_capture_at_once_and_it_goes_on_with_new_ones(
    root, disk, bucket, s3_server, monkeypatch
):
    class Expiring(FaultProxy):
        def forward(self, request):
            """Until the first unit's data were sent."""
            left.pop() if left and request.verb == "put" and "/objects/" in request.path else None
            if left:
                return super().forward(request)
            return 400, [], b"<Error><Code>ExpiredToken</Code></Error>"

    left = [True] * (len(disk.manifest.parts[0].units) + 8)
    with Expiring(s3_server.endpoint, share=0).serving() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises((OSError, RuntimeError), match="the credentials have expired") as caught:
            precompute(settings(root, bucket))
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    assert "and run the command again: it goes on from here" in str(caught.value)
    assert any(open_store(bucket).list("objects"))
    monkeypatch.setattr(stand_in, "_buckets", {})
    assert precompute(settings(root, bucket)).cache_id == disk.manifest.cache_id


def forget_buckets(monkeypatch, mirror: Path) -> None:
    """What another machine knows: nothing, with another folder for its scratch."""
    monkeypatch.setattr(stand_in, "_buckets", {})
    monkeypatch.setenv("DECANT_MIRROR", str(mirror))


def test_an_error_of_a_worker_names_the_address_and_not_the_folder_of_its_machine(
    bucket, monkeypatch
):
    def broken(number: int, part: Path, plan: Path) -> None:
        raise ValueError(f"{plan}: broken")

    monkeypatch.setattr("decant.pipelines.capture.remaining_units.capture_on_host", broken)
    part = stand_in.working_folder(bucket) / "parts/0000"
    with pytest.raises(ValueError, match=f"^{bucket}/parts/0000/plan.json: broken"):
        CaptureUnits(part, part / "plan.json").process(0)
