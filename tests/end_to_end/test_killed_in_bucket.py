"""Captures into a bucket that are killed, or run four at a time, end in one and the same cache."""

import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from decant.pipelines.__main__ import main
from decant.pipelines.upkeep.copy import copy
from decant.pipelines.verification.structure import check_structure
from decant.schemas import open_cache
from decant.schemas.disk.steps import Step
from decant.schemas.manifest.cache_files import cache_files, claims
from decant.schemas.manifest.manifest import read_manifest
from decant.store import open_store
from tests.end_to_end.test_killed_anywhere import BEFORE_THE_SEAL, SIGNALS, VISITS, command
from tests.killing import killer
from tests.making.caches import tiny_cache, write_corpus, write_teacher
from tests.paths import environment

A_FEW = (Step.SHARD_WRITTEN, Step.LOGITS_NAMED, Step.COMMIT_NAMED, Step.MANIFEST_WRITTEN)
EVERY = tuple(step for step in BEFORE_THE_SEAL if not step.endswith("flushed"))
"""An object has no moment between its sending and its name."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def undisturbed(root) -> str:
    return tiny_cache(root, **SIGNALS).manifest.cache_id


@pytest.fixture(autouse=True)
def mirror(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "mirror"))


def strays(bucket: str) -> set[str]:
    """Objects with data that the sealed cache does not name."""
    store, manifest = open_store(bucket), open_cache(bucket).manifest
    named = {f.object(by_content=True) for f in cache_files(manifest, store.get)}
    named |= {f.key for f in claims(manifest, store.get)}
    return {key for key, _ in store.list("objects")} - named


@pytest.mark.parametrize(
    "steps", [A_FEW, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["a few", "every"]
)
def test_killed_at_steps_and_rerun_the_bucket_has_the_undisturbed_cache(
    root, undisturbed, bucket, tmp_path, steps
):
    flags = command(root, Path(bucket))
    with killer(tmp_path / "log") as dying:
        for step in steps:
            for visit in VISITS.get(step, (1,)):
                dying.kill(step, flags, visit=visit)
                with pytest.raises(ValueError, match="not a sealed cache"):
                    open_cache(bucket)
        dying.kill(Step.MANIFEST_NAMED, flags)
    assert open_cache(bucket).manifest.cache_id == undisturbed
    assert main(flags) == 0
    assert open_cache(bucket).manifest.cache_id == undisturbed
    assert strays(bucket) == set(), "all that the killed ones wrote has the same content"


@pytest.mark.slow
def test_four_captures_at_once_of_which_two_are_killed_make_one_cache(
    root, undisturbed, bucket, tmp_path
):
    """They share the bucket alone: each has a folder, a temporary directory and a teacher."""
    running = [start(command(root, Path(bucket)), tmp_path / str(n)) for n in range(4)]
    store = open_store(bucket)
    while not any(store.list("parts/0000/commits")):
        assert all(process.poll() is None for process in running)
        time.sleep(0.05)
    for process in running[:2]:
        process.send_signal(signal.SIGKILL)
    for process in running:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if process in running[:2] else 0), said
    assert open_cache(bucket).manifest.cache_id == undisturbed
    assert strays(bucket) == set()


def start(flags: list[str], place: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "decant.pipelines", *flags],
        env=environment() | machine(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


GROWING = (Step.SHARD_NAMED, Step.PLAN_NAMED, Step.COMMIT_NAMED, Step.MANIFEST_WRITTEN)
ADDING = (Step.PLAN_NAMED, Step.ARRAY_NAMED, Step.COMMIT_NAMED, Step.MANIFEST_NAMED)
FORGETTING = (Step.MANIFEST_LOCKED, Step.MANIFEST_WRITTEN, Step.MANIFEST_NAMED)
TIDYING = (Step.COMMIT_NAMED, Step.MANIFEST_WRITTEN, Step.MANIFEST_NAMED)


@pytest.mark.slow
def test_killed_while_it_changes_the_bucket_has_the_cache_that_the_disk_has(bucket, tmp_path):
    write_teacher(tmp_path / "teacher")
    write_corpus(tmp_path / "corpus", files=3, words=100)
    places = (Path(bucket), tmp_path / "cache")

    def captures(output: Path, *, arrays: bool) -> list[str]:
        flags = command(tmp_path, output)
        if arrays:
            return flags
        neither = ["--signals.logits.counts=0", "--signals.logits.sketch.rank=0"]
        return [*flags[: flags.index("--signals.hidden.layers")], *neither, flags[-1]]

    for place in places:
        assert main(captures(place, arrays=False)) == 0
    (tmp_path / "corpus" / "more.txt").write_text("the part keeps its promise " * 60)
    changes = (
        ([captures(place, arrays=False) for place in places], GROWING),
        ([captures(place, arrays=True) for place in places], ADDING),
        ([["forget", str(place), "--source=document-001.txt"] for place in places], FORGETTING),
        ([["gc", str(place), "--grace-hours=0"] for place in places], TIDYING),
    )
    with killer(tmp_path / "log") as dying:
        for (there, here), steps in changes:
            for step in steps:
                dying.kill(step, there)
                cache = open_cache(bucket)
                cache.read(cache.rows(), list(cache.manifest.signals))
                if step is Step.MANIFEST_NAMED:
                    break  # it is done
            assert main(there) == 0
            assert main(here) == 0
            assert open_cache(bucket).manifest.cache_id == open_cache(places[1]).manifest.cache_id
    assert strays(bucket) == set()
    assert check(bucket, tmp_path / "back") == []


EVERY_OF_FORGET = tuple(
    Step(f"manifest {moment}") for moment in ("locked", "written", "flushed", "named")
)
OF_GC = (Step.ARRAY_WRITTEN, Step.ARRAY_NAMED, Step.COMMIT_WRITTEN, Step.COMMIT_NAMED)
LATER_OF_GC = (EVERY_OF_FORGET, (Step.OVERWRITTEN,) * 4, (Step.OBJECT_DELETED,) * 4)
"""Of each round: after one has replaced the manifest, the others do not get so far."""


@pytest.mark.slow
def test_four_workers_at_once_are_killed_at_each_step_of_forget_and_gc(
    bucket, tmp_path, monkeypatch
):
    """Each round four forget four documents, or tidy, and die at different steps if they reach
    them. Then each command is run to its end."""
    write_teacher(tmp_path / "teacher")
    write_corpus(tmp_path / "corpus", files=12, words=60)
    places = (bucket, str(tmp_path / "cache"))
    for place in places:
        assert main(command(tmp_path, Path(place))) == 0
    documents = iter(range(12))
    killed = Counter()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        workers = [stack.enter_context(killer(tmp_path / f"log{n}")) for n in range(4)]

        def all_at_once(commands: list[list[str]], steps: Sequence[Step | None]) -> list[int]:
            futures = [
                pool.submit(worker.run, {step: 1} if step else {}, arguments)
                for worker, step, arguments in zip(workers, steps, commands, strict=True)
            ]
            return [future.result() for future in futures]

        for later in LATER_OF_GC:
            names = [f"document-{next(documents):03d}.txt" for _ in range(4)]
            forgets = [["forget", bucket, f"--source={name}"] for name in names]
            gcs = [["gc", bucket, "--grace-hours=0"]] * 4
            for commands, turns in ((forgets, [EVERY_OF_FORGET]), (gcs, [OF_GC, later])):
                for steps in turns:
                    for step, status in zip(steps, all_at_once(commands, steps), strict=True):
                        assert status in (0, -signal.SIGKILL), [one.said() for one in workers]
                        killed[step] += status != 0
                    cache = open_cache(bucket)
                    cache.read(cache.rows(), list(cache.manifest.signals))
                assert all_at_once(commands, [None] * 4) == [0] * 4, [w.said() for w in workers]
            for name in names:
                assert main(["forget", places[1], f"--source={name}"]) == 0
            assert main(["gc", places[1]]) == 0
            assert open_cache(bucket).manifest.cache_id == open_cache(places[1]).manifest.cache_id
    assert strays(bucket) == set()
    assert check(bucket, tmp_path / "back") == []
    assert min(killed.values()) > 0, killed


@pytest.mark.slow
def test_four_workers_at_once_are_killed_at_each_step_of_a_capture_and_of_growing(bucket, tmp_path):
    """Each round four processes that share the bucket alone die: each at its step, or at the next
    one that it reaches, if another process did that work. Once sealed, they die after the manifest.
    Then four run to their end."""
    write_teacher(tmp_path / "teacher")
    write_corpus(tmp_path / "corpus", files=8, words=120)
    here, there = (command(tmp_path, place) for place in (tmp_path / "cache", Path(bucket)))
    killed: Counter[tuple[str, Step | None]] = Counter()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        workers = [
            stack.enter_context(killer(tmp_path / f"log{n}", machine(tmp_path / str(n))))
            for n in range(4)
        ]

        def all_at_once(change: str, stops: Sequence[Sequence[Step]]) -> list[int]:
            firsts = [dict.fromkeys(steps, 1) for steps in stops]
            done = list(pool.map(lambda worker, of: worker.run(of, there), workers, firsts))
            killed.update((change, w.killed_at) for w, of in zip(workers, done, strict=True) if of)
            return done

        for change, steps_a_round, last in (
            ("capture", 2, Step.MANIFEST_NAMED),
            ("growing", 4, Step.SEALED),
        ):
            before = open_cache(bucket).manifest if change == "growing" else None
            for first in range(0, len(EVERY), steps_a_round):
                at = [min(first + n % steps_a_round, len(EVERY) - 1) for n in range(4)]
                done = all_at_once(change, [EVERY[n:] for n in at])
                assert done == [-signal.SIGKILL] * 4, [worker.said() for worker in workers]
                if before is None:
                    with pytest.raises(ValueError, match="not a sealed cache"):
                        open_cache(bucket)
                else:
                    cache = open_cache(bucket)
                    assert cache.manifest == before
                    cache.read(cache.rows(), list(before.signals))
            assert set(all_at_once(change, [[last]] * 4)) <= {0, -signal.SIGKILL}
            assert killed[change, last] > 0
            assert all_at_once(change, [[]] * 4) == [0] * 4, [worker.said() for worker in workers]
            assert main(here) == 0
            sealed = open_cache(bucket)
            assert sealed.manifest.cache_id == open_cache(tmp_path / "cache").manifest.cache_id
            sealed.read(sealed.rows(), list(sealed.manifest.signals))
            for number in range(6):  # several shards of text, for workers that are late
                text = f"the part keeps promise {number} " * (200 + number)
                (tmp_path / "corpus" / f"more-{number}.txt").write_text(text)
    print(f"{killed.total()} kills: {killed}")
    assert {step for _, step in killed} == {*EVERY, Step.MANIFEST_NAMED, Step.SEALED}
    left = strays(bucket)
    assert main(["gc", bucket, "--grace-hours=0"]) == 0
    assert strays(bucket) == set()
    print(f"{len(left)} strays, which gc deleted")
    assert check(bucket, tmp_path / "back") == []


def machine(place: Path) -> dict[str, str]:
    """The environment of a machine of its own: folder for scratch, and temporary directory."""
    place.mkdir()
    return {"DECANT_MIRROR": str(place / "mirror"), "TMPDIR": str(place)}


def check(bucket: str, copied: Path) -> list:
    copy(bucket, copied)
    return check_structure(copied, read_manifest(copied)).problems
