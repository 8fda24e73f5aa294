"""A capture does not depend on umask, paths, other workers or the limit on open files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.capture import part as part_capture
from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden
from decant.pipelines.rows import tokenise
from decant.pipelines.runners.worker_error import WorkerError
from decant.schemas import open_cache
from decant.schemas.disk.identity import file_sha256, remembered_sha256s
from decant.schemas.disk.layout import part_layout
from tests.making.caches import tiny_cache, tiny_settings, write_corpus
from tests.paths import environment
from tests.pickles import pickles_below

SIGNALS = {
    "profile": "fast",
    "draws": 3,
    "shard_bytes": 2048,
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers=(1,)),
}
ODD = "ein Ort, mit Ümlauten & 日本 %20#"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("around")
    write_corpus(root / "corpus", files=4, words=120)
    return root


@pytest.fixture(scope="module")
def undisturbed(root) -> str:
    return tiny_cache(root, **SIGNALS).manifest.cache_id


@pytest.fixture
def copy(root, undisturbed, tmp_path) -> Path:
    """A directory with an odd name that holds copies of corpus and teacher."""
    for name in ("corpus", "teacher"):
        shutil.copytree(root / name, tmp_path / ODD / name)
    return tmp_path / ODD


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_umask_and_odd_relative_paths_change_nothing(undisturbed, copy, monkeypatch, umask):
    monkeypatch.chdir(copy)
    before = os.umask(umask)
    try:
        cache = tiny_cache(Path(), **SIGNALS)
    finally:
        os.umask(before)
    assert cache.manifest.cache_id == undisturbed
    cache.read(cache.rows(), signals=tuple(cache.manifest.signals))


class Stop(RuntimeError):
    pass


def interrupted(config, monkeypatch, where: str) -> None:
    """Capture until the function `where` is called, then stop."""

    def stop(*_, **__):
        raise Stop("stop here")

    with monkeypatch.context() as patch:
        patch.setattr(where, stop)
        with pytest.raises(RuntimeError, match="stop here"):
            precompute(config)


def test_a_capture_that_was_moved_goes_on(undisturbed, copy, monkeypatch, tmp_path):
    monkeypatch.chdir(copy)
    interrupted(
        tiny_settings(Path(), **SIGNALS),
        monkeypatch,
        "decant.pipelines.capture.remaining_units.create_array",
    )
    moved = copy.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    # No teacher is loaded, as in a new process.
    monkeypatch.setattr("decant.pipelines.teacher.loaded._loaded", {})
    cache = tiny_cache(moved.relative_to(tmp_path), **SIGNALS)
    assert cache.manifest.cache_id == undisturbed


def edit(file: Path, *, keep_times: bool = False) -> None:
    """Reverse the text of the file; its size stays."""
    stat, text = file.stat(), file.read_text()
    file.write_text(text[::-1])
    if keep_times:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_source_that_changes_once_its_rows_are_written_changes_nothing(
    undisturbed, copy, monkeypatch
):
    original, changed = part_capture.capture_remaining, copy / "corpus" / "document-001.txt"

    def after_edit(*args, **kwargs):
        edit(changed)
        return original(*args, **kwargs)

    monkeypatch.setattr(part_capture, "capture_remaining", after_edit)
    assert tiny_cache(copy, **SIGNALS).manifest.cache_id == undisturbed


def test_a_source_that_changes_while_it_is_tokenised_is_named(undisturbed, copy, monkeypatch):
    original, changed = tokenise.cut_shards, copy / "corpus" / "document-001.txt"

    def after_edit(*args, **kwargs):
        edit(changed)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "cut_shards", after_edit)
        with pytest.raises(WorkerError, match=r"document-001\.txt: changed while"):
            tiny_cache(copy, **SIGNALS)
    edit(changed)  # back to the old text
    assert tiny_cache(copy, **SIGNALS).manifest.cache_id == undisturbed


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_source_that_changes_between_runs_is_refused_by_name(copy, monkeypatch, keep_times):
    config = tiny_settings(copy, **SIGNALS)
    interrupted(config, monkeypatch, "decant.pipelines.rows.tokenise.cut_shards")
    edit(copy / "corpus" / "document-001.txt", keep_times=keep_times)
    with pytest.raises(ValueError, match=r"files: document-001\.txt has changed\n"):
        precompute(config)
    (copy / "corpus" / "document-002.txt").rename(copy / "corpus" / "other.txt")
    with pytest.raises(
        ValueError,
        match=r"001\.txt has changed, document-002\.txt is missing\nBring its files back",
    ):
        precompute(config)


def test_a_hash_memory_that_cannot_be_written_or_read_is_no_error(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    for memory in (Path("/proc/nowhere/digests.json"), tmp_path):
        assert remembered_sha256s([file], memory=memory) == [file_sha256(file)]
    damaged = tmp_path / "digests.json"
    damaged.write_bytes(b"\xff\x00")
    assert remembered_sha256s([file], memory=damaged) == [file_sha256(file)]
    assert sorted(tmp_path.iterdir()) == [damaged, file]


WORKER = """
import os, signal, sys
from pathlib import Path
from decant.pipelines.capture import unit
part, number, stops = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "stops"
original = unit.write_records

def write(path, records, **kind):
    if stops:
        os.kill(os.getpid(), signal.SIGSTOP)
    return original(path, records, **kind)

unit.write_records = write
unit.capture_unit(number, part, part / "plan.json")
"""


def worker(part: Path, *, unit: int, stops: bool) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(part), str(unit), "stops" if stops else "runs"]
    return subprocess.Popen(command, env=environment())


def test_a_worker_of_a_unit_that_wakes_after_the_seal_changes_nothing(
    root, undisturbed, monkeypatch
):
    config = tiny_settings(root, **SIGNALS, output=root / "zombie")
    interrupted(config, monkeypatch, "decant.pipelines.capture.remaining_units.create_array")
    part = part_layout(config.output, 0).root.resolve()
    zombie = worker(part, unit=1, stops=True)
    other = worker(part, unit=1, stops=False)
    try:
        assert other.wait(120) == 0
        while state(zombie) != "T":
            assert zombie.poll() is None
            time.sleep(0.01)
        assert precompute(config).cache_id == undisturbed
        before = digests(config.output)
        zombie.send_signal(signal.SIGCONT)
        assert zombie.wait(120) == 0
    finally:
        for process in (zombie, other):
            process.kill()
            process.wait()
    assert digests(config.output) == before
    cache, expected = open_cache(config.output), open_cache(root / "cache")
    assert cache.manifest == expected.manifest
    signals = tuple(cache.manifest.signals)
    arrays, undisturbed_arrays = (c.read(c.rows(), signals=signals) for c in (cache, expected))
    for name, array in undisturbed_arrays.items():
        assert arrays[name].tobytes() == array.tobytes(), name


def state(process: subprocess.Popen) -> str:
    """The kernel's letter for the state: R, S, or T for stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def digests(cache: Path) -> dict[str, str]:
    files = (path for path in cache.rglob("*") if path.is_file())
    return {path.relative_to(cache).as_posix(): file_sha256(path) for path in files}


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pathlib import Path
import numpy as np
from decant.pipelines.capture import step_inputs
from decant.pipelines.capture.job import precompute
from decant.schemas import open_cache
from tests.making.caches import tiny_settings, write_corpus
step_inputs.choose_unit_rows = lambda *_, **__: 1
root = Path(sys.argv[1])
write_corpus(root / "corpus", files=8, words=500)
config = tiny_settings(root, sequence_length=16, shard_bytes=1 << 20, batch_rows=1)
precompute(config)
cache = open_cache(config.output)
assert len(cache.manifest.parts[0].units) == len(cache) > 256, len(cache)
chance = np.random.default_rng(0)
for _ in range(8):
    cache.read(chance.permutation(len(cache))[:200])
"""


@pytest.mark.slow
def test_there_may_be_more_units_than_a_process_may_open_files(tmp_path):
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_in_a_cache_is_a_pickle(root, undisturbed):
    files = [path for path in (root / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".npy", ".json", ".array_record"}
    assert pickles_below(root / "cache") == []
    for path in (root / "cache").rglob("*.npy"):
        assert not np.load(path, allow_pickle=False).dtype.hasobject
