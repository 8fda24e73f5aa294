"""A cache in a bucket reads as on disk: same numbers, same errors, few requests."""

import copy
import dataclasses
import itertools
import pickle
import shutil
from threading import Event

import numpy as np
import pytest

from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.config import Attention, Hidden, Sketch
from decant.schemas import Cache, open_cache
from decant.schemas.disk.layout import MANIFEST, PartLayout
from decant.schemas.manifest.manifest import write_manifest
from decant.store import StoreError, open_store
from decant.store.mirror import Mirror, open_mirror
from tests.making.caches import tiny_cache
from tests.making.fault_proxy import FaultProxy
from tests.making.uploaded import upload


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory) -> Cache:
    """Every kind of signal."""
    return tiny_cache(
        tmp_path_factory.mktemp("remote"),
        draws=6,
        counts=20,
        sketch=Sketch(rank=8),
        hidden=Hidden(layers=(1,), dtype="int8", width=8),
        attention=Attention(layers=(0,)),
    )


def from_directory(cache: Cache, place, **settings) -> Cache:
    """The cache read through a mirror in `place`; its own directory stands for the bucket."""
    mirror = open_mirror(str(cache.path), first="manifest.json", place=place, **settings)
    return Cache(mirror.files, cache.manifest, mirror)


@pytest.fixture
def remote(on_disk, tmp_path) -> Cache:
    return from_directory(on_disk, tmp_path)


def require_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def all_of(cache: Cache, rows=None):
    return cache.read(cache.rows() if rows is None else rows, signals=list(cache.manifest.signals))


def test_over_s3_all_signals_and_tables_are_those_on_disk(on_disk, bucket, tmp_path):
    url = upload(on_disk.path, bucket)
    cache = open_cache(url, mirror=tmp_path)
    assert cache.address == url
    assert cache.manifest == on_disk.manifest
    assert cache.mirror is not None
    assert cache.mirror.requests == 0, "the manifest alone was fetched"
    require_equal(all_of(cache), all_of(on_disk))
    np.testing.assert_array_equal(cache.tail_prior(), on_disk.tail_prior())
    np.testing.assert_array_equal(cache.directions("hidden/1"), on_disk.directions("hidden/1"))
    np.testing.assert_array_equal(cache.sketch_head().head, on_disk.sketch_head().head)
    assert tokenizer_of(cache).digest == tokenizer_of(on_disk).digest
    assert cache.origins(3) == on_disk.origins(3)
    assert cache.row_key(3) == on_disk.row_key(3)
    assert cache.plan_path(cache.manifest.parts[0]).read_bytes() == (
        on_disk.plan_path(on_disk.manifest.parts[0]).read_bytes()
    )
    again = open_cache(url, mirror=tmp_path)
    require_equal(all_of(again), all_of(on_disk))
    assert again.mirror.requests == 0, "another process finds all in the mirror"


def test_a_cache_of_ten_thousand_units_is_opened_by_few_requests(
    on_disk, bucket, s3_server, tmp_path, monkeypatch
):
    part = on_disk.manifest.parts[0]
    units = tuple(itertools.islice(itertools.cycle(part.units), 10_000))
    whole = dataclasses.replace(part, units=units, numbers=(), planned_units=0)
    folder = tmp_path / "large"
    shutil.copytree(on_disk.path, folder, ignore=shutil.ignore_patterns(MANIFEST, "commits"))
    write_manifest(folder, dataclasses.replace(on_disk.manifest, parts=(whole,)), replaces=None)
    upload(folder, bucket)
    proxy = FaultProxy(s3_server.endpoint, share=0.0)
    forwarded, plain = [], proxy.forward
    monkeypatch.setattr(proxy, "forward", lambda asked: forwarded.append(asked) or plain(asked))
    with proxy.serving() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        cache = open_cache(bucket, mirror=tmp_path / "mirror")
        assert len(cache.manifest.parts[0].units) == 10_000
        assert cache.tokenizer_path.is_dir()
        assert 0 < len(forwarded) <= 20
        assert not any(asked.verb == "list" for asked in forwarded)
        rows = on_disk.rows()[:2]
        require_equal(cache.read(rows), on_disk.read(rows))


def test_what_decoding_needs_beside_records_is_fetched_at_once(on_disk, tmp_path, monkeypatch):
    """Each file of statistics comes when all were asked for."""
    plain, asked, several = Mirror._get, set(), Event()

    def waiting(self, key, *arguments, **named):
        if "/statistics/" in key:
            asked.add(key)
            several.set() if len(asked) == 4 else None
            assert several.wait(timeout=20)
        return plain(self, key, *arguments, **named)

    monkeypatch.setattr(Mirror, "_get", waiting)
    there = from_directory(on_disk, tmp_path)
    require_equal(there.read([0]), on_disk.read([0]))
    monkeypatch.setattr(Mirror, "_get", plain)
    assert there.mirror is not None
    before = there.mirror.requests
    require_equal(there.read([0]), on_disk.read([0]))
    assert there.mirror.requests == before


def test_statistics_that_did_not_come_are_asked_for_again(on_disk, tmp_path, monkeypatch):
    plain = Mirror._get

    def failing(self, key, *arguments, **named):
        if "/statistics/" in key:
            raise StoreError(f"{key}: the server is busy")
        return plain(self, key, *arguments, **named)

    there = from_directory(on_disk, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(Mirror, "_get", failing)
        with pytest.raises(StoreError, match=r"statistics/.*: the server is busy"):
            there.read([0])
    require_equal(there.read([0]), on_disk.read([0]))


def test_what_is_not_read_is_not_fetched(on_disk, remote):
    rows = on_disk.rows()[5:8]
    require_equal(remote.read(rows, signals=()), on_disk.read(rows, signals=()))
    held = {path.relative_to(remote.path).parts[2] for path in remote.path.rglob("*.array_record")}
    assert held == {"rows"}


def test_fetched_ahead_nothing_is_fetched_when_it_is_read(on_disk, remote):
    rows, signals = on_disk.rows()[::3], list(on_disk.manifest.signals)
    remote.read(rows[:1], signals=signals)  # codec tables
    for future in remote.fetch(rows, signals):
        future.result()
    before = remote.mirror.requests
    require_equal(remote.read(rows, signals=signals), on_disk.read(rows, signals=signals))
    assert remote.mirror.requests == before


def test_a_copy_and_a_pickled_one_read_the_same(on_disk, remote):
    for other in (copy.copy(remote), pickle.loads(pickle.dumps(remote))):
        require_equal(all_of(other), all_of(on_disk))


def test_a_limit_below_the_cache_evicts_and_reads_the_same(on_disk, tmp_path):
    one_unit = max(p.stat().st_size for p in on_disk.path.rglob("*.array_record"))
    remote = from_directory(on_disk, tmp_path, most_bytes=3 * one_unit)
    generator = np.random.default_rng(0)
    for _ in range(2):
        rows = generator.permutation(on_disk.rows())
        require_equal(all_of(remote, rows), all_of(on_disk, rows))
    roomy = from_directory(on_disk, tmp_path / "roomy")
    all_of(roomy)
    assert remote.mirror.bytes > roomy.mirror.bytes, (remote.mirror.bytes, roomy.mirror.bytes)


def damaged(path, *, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def without_fingerprints(manifest):
    def plain(unit):
        files = {n: dataclasses.replace(f, fingerprint="") for n, f in unit.files.items()}
        return dataclasses.replace(unit, files=files)

    parts = [dataclasses.replace(p, units=(*map(plain, p.units),)) for p in manifest.parts]
    return dataclasses.replace(manifest, parts=(*parts,))


@pytest.mark.parametrize("what", ["a record", "the index", "an array", "a statistic"])
def test_damage_in_the_mirror_is_found_and_fetched_again(on_disk, tmp_path, what):
    all_of(from_directory(on_disk, tmp_path))
    remote = from_directory(on_disk, tmp_path)
    if what == "a record":
        # In files this small the fingerprint, which is checked before, covers every record.
        remote = Cache(remote.path, without_fingerprints(remote.manifest), remote.mirror)
    layout = PartLayout(remote.path / remote.manifest.parts[0].path)
    if what == "a statistic":
        damaged(next(iter(sorted(layout.statistics.glob("*.npy")))), at=200)
    elif what == "an array":
        for path in layout.array("hidden/1").glob("c.*"):
            damaged(path, at=10)
    else:
        path = layout.records("logits", 0)
        damaged(path, at=6000 if what == "a record" else path.stat().st_size - 65536 - 60)
    require_equal(all_of(remote), all_of(on_disk))


def test_damage_in_the_bucket_is_named(on_disk, tmp_path):
    shutil.copytree(on_disk.path, tmp_path / "bucket")
    cache = open_cache(tmp_path / "bucket")
    file = PartLayout(cache.path / cache.manifest.parts[0].path).records("logits", 0)
    damaged(file, at=6000)
    remote = from_directory(cache, tmp_path)
    told = r"logits/unit-00000.*damaged.*fetched twice from .*bucket"
    with pytest.raises(ValueError, match=told):
        all_of(remote)


def test_zeros_in_place_of_a_range_are_never_a_row(on_disk, remote):
    """A mirror whose map says more than is there, as after a power cut, is fetched again."""
    all_of(remote)
    for path in remote.path.rglob("*.array_record"):
        with path.open("r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    fresh = from_directory(on_disk, remote.mirror.folder.parent.parent)
    require_equal(all_of(fresh), all_of(on_disk))


def test_a_bucket_without_a_manifest_is_no_cache(bucket, tmp_path):
    with pytest.raises(ValueError, match=rf"{bucket}: not a sealed cache.*manifest\.json"):
        open_cache(bucket, mirror=tmp_path)


def test_a_bucket_that_is_not_there_is_one_message(bucket, tmp_path):
    with pytest.raises(StoreError, match="no such bucket"):
        open_cache("s3://nobodys-bucket/cache", mirror=tmp_path)


def test_another_scheme_is_refused_with_those_that_work(tmp_path):
    with pytest.raises(ValueError, match=r"ftp://.*supported: a local path, s3://, gs://"):
        open_cache("ftp://host/cache", mirror=tmp_path)


def test_a_part_of_another_cache_that_is_not_there_is_named(on_disk, bucket, tmp_path):
    part = dataclasses.replace(
        on_disk.manifest.parts[0], path="../other/parts/0000", plan_sha256="0" * 64
    )
    manifest = dataclasses.replace(on_disk.manifest, parts=(part,))
    (tmp_path / "merged").mkdir()
    write_manifest(tmp_path / "merged", manifest, replaces=None)
    upload(tmp_path / "merged", bucket)
    with pytest.raises(ValueError, match=r"s3://tests/other/parts/0000, which is missing"):
        open_cache(bucket, mirror=tmp_path / "mirror")


def test_a_cache_of_a_thousand_units_opens_by_one_request(on_disk, bucket, tmp_path, monkeypatch):
    (part,) = on_disk.manifest.parts
    many = tuple(part.units[i % len(part.units)] for i in range(1000))
    (tmp_path / "many").mkdir()
    manifest = dataclasses.replace(on_disk.manifest, parts=(dataclasses.replace(part, units=many),))
    write_manifest(tmp_path / "many", manifest, replaces=None)
    upload(tmp_path / "many", bucket)
    asked = []
    store = type(open_store(bucket))
    for verb in ("get", "head", "list"):
        plain = getattr(store, verb)
        monkeypatch.setattr(
            store, verb, lambda *a, p=plain, **k: (asked.append(a[1:]), p(*a, **k))[1]
        )
    cache = open_cache(bucket, mirror=tmp_path)
    assert len(cache) == sum(unit.rows for unit in many)
    assert len(asked) == 1
