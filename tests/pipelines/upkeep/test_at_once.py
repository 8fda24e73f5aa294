"""Commands that change one cache at once, and what a stopped `gc` leaves behind."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from decant.pipelines.__main__ import main
from decant.pipelines.upkeep.collect import collect
from decant.pipelines.upkeep.forget import forget
from decant.pipelines.upkeep.remove import remove_signals
from decant.pipelines.verification.structure import check_structure
from decant.schemas import Cache, open_cache
from decant.schemas.disk import locks, steps
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.disk.locks import capturing, changing
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.manifest import read_manifest
from tests.making.grown import LINES, NAMES, hashes
from tests.paths import environment

WHOLE = "document-000.txt"


class Killed(BaseException):
    pass


def killed() -> None:
    raise Killed


@pytest.fixture
def cache(grown, tmp_path) -> Path:
    """A cache that has forgotten a source and not overwritten it."""
    path = grown.copied(tmp_path) / "cache"
    forget(path, source=WHOLE)
    return path


def at(step: Step, visit: int, do: Callable[[], object]):
    """A `steps.reached` that calls `do` at one visit of a step."""
    left = visit

    def reached(here: Step) -> None:
        nonlocal left
        left -= here == step
        if here == step and not left:
            left = 0
            do()

    return reached


def stopped_gc(cache: Path, monkeypatch, step: Step, visit: int = 1) -> None:
    """Run a `gc` that dies at this visit of the step."""
    with monkeypatch.context() as patch:
        patch.setattr(steps, "reached", at(step, visit, killed))
        with pytest.raises(Killed):
            collect(cache)


def overwritten(cache: Path) -> Cache:
    """The opened cache. AssertionError unless it is sound and forgotten tokens are overwritten."""
    opened = open_cache(cache)
    assert check_structure(cache, opened.manifest).problems == []
    assert collect(cache).units == 0
    assert not (cache / "gc").exists()
    opened.read(opened.rows(), [name for name in NAMES if name in opened.manifest.signals])
    return opened


def started(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "decant", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_commands_that_change_a_cache_wait_for_gc_and_all_succeed(cache, monkeypatch):
    others: list[subprocess.Popen] = []

    def start_others() -> None:
        others.append(started("forget", str(cache), "--source", LINES))
        others.append(started("remove", str(cache), "attention/1"))
        others.append(started("gc", str(cache)))
        for other in others:
            assert other.stderr
            assert "another command is changing this cache" in other.stderr.readline()

    monkeypatch.setattr(steps, "reached", at(Step.FILE_MOVED, 2, start_others))
    collect(cache)
    for other in others:
        said = other.communicate(timeout=120)
        assert other.returncode == 0, said
    monkeypatch.undo()
    collect(cache)
    opened = overwritten(cache)
    assert opened.manifest.signals.keys() == {"logits", "hidden/1"}
    forgotten = {p.sources[f.source].name for p in opened.manifest.parts for f in p.forgotten}
    assert forgotten == {WHOLE, LINES}


@pytest.mark.parametrize("other", ["forget", "remove"])
def test_what_is_sealed_while_gc_runs_without_a_lock_is_kept(cache, monkeypatch, other):
    """A lock that this process holds already keeps nothing out."""
    sealed = {
        "forget": lambda: forget(cache, source=LINES),
        "remove": lambda: remove_signals(cache, ["hidden/1"]),
    }
    monkeypatch.setattr(steps, "reached", at(Step.JOURNAL_WRITTEN, 1, sealed[other]))
    collect(cache)
    monkeypatch.undo()
    manifest = open_cache(cache).manifest
    if other == "remove":
        assert "hidden/1" not in manifest.signals
        collect(cache)
    else:
        names = {part.sources[f.source].name for part in manifest.parts for f in part.forgotten}
        assert names == {WHOLE, LINES}
        assert collect(cache).units > 0
    overwritten(cache)


def test_a_gc_whose_staged_files_are_gone_before_one_was_moved_is_begun_again(
    cache, monkeypatch, capsys
):
    stopped_gc(cache, monkeypatch, Step.JOURNAL_NAMED)
    shutil.rmtree(cache / "gc")
    assert main(["gc", str(cache)]) == 0
    said = "".join(capsys.readouterr())
    assert "an earlier `gc` was stopped before it moved a file, and cannot be finished" in said
    assert "units written again without them" in said
    overwritten(cache)


def test_a_gc_whose_staged_files_are_gone_after_some_were_moved_says_what_to_do(
    cache, monkeypatch, tmp_path
):
    stopped_gc(cache, monkeypatch, Step.FILE_MOVED, 3)
    before = hashes(cache)
    shutil.move(cache / "gc", tmp_path / "away")
    with pytest.raises(ValueError, match=r"Bring .*cache/gc back and run `gc` again, or delete"):
        collect(cache)
    shutil.move(tmp_path / "away", cache / "gc")
    assert hashes(cache) == before
    collect(cache)
    overwritten(cache)


def test_a_staged_file_that_was_damaged_is_not_moved(cache, monkeypatch):
    stopped_gc(cache, monkeypatch, Step.JOURNAL_NAMED)
    staged = next((cache / "gc").rglob("logits/*"))
    staged.write_bytes(staged.read_bytes()[:-1] + b"x")
    assert "missing or damaged" in str(collect(cache).dropped)
    overwritten(cache)


@pytest.mark.parametrize(("visit", "moved"), [(0, False), (3, True)])
def test_a_damaged_journal_is_dropped_or_an_error_with_a_way_out(cache, monkeypatch, visit, moved):
    if moved:
        stopped_gc(cache, monkeypatch, Step.FILE_MOVED, visit)
    else:
        stopped_gc(cache, monkeypatch, Step.JOURNAL_NAMED)
    journal = cache / "gc.json"
    journal.write_bytes(journal.read_bytes()[:-9])
    if not moved:
        assert "gc.json: damaged" in str(collect(cache).dropped)
        overwritten(cache)
        return
    with pytest.raises(ValueError, match=r"gc\.json: damaged.*or delete .*gc\.json: the cache th"):
        collect(cache)
    journal.unlink()
    cached = open_cache(cache)
    assert check_structure(cache, cached.manifest).problems != []


@pytest.mark.parametrize("visit", [1, 5])
def test_the_journal_of_an_older_release_is_finished(cache, monkeypatch, visit):
    stopped_gc(cache, monkeypatch, Step.FILE_MOVED, visit)
    journal = read_json(cache / "gc.json")
    staged = cache / "gc" / journal.pop("staged")
    moves = [file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()]
    (staged / "parts").rename(cache / "gc/parts")
    staged.rmdir()
    replaces = read_manifest(cache, during_gc=True).cache_id
    write_json(cache / "gc.json", {**journal, "moves": moves, "replaces": replaces})
    assert collect(cache).dropped is None
    overwritten(cache)


def test_gc_leaves_a_part_that_is_being_captured_as_it_is(cache, capsys):
    remove_signals(cache, ["hidden/1"])
    before = hashes(cache)
    with capturing(cache / "parts/0000"), capturing(cache / "parts/0001"):
        assert main(["gc", str(cache)]) == 0
    said = "".join(capsys.readouterr())
    assert "parts/0000 is being captured: left as it is, run `gc` again after that" in said
    assert {p: sha for p, sha in hashes(cache).items() if p in before} == before
    collect(cache)
    overwritten(cache)


def test_a_file_system_on_which_locks_do_nothing_is_named(tmp_path, monkeypatch, capsys):
    with changing(tmp_path):
        assert capsys.readouterr().err == ""
    locks._tried.clear()
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    with changing(tmp_path):
        assert f"{tmp_path}: locks do nothing on this file system" in capsys.readouterr().err
    locks._tried.clear()
