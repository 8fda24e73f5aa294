"""`python -m tests.fuzzing [TARGET] [SECONDS]`: fuzz a reader, guided by coverage.

`make fuzz` installs atheris, which this needs, and runs every target for a minute. What fails is
left as crash-…, with a traceback above it. Memory of the process is limited, so that a bomb shows.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["decant", "gguf", "safetensors"]):
    from tests.fuzzing.mutations import mutated
    from tests.fuzzing.targets import TARGETS

EXTRA = 1 << 30
"""Bytes that reading one input may take beside what is imported."""


def main() -> int:
    """Fuzz one target in this process, or each in a process of its own."""
    arguments = dict(enumerate(sys.argv[1:]))
    seconds = int(arguments.get(1, 60))
    if arguments.get(0, "all") != "all":
        return fuzz(arguments[0], seconds)
    command = [sys.executable, "-m", "tests.fuzzing"]
    results = {name: subprocess.run([*command, name, str(seconds)]).returncode for name in TARGETS}
    print(json.dumps(results))
    return max(results.values())


def fuzz(name: str, seconds: int) -> int:
    """Does not return: libFuzzer ends the process, with status 0 if nothing was found."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as root:
        corpus, made, here = (Path(root) / part for part in ("corpus", "made", "file"))
        for directory in (corpus, made, here):
            directory.mkdir()
        for i, seed in enumerate(target.seeds(made)):
            target.read_honest(seed, here)
            (corpus / str(i)).write_bytes(seed)
        limit_memory()
        options = [f"-max_total_time={seconds}", "-max_len=200000", "-print_final_stats=1"]

        def mutate(data: bytes, largest: int, seed: int) -> bytes:
            draw = random.Random(seed)
            if draw.random() < 0.5:
                return bytes(atheris.Mutate(data, largest))
            return mutated(data, draw, is_json=target.is_json)[:largest]

        atheris.Setup(
            [sys.argv[0], *options, str(corpus)],
            lambda data: target.check(data, here),
            custom_mutator=mutate,
        )
        atheris.Fuzz()
    return 0


def limit_memory() -> None:
    """Make an allocation fail that takes the process EXTRA bytes above what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
