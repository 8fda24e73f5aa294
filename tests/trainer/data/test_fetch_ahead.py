"""Batches from a bucket: those of the disk, fetched ahead, with the expected number of requests."""

import time

import numpy as np
import pytest

from decant.schemas import Cache
from decant.schemas.disk.array_record import RecordReaders, write_records
from decant.store import StoreError
from decant.store.mirror import Mirror, open_mirror
from decant.store.mirrored_file import PIECE
from decant.trainer.config import Data, MixedCache
from decant.trainer.data.batches import Batches
from decant.trainer.data.block_order import WINDOW_ROWS, BlockOrder
from decant.trainer.data.fetch_ahead import FetchAhead, WholeBlocks, most_rows_ahead


def remote(cache, place, most_bytes=1 << 20):
    """The cache through a mirror; its own directory stands for the bucket."""
    mirror = open_mirror(str(cache.path), first="manifest.json", place=place, most_bytes=most_bytes)
    return Cache(mirror.files, cache.manifest, mirror)


def read_all(batches, count=60):
    taken = [batches.next() for _ in range(count)]
    batches.close()
    return taken


def require_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"rows"}:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_batches_are_those_from_disk_also_after_a_restart(cache, tmp_path, shuffle):
    config = Data(batch_rows=3, shuffle=shuffle)
    expected = read_all(Batches(cache, config=config))
    batches = Batches(remote(cache, tmp_path), config=config)
    first = [batches.next() for _ in range(20)]
    state = batches.state()
    batches.close()
    again = Batches(remote(cache, tmp_path / "another"), config=config)
    again.restore(state)
    require_equal([*first, *read_all(again, 40)], expected)


def test_of_several_caches_one_may_be_in_a_bucket(cache, drawn_cache, tmp_path):
    config = Data(batch_rows=4, shuffle="blocks", caches=(MixedCache(cache.path),))
    expected = read_all(Batches(drawn_cache, config=config, others=[cache]))
    mixed = Batches(drawn_cache, config=config, others=[remote(cache, tmp_path)])
    require_equal(read_all(mixed), expected)


def test_a_bucket_that_fails_is_one_error_and_the_next_run_goes_on(cache, tmp_path, monkeypatch):
    config = Data(batch_rows=3)
    expected = read_all(Batches(cache, config=config))
    plain, left = Mirror._get, [12]

    def failing(self, key, *arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise StoreError(f"{self.url}/{key}: the server is busy or failing (503)")
        return plain(self, key, *arguments, **named)

    monkeypatch.setattr(Mirror, "_get", failing)
    batches, taken, states = Batches(remote(cache, tmp_path), config=config), [], []

    def take_all():
        for _ in range(60):
            states.append(batches.state())
            taken.append(batches.next())

    with pytest.raises(StoreError, match=r"/cache/.*: the server is busy or failing"):
        take_all()
    batches.close()
    monkeypatch.setattr(Mirror, "_get", plain)
    again = Batches(remote(cache, tmp_path), config=config)
    again.restore(states[-1])
    require_equal([*taken, *read_all(again, 60 - len(taken))], expected)


def test_it_stays_ahead_by_its_number_of_rows_and_ends_when_closed():
    fetched = []

    def fetch(batches):
        fetched.append(batches)
        return []

    ahead = FetchAhead(fetch, first=5, batch_rows=128, most_rows=1024)
    # The first batch alone, so that it comes soon; then those of 256 rows together.
    groups = [range(5, 6), *(range(at, at + 2) for at in range(6, 20, 2))]
    for taken in range(4):
        time.sleep(0.1)
        assert fetched == [group for group in groups if group[0] < 5 + taken + 8]
        ahead.taken()
    ahead.close()


def test_batches_to_come_are_fetched_by_one_call_that_sees_neighbours(cache, tmp_path, monkeypatch):
    config, calls = Data(batch_rows=3), []
    taken = read_all(Batches(cache, config=config), 15)
    monkeypatch.setattr(Cache, "fetch", lambda _, rows, *__, **___: calls.append(rows) or [])
    batches = Batches(remote(cache, tmp_path, most_bytes=1 << 30), config=config)
    batches.next()
    while len(calls) < 4:
        time.sleep(0.01)
    batches.close()
    for got, first, last in zip(calls, (0, 1, 3, 7), (1, 3, 7, 15), strict=False):
        rows = np.concatenate([batch["rows"] for batch in taken[first:last]])
        assert got.tolist() == np.unique(rows).tolist()


def test_of_a_small_cache_an_epoch_is_fetched_ahead_and_not_many(cache, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Cache, "fetch", lambda _, rows, *__, **___: calls.append(rows) or [])
    batches = Batches(remote(cache, tmp_path, most_bytes=1 << 30), config=Data(batch_rows=3))
    batches.next()
    time.sleep(0.5)
    batches.close()
    assert sum(map(len, calls)) <= 2 * len(cache)


def test_rows_come_in_pieces_of_many_if_the_mirror_keeps_them(tmp_path):
    folder = tmp_path / "bucket"
    folder.mkdir()
    data = [np.random.default_rng(n).bytes(4000) for n in range(1024)]
    entry = write_records(folder / "unit", data)
    (folder / "first").write_bytes(b"")
    mirror = open_mirror(str(folder), first="first", place=tmp_path, most_bytes=1 << 30)
    readers, path = RecordReaders(mirror=mirror), mirror.files / "unit"
    for number in np.random.default_rng(0).permutation(1024).tolist():
        for future in readers.start(path, [number], expected=entry, in_pieces=True):
            future.result()
        assert readers.read(path, [number], expected=entry) == [data[number]]
    assert mirror.requests <= 2 + -(-entry.bytes // PIECE)
    assert mirror.bytes < entry.bytes + 300_000


@pytest.mark.parametrize(("room", "in_pieces"), [(8, True), (7, False)])
def test_rows_may_take_an_eighth_of_the_mirror(cache, tmp_path, monkeypatch, room, in_pieces):
    asked, start = {}, RecordReaders.start

    def noting(self, path, *arguments, in_pieces, **named):
        asked.setdefault(path.parent.name, set()).add(in_pieces)
        return start(self, path, *arguments, in_pieces=in_pieces, **named)

    monkeypatch.setattr(RecordReaders, "start", noting)
    units = [unit for part in cache.manifest.parts for unit in part.units]
    rows = sum(unit.files["rows"].bytes for unit in units)
    there = remote(cache, tmp_path, most_bytes=room * rows)
    require_equal([there.read([0, 5])], [cache.read([0, 5])])
    assert asked == {"rows": {in_pieces}, "logits": {False}}


def test_rows_ahead_take_at_most_a_quarter_of_the_mirror(cache, tmp_path):
    units = [unit for part in cache.manifest.parts for unit in part.units]
    row = sum(f.bytes for u in units for f in u.files.values()) / sum(u.rows for u in units)
    small = remote(cache, tmp_path, most_bytes=int(40 * row))
    assert most_rows_ahead([small], signals=()) in (9, 10)
    large = remote(cache, tmp_path, most_bytes=10**12)
    assert most_rows_ahead([large, cache], signals=()) == 16_384


def test_whole_blocks_are_those_of_the_order():
    rows = np.concatenate([np.arange(100, 200), np.arange(500, 600)])

    def of(*numbers):
        return WholeBlocks(rows).of(np.array(numbers), position=0).tolist()

    assert of(101, 130) == list(range(100, 164))
    assert of(599) == list(range(592, 600))
    assert of(528 - 1, 150) == [*range(100, 164), *range(164, 200), *range(500, 528)]
    assert of(300) == []


def test_a_block_is_named_once_in_a_window():
    blocks = WholeBlocks(np.arange(1000))
    assert len(blocks.of(np.array([3, 70]), position=0)) == 128
    assert blocks.of(np.array([5, 200]), position=16).tolist() == list(range(192, 256))
    assert blocks.of(np.array([5, 200]), position=WINDOW_ROWS - 1).tolist() == []
    assert blocks.of(np.array([5]), position=WINDOW_ROWS).tolist() == list(range(64))


@pytest.mark.parametrize("shuffle", ["blocks", "single records"])
def test_requests_and_bytes_of_an_epoch_are_those_of_the_arithmetic(tmp_path, shuffle):
    """Blocks: one request each. Single records far apart: one each. Opening a file: two."""
    records, size = 1024, 20_000
    folder = tmp_path / "bucket"
    folder.mkdir()
    data = [np.random.default_rng(n).bytes(size) for n in range(records)]
    entry = write_records(folder / "unit", data)
    (folder / "first").write_bytes(b"")
    mirror = open_mirror(str(folder), first="first", place=tmp_path, most_bytes=1 << 30)
    readers, path = RecordReaders(mirror=mirror), mirror.files / "unit"
    blocks, order = WholeBlocks(np.arange(records)), BlockOrder(np.arange(records), seed=0)
    chosen = [int(order[i][1]) for i in range(records)]
    wanted = chosen if shuffle == "blocks" else list(range(0, records, 20))
    for number in wanted:
        some = [number]
        if shuffle == "blocks":
            some = blocks.of(np.array([number]), position=0).tolist()
        for future in readers.start(path, list(some), expected=entry):
            future.result()
        (got,) = readers.read(path, [number], expected=entry)
        assert got == data[number]
    if shuffle == "blocks":
        assert mirror.requests <= records // 64 + 2
        assert mirror.bytes < 1.02 * entry.bytes
    else:
        assert mirror.requests <= len(wanted) + 2
        assert mirror.bytes < len(wanted) * (size + 2 * 4096) + 140_000
