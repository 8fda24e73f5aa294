"""The mirror of a bucket: what was fetched is right, whoever else reads, dies or damages it."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from decant.store import StoreError
from decant.store.mirror import Mirror, _evict, _held, open_mirror
from decant.store.mirrored_file import PAGE
from tests.paths import ROOT

SIZE = 1_000_000


@pytest.fixture
def objects(tmp_path):
    """Objects `a` to `d` of random bytes and `first`, in a directory that stands for a bucket."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    (folder / "first").write_bytes(b"describes the others")
    for seed, name in enumerate("abcd"):
        (folder / name).write_bytes(np.random.default_rng(seed).bytes(SIZE + seed))
    return folder


def mirror_of(objects, place, **settings) -> Mirror:
    return open_mirror(str(objects), first="first", place=place, **settings)


def file_of(mirror, name="a"):
    return mirror.file(mirror.files / name, (Path(mirror.url) / name).stat().st_size)


def test_ranges_are_those_of_the_object_and_each_is_fetched_once(objects, tmp_path):
    mirror, data = mirror_of(objects, tmp_path), (objects / "a").read_bytes()
    file = file_of(mirror)
    for begin, end in ((0, 1), (5000, 9000), (SIZE - 7, SIZE), (123_456, 345_678)):
        assert file.read(begin, end) == data[begin:end]
    once = mirror.requests, mirror.bytes
    assert once[0] == 4
    assert once[1] < 4 * 2 * PAGE + 345_678 - 123_456
    assert file.read(130_000, 340_000) == data[130_000:340_000]
    assert file.read(0, 4096) == data[:4096]
    assert (mirror.requests, mirror.bytes) == once
    assert file.path.stat().st_size == SIZE
    assert file.path.stat().st_blocks * 512 < once[1] + 16 * PAGE


def test_ranges_close_together_come_by_one_request_and_distant_ones_by_two(objects, tmp_path):
    mirror = mirror_of(objects, tmp_path)
    file_of(mirror).read(0, 10)
    for ranges, requests in (
        ([(8_000, 9_000), (100_000, 101_000), (300_000, 300_001)], 1),
        ([(400_000, 400_001), (900_000, 900_001)], 2),
    ):
        before = mirror.requests
        for future in file_of(mirror).start(ranges):
            future.result()
        assert mirror.requests - before == requests


def test_another_process_and_a_later_one_find_what_was_fetched(objects, tmp_path):
    first = mirror_of(objects, tmp_path)
    file_of(first).read(0, SIZE)
    later = mirror_of(objects, tmp_path)
    assert later.files == first.files
    assert file_of(later).read(10, 20) == (objects / "a").read_bytes()[10:20]
    assert later.requests == 0


def test_another_description_has_another_folder(objects, tmp_path):
    before = mirror_of(objects, tmp_path)
    (objects / "first").write_bytes(b"describes others")
    assert mirror_of(objects, tmp_path).files != before.files


def test_threads_that_need_the_same_bytes_fetch_them_once(objects, tmp_path):
    mirror, data = mirror_of(objects, tmp_path), (objects / "a").read_bytes()
    file = file_of(mirror)
    spans = [(k * 1000, k * 1000 + 50_000) for k in range(0, 900, 7)] * 4
    with ThreadPoolExecutor(12) as pool:
        for (begin, end), got in zip(spans, pool.map(lambda s: file.read(*s), spans), strict=True):
            assert got == data[begin:end]
    assert mirror.bytes < 2 * SIZE


def test_above_the_limit_the_file_that_was_unused_longest_goes_and_is_fetched_again(
    objects, tmp_path
):
    mirror = mirror_of(objects, tmp_path, most_bytes=2_300_000)
    data = {name: (objects / name).read_bytes() for name in "abc"}
    foreign = tmp_path / "mine.txt"
    foreign.write_text("not the mirror's")
    beside = mirror.folder.parent / "notes"
    beside.write_text("not the mirror's")
    open_files = {}
    for step, name in enumerate("abcabcabc"):
        file = open_files.setdefault(name, file_of(mirror, name))
        for begin in (0, 500_000, 900_000):
            assert file.read(begin, begin + 90_000) == data[name][begin : begin + 90_000]
        file.read(0, SIZE)
        os.utime(file.path, ns=(step * 10**9, step * 10**9))
        _evict(mirror.folder.parent, mirror.most_bytes)
        assert sum(found.bytes for found in _held(mirror.folder.parent)) <= mirror.most_bytes
    assert mirror.bytes > 8 * SIZE * 0.9
    assert foreign.exists()
    assert beside.exists()
    assert (mirror.files / "first").exists()


def test_a_file_that_somebody_holds_is_not_deleted(objects, tmp_path):
    mirror, other = mirror_of(objects, tmp_path), mirror_of(objects, tmp_path)
    file = file_of(mirror)
    with file.held():
        file.ensure([(0, SIZE)])
        _evict(other.folder.parent, 1)
        assert file.path.exists()
    _evict(other.folder.parent, 1)
    assert not file.path.exists()
    assert file.read(7, 9) == (objects / "a").read_bytes()[7:9]
    assert file.path.exists()


def test_a_mirror_file_of_another_size_is_fetched_again(objects, tmp_path):
    file_of(mirror_of(objects, tmp_path)).read(0, SIZE)
    again = mirror_of(objects, tmp_path)
    os.truncate(again.files / "a", 500_000)
    assert file_of(again).read(0, SIZE) == (objects / "a").read_bytes()


def test_bytes_that_are_forgotten_are_fetched_again(objects, tmp_path):
    mirror = mirror_of(objects, tmp_path)
    file = file_of(mirror)
    file.read(0, SIZE)
    with file.path.open("r+b") as damaged:
        damaged.write(b"\0" * 9000)
    file.forget()
    assert file.read(0, SIZE) == (objects / "a").read_bytes()


READER = """
import os, sys
import numpy as np
from pathlib import Path
from decant.store import mirror as module
place, most = Path(sys.argv[2]), int(sys.argv[3])
mirror = module.open_mirror(sys.argv[1], first="first", place=place, most_bytes=most)
data = {n: (Path(sys.argv[1]) / n).read_bytes() for n in "abcd"}
generator = np.random.default_rng(os.getpid())
print("reading", flush=True)
for _ in range(int(sys.argv[4])):
    name, begin = "abcd"[generator.integers(4)], int(generator.integers(999_000))
    end = min(begin + int(generator.integers(1, 120_000)), 1_000_000)
    size = len(data[name])
    assert mirror.file(mirror.files / name, size).read(begin, end) == data[name][begin:end]
"""


def reader(objects, place, *, most_bytes=10**9, reads=400):
    arguments = [str(objects), str(place), str(most_bytes), str(reads)]
    return subprocess.Popen(
        [sys.executable, "-c", READER, *arguments], stdout=subprocess.PIPE, cwd=ROOT
    )


def test_processes_share_a_mirror_that_is_too_small_for_them(objects, tmp_path):
    """Each deletes what the others fetched, and all read the right bytes."""
    readers = [reader(objects, tmp_path, most_bytes=1_500_000) for _ in range(3)]
    for one in readers:
        one.communicate(timeout=60)
        assert one.returncode == 0


def test_after_sigkill_at_any_time_all_that_is_marked_is_there(objects, tmp_path):
    for seconds in (0.003, 0.01, 0.03):
        process = reader(objects, tmp_path, reads=10**6)
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        mirror = mirror_of(objects, tmp_path)
        for found in _held(mirror.folder.parent):
            marks = np.frombuffer(found.marks.read_bytes(), np.uint8)
            data, here = (objects / found.path.name).read_bytes(), found.path.read_bytes()
            for page in np.flatnonzero(marks).tolist():
                at = slice(page * PAGE, (page + 1) * PAGE)
                assert here[at] == data[at]
    last = reader(objects, tmp_path)
    last.communicate(timeout=60)
    assert last.returncode == 0


def test_a_forked_process_is_told_to_be_spawned(objects, tmp_path):
    mirror = mirror_of(objects, tmp_path)
    mirror.process -= 1
    with pytest.raises(RuntimeError, match="spawn"):
        file_of(mirror).read(0, 1)


def test_a_place_that_cannot_be_written_is_named(objects, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file.*no mirror can be made there"):
        mirror_of(objects, tmp_path / "file" / "below")


def test_an_object_that_got_lost_is_an_error_and_not_zeros(objects, tmp_path):
    mirror = mirror_of(objects, tmp_path)
    file = file_of(mirror)
    (objects / "a").unlink()
    with pytest.raises(FileNotFoundError):
        file.read(0, 10)
