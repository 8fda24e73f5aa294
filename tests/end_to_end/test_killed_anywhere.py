"""A capture that is killed, stopped or out of space goes on to the cache of an undisturbed run."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from decant.pipelines.__main__ import main
from decant.pipelines.config import Attention, Hidden, Sketch
from decant.pipelines.verification.structure import check_structure
from decant.schemas import open_cache
from decant.schemas.disk.layout import COUNTS, LOGITS, SKETCH
from decant.schemas.disk.steps import Step
from tests.killing import killer
from tests.making.caches import (
    command_of,
    tiny_cache,
    tiny_settings,
    write_corpus,
    write_teacher,
)
from tests.paths import environment

SIGNALS = {
    "profile": "fast",
    "draws": 3,
    "counts": 20,
    "sketch": Sketch(rank=6, dither=True),
    "hidden": Hidden(layers=(1,), dtype="int8", width=6),
    "attention": Attention(layers="all"),
}
NAMES = (LOGITS, COUNTS, SKETCH, "hidden/1", "attention/0", "attention/1")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def undisturbed(root) -> str:
    return tiny_cache(root, **SIGNALS).manifest.cache_id


def command(root: Path, output: Path) -> list[str]:
    """The command with the flags of `tiny_settings`."""
    config = tiny_settings(root, **SIGNALS, output=output)
    return [
        *command_of(config),
        *("--signals.hidden.layers", *map(str, config.signals.hidden.layers)),
        f"--signals.hidden.dtype={config.signals.hidden.dtype}",
        f"--signals.hidden.width={config.signals.hidden.width}",
        f"--signals.attention.layers={config.signals.attention.layers}",
        "--signals.logits.sketch.dither=True",
    ]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


OF_A_CAPTURE = tuple(Step)[: tuple(Step).index(Step.SEALED) + 1]
BEFORE_THE_SEAL = tuple(Step)[: tuple(Step).index(Step.MANIFEST_NAMED)]
VISITS = {
    Step.UNIT_BEGUN: (2,),
    Step.ARRAY_NAMED: (2,),
    Step.LOGITS_WRITTEN: (1, 3),
    Step.LOGITS_FLUSHED: (2,),
    Step.LOGITS_NAMED: (2, 3),
    Step.COMMIT_WRITTEN: (2, 3),
    Step.COMMIT_NAMED: (2, 3),
}
"""Visits at which a capture is killed, if not only the first. A unit's record files and commits are
those of logits, counts and sketch, in this order."""
GROWING = (
    Step.SHARD_NAMED,
    Step.ROWS_GATHERED,
    Step.PLAN_NAMED,
    Step.LOGITS_NAMED,
    Step.COMMIT_NAMED,
    Step.COMMITS_CHECKED,
    Step.MANIFEST_FLUSHED,
    Step.MANIFEST_NAMED,
)
ADDING = (
    Step.PLAN_WRITTEN,
    Step.LOGITS_NAMED,
    Step.ARRAY_NAMED,
    Step.COMMIT_NAMED,
    Step.COMMITS_CHECKED,
    Step.MANIFEST_FLUSHED,
    Step.SEALED,
)
SEALING_IN_PART = (Step.COMMITS_CHECKED, Step.MANIFEST_FLUSHED, Step.MANIFEST_NAMED)


def visits(steps: Iterable[Step]) -> list[tuple[Step, int]]:
    """Each step with each of its visits."""
    return [(step, visit) for step in steps for visit in VISITS.get(step, (1,))]


def left_over(cache: Path) -> list[str]:
    """Names of files that a finished capture must not leave."""
    names = [path.name for path in cache.rglob("*")]
    return [n for n in names if n.endswith(".tmp") or n == "work" or "adding" in n]


A_FEW = (Step.ROWS_NAMED, Step.PLAN_FLUSHED, Step.LOGITS_NAMED, Step.COMMIT_WRITTEN, Step.SEALED)


@pytest.mark.parametrize(
    "steps", [A_FEW, pytest.param(OF_A_CAPTURE, marks=pytest.mark.slow)], ids=["a few", "every"]
)
def test_killed_at_steps_and_rerun_the_cache_has_the_same_bytes(root, undisturbed, tmp_path, steps):
    """One capture is killed at each step in turn, each time in a process that went on from the
    last kill."""
    output = tmp_path / "cache"
    flags = command(root, output)
    with killer(tmp_path / "log") as dying:
        for step, visit in visits(step for step in steps if step in BEFORE_THE_SEAL):
            dying.kill(step, flags, visit=visit)
            with pytest.raises(ValueError, match="not sealed"):
                open_cache(output)
        for step in (step for step in steps if step not in BEFORE_THE_SEAL):
            # These steps seal the cache, so each runs on a copy of the unsealed one.
            copy = Path(shutil.copytree(output, tmp_path / step))
            dying.kill(step, command(root, copy))
            assert open_cache(copy).manifest.cache_id == undisturbed
            assert main(command(root, copy)) == 0
            assert open_cache(copy).manifest.cache_id == undisturbed
            assert left_over(copy) == []


@pytest.mark.slow
def test_killed_while_it_grows_or_gains_signals_the_old_cache_stays_and_a_rerun_goes_on(
    tmp_path,
):
    """A cache of logits grows, gains the other signals in both parts, and grows once more with all
    of them."""
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    for at in (killed, whole):
        write_teacher(at / "teacher")
        write_corpus(at / "corpus", files=3, words=100)
        assert main(logits_only(at)) == 0
    old = open_cache(killed / "cache")
    rows = old.read(old.rows())
    with killer(tmp_path / "log") as dying:
        for number, (flags, dying_at, more) in enumerate(
            (
                (logits_only, [(step, 1) for step in GROWING], "the part keeps its promise "),
                (with_all, visits(ADDING), ""),
                (with_all, visits(GROWING), "students who never meet "),
            )
        ):
            if more:
                for at in (killed, whole):
                    (at / "corpus" / f"more-{number}.txt").write_text(more * 60)
            before = open_cache(killed / "cache").manifest
            for step, visit in dying_at:
                dying.kill(step, flags(killed), visit=visit)
                if step not in (Step.MANIFEST_NAMED, Step.SEALED):
                    assert open_cache(killed / "cache").manifest == before
            for at in (killed, whole):
                assert main(flags(at)) == 0
            assert left_over(killed / "cache") == []
            ours, theirs = (open_cache(at / "cache").manifest for at in (killed, whole))
            assert ours.cache_id == theirs.cache_id
    assert check_structure(killed / "cache", ours).problems == []
    assert [len(part.signals) for part in ours.parts] == [len(NAMES)] * 3
    for name, array in old.read(old.rows()).items():
        np.testing.assert_array_equal(array, rows[name])


@pytest.mark.slow
def test_killed_then_sealed_in_part_then_killed_and_finished_it_reads_as_the_whole(
    root, undisturbed, tmp_path
):
    output = tmp_path / "cache"
    flags = command(root, output)
    with killer(tmp_path / "log") as dying:
        dying.kill(Step.COMMIT_NAMED, flags, visit=2 * len(NAMES) + 2)
        for step in SEALING_IN_PART:
            dying.kill(step, [*flags, "--seal-partial"])
        first = open_cache(output)
        read = first.read(first.rows(), NAMES)
        assert [len(part.units) for part in first.manifest.parts] == [2]
        dying.kill(Step.COMMITS_CHECKED, flags)
    assert open_cache(output).manifest == first.manifest
    assert main(flags) == 0
    cache, whole = open_cache(output), open_cache(root / "cache")
    assert len(cache) == len(whole)
    again = cache.read(first.rows(), NAMES)
    for name, array in read.items():
        np.testing.assert_array_equal(again[name], array)
    keys = [sorted(row.tobytes() for row in c.read(c.rows())["tokens"]) for c in (cache, whole)]
    assert keys[0] == keys[1]


def with_all(root: Path) -> list[str]:
    """The command that captures to `root/cache`."""
    return command(root, root / "cache")


def logits_only(root: Path) -> list[str]:
    """The command without the signals that can be added later."""
    flags = with_all(root)
    neither = ["--signals.logits.counts=0", "--signals.logits.sketch.rank=0"]
    return [*flags[: flags.index("--signals.hidden.layers")], *neither, flags[-1]]


@pytest.mark.slow
def test_a_full_disk_is_reported_and_committed_units_stay(root, undisturbed, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    # Room for the rows and a few units: an ArrayRecord file takes at least 128 KB.
    options = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(mount)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        flags = command(root, mount / "cache")
        full = run("-m", "decant.pipelines", *flags)
        assert full.returncode == 1
        assert "No space left on device" in full.stderr
        assert "run again" in full.stderr
        assert not list(mount.rglob("manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(mount)], check=True)
        rerun = run("-m", "decant.pipelines", *flags)
        assert rerun.returncode == 0, rerun.stderr
        assert open_cache(mount / "cache").manifest.cache_id == undisturbed
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize(
    ("sent", "status"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_stopped_by_ctrl_c_or_sigterm_it_says_how_many_units_are_done_and_goes_on(
    root, undisturbed, sent, status
):
    output = root / sent.name
    flags = command(root, output)
    process = subprocess.Popen(
        [sys.executable, "-m", "decant.pipelines", *flags],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not units_done(output):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(sent)
    sent_at = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert time.monotonic() - sent_at < 10
    done, units = units_done(output), len(list(output.glob("parts/0000/rows/*")))
    assert 1 <= done < units
    assert said.strip().splitlines()[-1] == (
        f"stopped: {done} of {units} units are done; run the same command again to go on from here"
    )
    assert main(flags) == 0
    assert open_cache(output).manifest.cache_id == undisturbed


def units_done(cache: Path) -> int:
    """Number of units with a commit of every signal."""
    commits = [path.stem[-len("00000") :] for path in cache.glob("parts/0000/commits/*.json")]
    return sum(commits.count(unit) == len(NAMES) for unit in set(commits))
