"""All commands at once on one cache, from several processes, with random kills.

`python -m tests.stress --seconds 300` prints figures and exits with 1 if anything was lost,
changed, remembered or unopenable, or if a command failed in a way that is not listed here.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from decant.pipelines.capture.job import precompute
from decant.schemas import open_cache
from decant.schemas.disk.layout import JOURNAL
from decant.schemas.disk.steps import Step
from tests.making.actions import ADDED, MOST_FILES, config, observed
from tests.making.caches import write_corpus
from tests.making.grown import write_more
from tests.paths import environment

# One process does the slow imports and forks a server for each actor. A server forks a child for
# each request, and kills it when it is time.
_SERVERS = """
import json, os, signal, sys, time, warnings
import apache_beam, flax.nnx, jax, optax, pyarrow.parquet, rich.progress, tokenizers, tyro
warnings.simplefilter("ignore")

def serve(requests, answers):
    for line in os.fdopen(requests):
        request = json.loads(line)
        began, child = time.monotonic(), os.fork()
        if not child:
            os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            status = 70
            try:
                from tests.making.actions import run
                status = run(request)
            finally:
                sys.stdout.flush()
                os._exit(status)
        ended = 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and request["kill_after"]:
                if time.monotonic() - began > request["kill_after"]:
                    os.kill(child, signal.SIGKILL)
                    request["kill_after"] = None
            time.sleep(0.005)
        os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(status))

for requests, answers in json.loads(sys.argv[1]):
    if not os.fork():
        serve(requests, answers)
        os._exit(0)
    os.close(requests)
    os.close(answers)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""
_STEPS = [
    *(Step.ROWS_NAMED, Step.SHARD_NAMED, Step.ROWS_GATHERED, Step.PLAN_NAMED, Step.LOGITS_NAMED),
    *(Step.ARRAY_NAMED, Step.COMMIT_NAMED, Step.UNIT_COMMITTED, Step.COMMITS_CHECKED),
    *(Step.MANIFEST_LOCKED, Step.MANIFEST_FLUSHED, Step.MANIFEST_NAMED, Step.SEALED),
    *(Step.JOURNAL_WRITTEN, Step.JOURNAL_NAMED, Step.FILE_MOVED, Step.OVERWRITTEN),
]
_EXPECTED = {
    "any": "`gc` is overwriting what was forgotten",
    "precompute": "removed from this cache but not deleted|which the config does not ask for"
    "|no capture is unfinished|no unit is committed that is not sealed already"
    "|this directory holds another capture|with other settings is unfinished"
    "|no valid commit of unit|run again|run the same command again",
    "forget": "no source is called",
    "remove": "no signal 'hidden/2'",
    "merge": "merge again|which was removed|is missing",
    # Of a cache that changes while it is read.
    "read": "damaged|is missing|is gone|no longer|swapped|expected|cannot be read|No such file",
    "inspect": "damaged|is missing|is gone|no longer|swapped|expected|cannot be read|No such file",
    "verify": "was changed while it was checked|No such file",
}
"""By command: errors that say what another process did meanwhile."""


class Server:
    """Runs requests one after the other, each in a process of its own."""

    def __init__(self) -> None:
        self.theirs: tuple[int, int]
        reads, requests = os.pipe()
        answers, writes = os.pipe()
        self.theirs = reads, writes
        self._requests = os.fdopen(requests, "w")
        self._answers = os.fdopen(answers)

    def ask(self, request: dict, log: Path) -> int:
        """The status of the request's process, whose output goes to `log`."""
        print(json.dumps(request | {"log": str(log)}), file=self._requests, flush=True)
        return int(self._answers.readline())

    def close(self) -> None:
        """End the server."""
        self._requests.close()
        self._answers.close()


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[Server]]:
    """So many servers, for the block."""
    made = [Server() for _ in range(count)]
    theirs = [server.theirs for server in made]
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVERS, json.dumps(theirs)],
        env=environment(),
        pass_fds=[descriptor for pair in theirs for descriptor in pair],
    )
    for descriptor in itertools.chain(*theirs):
        os.close(descriptor)
    try:
        yield made
    finally:
        for server in made:
            server.close()
        process.wait(timeout=120)


@dataclass
class Stress:
    """The state that the actors share."""

    root: Path
    until: float = 0.0
    counts: collections.Counter = field(default_factory=collections.Counter)
    kills: int = 0
    refusals: collections.Counter = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    forgotten: set[str] = field(default_factory=set)
    """Sources whose `forget` reported success."""
    files: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def prepare(root: Path) -> None:
    """Make corpus, teacher and a sealed cache."""
    write_corpus(root / "corpus", files=4, words=120)
    precompute(config(root, added=False))
    write_more(root / "corpus")


def stress(root: Path, *, seconds: float, actors: int, seed: int) -> Stress:
    """Run `actors` processes on `root/cache` for so long, then check the invariants."""
    shared = Stress(root)
    seen = [seen_by(root, n) for n in range(actors + 1)]
    first = open_cache(root / "cache")
    lines = [json.dumps(row) + "\n" for row in observed(first, list(range(len(first))))]
    seen[-1].write_text("".join(lines))
    with servers(actors) as served:
        shared.until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=_act, args=[shared, n, random.Random(seed * 100 + n), server])
            for n, server in enumerate(served)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _check_end(shared, served[0])
    if not shared.faults:
        _check_rows(shared, seen)
    return shared


def _act(shared: Stress, number: int, dice: random.Random, server: Server) -> None:
    """Send random requests to a server until the time is over."""
    log = shared.root / f"log-{number}"
    while time.monotonic() < shared.until:
        name, request = _chosen(shared, dice, number)
        status = server.ask(request, log)
        _judge(shared, name, request, status, log)


def _chosen(shared: Stress, dice: random.Random, number: int) -> tuple[str, dict]:
    """A command's name, and the request that runs it."""
    cache = str(shared.root / "cache")
    name = dice.choices(
        ["precompute", "forget", "remove", "gc", "merge", "verify", "inspect", "read"],
        [5, 2, 2, 5, 1, 2, 1, 4],
    )[0]
    request: dict = {"action": "main", "root": str(shared.root), "step": None, "kill_after": None}
    if name == "precompute":
        if dice.random() < 0.4:
            _grow(shared, dice)
        request |= {"action": name, "added": dice.random() < 0.7, "partial": dice.random() < 0.25}
    elif name == "read":
        seen = str(seen_by(shared.root, number))
        request |= {"action": name, "rows": 8, "seed": dice.random(), "seen": seen}
    elif name == "forget":
        sources = sorted(path.name for path in (shared.root / "corpus").iterdir())
        request["arguments"] = [name, cache, "--source", dice.choice(sources[1::2])]
    elif name == "remove":
        request["arguments"] = [name, cache, ADDED]
    elif name == "merge":
        request["arguments"] = [name, str(shared.root / f"merged-{number}"), cache]
    elif name == "verify":
        request["arguments"] = [name, cache, "--rows=0"]
    else:
        request["arguments"] = [name, cache]
    if name not in ("read", "inspect", "verify") and dice.random() < 0.5:
        if dice.random() < 0.5:
            request["step"] = [dice.choice(_STEPS), dice.randint(1, 4)]
        else:
            request["kill_after"] = dice.uniform(0.02, 4.0 if name == "precompute" else 0.6)
    return name, request


def seen_by(root: Path, number: int) -> Path:
    """File with the rows that an actor has read."""
    return root / f"seen-{number}.jsonl"


def _grow(shared: Stress, dice: random.Random) -> None:
    """Add a file to the corpus."""
    with shared.lock:
        if shared.files < MOST_FILES:
            words = [dice.choice("abcdefghijklmnop") * dice.randint(1, 6) for _ in range(120)]
            new = shared.root / f"new-{shared.files}"
            new.write_text(" ".join(words))
            new.rename(shared.root / "corpus" / f"grown-{shared.files}.txt")
            shared.files += 1


def _judge(shared: Stress, name: str, request: dict, status: int, log: Path) -> None:
    said = log.read_text()
    with shared.lock:
        shared.counts[name] += 1
        if status == -9:
            shared.kills += 1
        elif status == 0:
            if name == "forget":
                shared.forgotten.add(request["arguments"][3])
        else:
            pattern = f"{_EXPECTED['any']}|{_EXPECTED.get(name, '(?!)')}"
            if status != 70 and re.search(pattern, said):
                shared.refusals[name] += 1
            else:
                shared.faults.append(f"{name} {request} ended with {status}:\n{_ends(said)}")


def _check_end(shared: Stress, server: Server) -> None:
    """After at most one more `gc` the cache opens, its capture can be finished, and it verifies."""
    cache, log = shared.root / "cache", shared.root / "log-end"
    plain = {"root": str(shared.root), "step": None, "kill_after": None}

    def ask(name: str, request: dict) -> None:
        status, said = server.ask(plain | request, log), log.read_text()
        if status and not re.search(_EXPECTED.get(name, "(?!)"), said):
            shared.faults.append(f"at the end, {request}: {status}\n{_ends(said)}")

    def command(*arguments: str) -> dict:
        return {"action": "main", "arguments": list(arguments)}

    if (cache / JOURNAL).exists():
        ask("gc", command("gc", str(cache)))
    ask("any", command("inspect", str(cache)))
    ask("precompute", {"action": "precompute", "added": True, "partial": False})
    ask("gc", command("gc", str(cache)))
    ask("any", command("verify", str(cache), "--rows=4"))


def _ends(said: str) -> str:
    """The beginning and the end of a long output: a report names what is wrong at either."""
    return said if len(said) < 6000 else f"{said[:3000]}\n[…]\n{said[-3000:]}"


def _check_rows(shared: Stress, seen: list[Path]) -> None:
    cache = open_cache(shared.root / "cache")
    now = {tuple(row["place"]): row for row in observed(cache, list(range(len(cache))))}
    forgotten = {
        part.sources[place.source].name for part in cache.manifest.parts for place in part.forgotten
    }
    if missing := shared.forgotten - forgotten:
        shared.faults.append(f"came back after `forget`: {sorted(missing)}")
    for path in seen:
        for line in path.read_text().splitlines() if path.exists() else ():
            shared.faults += differences(json.loads(line), now, forgotten)


def differences(then: dict, now: dict, forgotten: set[str]) -> list[str]:
    """What is wrong with a row that was read earlier; `now` holds the rows by place.

    `forgotten` are names of sources.
    """
    place = tuple(then["place"])
    if place not in now:
        return [f"lost: row {place}"]
    row, faults = now[place], []
    for before, after in zip(then["segments"], row["segments"], strict=True):
        if before[:3] != after[:3]:
            faults.append(f"row {place}: {before} became {after}")
        elif before[0] in forgotten:
            if after[3] is not None:
                faults.append(f"row {place}: {after} is forgotten, but there")
        elif before[3] != after[3]:
            faults.append(f"row {place}: {before} became {after}")
    if then["logits"] and row["logits"] and then["logits"] != row["logits"]:
        faults.append(f"row {place}: its logits changed")
    return faults


def main() -> int:
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="decant-stress-"))
    prepare(root)
    result = stress(root, seconds=arguments.seconds, actors=arguments.actors, seed=arguments.seed)
    print(report(result, arguments.seconds))
    if result.faults:
        print(*result.faults, f"everything is in {root}", sep="\n\n")
        return 1
    shutil.rmtree(root)
    return 0


def report(result: Stress, seconds: float) -> str:
    """The figures of a run."""
    counts = ", ".join(f"{n} {name}" for name, n in sorted(result.counts.items()))
    refused = ", ".join(f"{n} {name}" for name, n in sorted(result.refusals.items()))
    return (
        f"{seconds:.0f} s: {result.counts.total()} commands ({counts}), {result.kills} killed, "
        f"{result.refusals.total()} refused with a reason ({refused}), {len(result.faults)} faults"
    )


if __name__ == "__main__":
    sys.exit(main())
