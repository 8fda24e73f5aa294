"""Signals are added to a sealed cache, removed from it, and deleted."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.capture.job import precompute
from decant.pipelines.config import Attention, Hidden
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.garbage import unnamed
from decant.pipelines.upkeep.remove import remove_signals
from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.identity import file_sha256
from decant.schemas.manifest.manifest import read_manifest
from tests.making.caches import tiny_cache, tiny_settings

MORE = {"hidden": Hidden(layers=(1,), width=6), "attention": Attention(layers=(0,))}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("add")


@pytest.fixture(scope="module")
def logits_only(root) -> Path:
    return tiny_cache(root).path


@pytest.fixture(scope="module")
def with_both(root) -> Path:
    """The same rows, captured with all signals at once."""
    return tiny_cache(root, output=root / "at-once", **MORE).path


def copy(cache: Path, to: Path) -> Path:
    return Path(shutil.copytree(cache, to))


def hashes(cache: Path) -> dict[str, str]:
    return {
        path.relative_to(cache).as_posix(): file_sha256(path)
        for path in cache.rglob("*")
        if path.is_file()
    }


def test_added_signals_equal_those_of_one_capture_and_no_other_file_changes(
    root, logits_only, with_both, tmp_path
):
    cache = copy(logits_only, tmp_path / "cache")
    before = hashes(cache)
    precompute(tiny_settings(root, output=cache, **MORE))
    after = hashes(cache)
    changed = {path for path, sha in before.items() if after.get(path) != sha}
    assert changed == {"manifest.json"}
    at_once = open_cache(with_both)
    ours, theirs = open_cache(cache).manifest.signals, at_once.manifest.signals
    assert ours.keys() == theirs.keys() == {"logits", "hidden/1", "attention/0"}
    names = ("hidden/1", "attention/0")
    assert all(ours[name].signal_id == theirs[name].signal_id for name in names)
    rows = at_once.rows()
    added, captured = (c.read(rows, signals=names) for c in (open_cache(cache), at_once))
    for name in names:
        np.testing.assert_array_equal(added[name], captured[name])
    assert not list(cache.rglob("plan-adding-*"))


def test_an_open_cache_can_be_read_while_signals_are_added(root, logits_only, tmp_path):
    cache = copy(logits_only, tmp_path / "cache")
    reader = open_cache(cache)
    precompute(tiny_settings(root, output=cache, hidden=Hidden(layers=(0,))))
    assert reader.read([0])["topk_ids"].shape == (1, 64, 8)
    with pytest.raises(ValueError, match=r"no signal 'hidden/0'; this cache holds logits$"):
        reader.read([0], signals=("hidden/0",))
    assert open_cache(cache).read([0], signals=("hidden/0",))["hidden/0"].shape == (1, 64, 32)


def test_asking_for_signals_that_are_there_does_nothing(root, with_both):
    before = hashes(with_both)
    precompute(tiny_settings(root, output=with_both, **MORE))
    precompute(tiny_settings(root, output=with_both))
    assert hashes(with_both) == before


def test_a_signal_is_not_replaced_by_one_with_other_settings(root, with_both):
    other = tiny_settings(root, output=with_both, hidden=Hidden(layers=(1,), dtype="int8"))
    with pytest.raises(ValueError, match=r"holds hidden/1 with .*'width': 6.* asks for .*int8"):
        precompute(other)


def test_other_rows_or_another_teacher_are_refused(root, logits_only, tmp_path):
    cache = copy(logits_only, tmp_path / "cache")
    config = tiny_settings(root, output=cache, **MORE)
    corpus = dataclasses.replace(config.corpus, sequence_length=32)
    with pytest.raises(ValueError, match=r"another capture\n  corpus: there .*rows of 64"):
        precompute(dataclasses.replace(config, corpus=corpus))
    teacher = dataclasses.replace(config.teacher, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"another capture\n  teacher: there .*float32"):
        precompute(dataclasses.replace(config, teacher=teacher))


def test_the_settings_that_differ_are_named_with_both_values(root, logits_only, tmp_path):
    cache = copy(logits_only, tmp_path / "cache")
    config = tiny_settings(root, output=cache)
    corpus = dataclasses.replace(config.corpus, heldout=0.375, open_rows=5)
    other = dataclasses.replace(config, corpus=corpus)
    with pytest.raises(ValueError, match="another capture") as refused:
        precompute(other)
    there = config.corpus
    assert f"  corpus.heldout: there {there.heldout}, asked for 0.375\n" in str(refused.value)
    assert f"  corpus.open_rows: there {there.open_rows}, asked for 5\n" in str(refused.value)
    assert "shard_bytes" not in str(refused.value)
    quantized = dataclasses.replace(config.teacher, quantize="int8")
    with pytest.raises(ValueError, match=r"  teacher\.quantize: there none, asked for int8\n"):
        precompute(dataclasses.replace(config, teacher=quantized))
    request = cache / "parts/0000/request.json"
    before = {n: v for n, v in read_json(request).items() if n != "settings"}
    write_json(request, before)  # as release 0.8 wrote it
    with pytest.raises(ValueError, match=r"before release 0\.9 .* is one of .*corpus\.heldout"):
        precompute(other)


def test_of_two_additions_at_once_both_are_sealed(root, logits_only, tmp_path):
    cache = copy(logits_only, tmp_path / "cache")
    second = tiny_settings(root, output=cache, hidden=Hidden(layers=(2,)))

    from decant.pipelines.capture import addition

    def overtaken(*arguments):
        # The first addition seals while the second captures.
        precompute(tiny_settings(root, output=cache, hidden=Hidden(layers=(0,))))
        return seal_addition(*arguments)

    seal_addition = addition.seal_addition
    patch = pytest.MonkeyPatch()
    calls = []
    patch.setattr(
        addition,
        "seal_addition",
        lambda *a: calls.append(a) or (overtaken(*a) if len(calls) == 1 else seal_addition(*a)),
    )
    try:
        precompute(second)
    finally:
        patch.undo()
    opened = open_cache(cache)
    assert opened.manifest.signals.keys() == {"logits", "hidden/0", "hidden/2"}
    opened.read(opened.rows(), signals=("logits", "hidden/0", "hidden/2"))


def test_a_removed_signal_is_unlinked_then_deleted_by_gc(root, with_both, tmp_path):
    cache = copy(with_both, tmp_path / "cache")
    reader, files = open_cache(cache), hashes(cache)
    remove_signals(cache, ["hidden/1"])
    assert {p for p, sha in hashes(cache).items() if files[p] != sha} == {"manifest.json"}
    assert "hidden/1" not in open_cache(cache).manifest.signals
    reader.read([0], signals=("hidden/1",))  # an open cache can still read it
    collect(cache)
    gone = files.keys() - hashes(cache).keys()
    assert {path.split("/")[2] for path in gone} == {"hidden", "commits", "statistics"}
    assert all("hidden" in path for path in gone)
    opened = open_cache(cache)
    opened.read(opened.rows(), signals=("logits", "attention/0"))
    assert list(unnamed(cache)) == []


def test_a_removed_signal_comes_back_without_capture_if_nothing_was_deleted(
    root, with_both, tmp_path, monkeypatch
):
    cache = copy(with_both, tmp_path / "cache")
    before = read_manifest(cache)
    remove_signals(cache, ["attention/0"])
    monkeypatch.setattr(
        "decant.pipelines.capture.unit.write_commits", lambda *_: pytest.fail("captured")
    )
    again = precompute(tiny_settings(root, output=cache, **MORE))
    assert again.signals == before.signals
    assert again.cache_id == before.cache_id


def test_files_of_a_removed_signal_are_not_overwritten_by_a_new_one_of_that_name(
    root, with_both, tmp_path
):
    cache = copy(with_both, tmp_path / "cache")
    remove_signals(cache, ["attention/0"])
    other = tiny_settings(
        root, output=cache, hidden=MORE["hidden"], attention=Attention(layers=(0,), heads="mean")
    )
    with pytest.raises(ValueError, match=r"removed from this cache but not deleted; run .* gc"):
        precompute(other)
    collect(cache)
    precompute(other)
    batch = open_cache(cache).read([0, 1], signals=("attention/0",))
    assert batch["attention/0"].shape == (2, 1, 64, 64)


def test_logits_and_missing_signals_cannot_be_removed(with_both):
    with pytest.raises(ValueError, match="every cache holds logits"):
        remove_signals(with_both, ["logits"])
    with pytest.raises(ValueError, match="no signal 'hidden/7'; this cache holds attention/0, "):
        remove_signals(with_both, ["hidden/7"])


def test_the_commands_print_what_they_did(with_both, tmp_path):
    cache = copy(with_both, tmp_path / "cache")

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "decant.pipelines", *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "now holds attention/0, logits" in run("remove", str(cache), "hidden/1")
    dry = run("gc", str(cache), "--dry-run")
    assert "parts/0000/hidden/1" in dry
    assert "could be deleted" in dry
    assert (cache / "parts/0000/hidden/1").exists()
    assert "deleted" in run("gc", str(cache))
    assert not (cache / "parts/0000/hidden/1").exists()


def test_a_damaged_array_is_named_at_the_first_read(with_both, tmp_path):
    """One damage of each kind; `tests/schemas/arrays` tests all of them."""
    for damage in (Path.unlink, _truncate, _flip, _swap):
        cache = copy(with_both, tmp_path / damage.__name__)
        file = cache / "parts/0000/attention/0/c.1.0.0.0"
        damage(file)
        opened = open_cache(cache)
        rows = [int(n) for n in opened.rows() if _unit(opened, int(n)) == 1]
        with pytest.raises(ValueError, match=r"attention/0.*unit 1|attention/0/c\.1\.0\.0\.0") as e:
            opened.read(rows, signals=("attention/0",))
        assert str(file) in str(e.value)
        opened.read(rows)  # logits are undamaged
        others = [int(n) for n in opened.rows() if _unit(opened, int(n)) == 3]
        opened.read(others, signals=("attention/0",))


def test_a_commit_of_another_unit_is_refused(with_both, tmp_path):
    cache = copy(with_both, tmp_path / "cache")
    commits = cache / "parts/0000/commits"
    shutil.copy(commits / "hidden-1-unit-00002.json", commits / "hidden-1-unit-00001.json")
    opened = open_cache(cache)
    rows = [int(n) for n in opened.rows() if _unit(opened, int(n)) == 1]
    with pytest.raises(ValueError, match="not the commit of hidden/1, unit 1,"):
        opened.read(rows, signals=("hidden/1",))


def _unit(cache, row: int) -> int:
    ends = np.cumsum([unit.rows for unit in cache.manifest.parts[0].units])
    return int(np.searchsorted(ends, row, side="right"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def _swap(path: Path) -> None:
    other = path.with_name("c.2.0.0.0")
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
