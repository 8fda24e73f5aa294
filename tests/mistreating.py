"""`python -m tests.mistreating CACHE COUNT SEED`: damage a cache COUNT times, reading it each time.

A file is flipped, cut, deleted, or exchanged for another, and put back after the reading. Reading
must give what it gave before, or a ValueError or OSError. Prints the outcomes as JSON. The process
may take twice the memory that reading the whole cache took, and 5 seconds a reading.
"""

import json
import random
import resource
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from decant.models.text.tokenizer import tokenizer_of
from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json
from decant.schemas.disk.layout import PartLayout
from decant.schemas.manifest.plan import read_plan
from tests.fuzzing.target import ALLOWED, deadline

KINDS = ("flip", "cut", "exchange", "delete")


def everything(path: Path) -> list[object]:
    """All that readers of a cache see, in a form that can be compared."""
    cache = open_cache(path)
    read = cache.read(cache.rows(), signals=tuple(cache.manifest.signals))
    states = [name for name in cache.manifest.signals if name.startswith("hidden/")]
    tables = [cache.tail_prior(), *map(cache.directions, states)]
    tokenizer = tokenizer_of(cache)
    parts = [PartLayout(path / part.path) for part in cache.manifest.parts]
    return [
        [(name, array.dtype.str, array.shape, array.tobytes()) for name, array in read.items()],
        [np.asarray(table).tobytes() for table in tables],
        [cache.origins(int(row)) for row in cache.rows()],
        [tokenizer.decode([i]) for i in range(tokenizer.size)],
        [(read_plan(part.plan), read_json(part.request)) for part in parts],
    ]


@contextmanager
def damaged(files: list[Path], kind: str, draw: random.Random):
    """One file damaged in this way, and whole again afterwards. Yields what was done."""
    file = draw.choice(files)
    likely = [other for other in files if other.parent == file.parent and other != file]
    other = draw.choice(likely or files)
    before = {path: path.read_bytes() for path in (file, other)}
    data = before[file]
    if kind == "flip" and data:
        at = draw.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
    elif kind == "cut":
        file.write_bytes(data[: draw.randrange(len(data) + 1)])
    elif kind == "exchange":
        file.write_bytes(before[other])
        other.write_bytes(data)
    elif kind == "delete":
        file.unlink()
    try:
        yield f"{kind} {file} {other if kind == 'exchange' else ''}"
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def main(path: Path, count: int, seed: int) -> None:
    """Mistreat the cache at `path`."""
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.endswith(".lock")]
    kinds = sorted({f"{f.parent.name}{f.suffix}" for f in files})
    by_kind = {kind: [f for f in files if f"{f.parent.name}{f.suffix}" == kind] for kind in kinds}
    expected, draw, outcomes, faults = everything(path), random.Random(seed), Counter(), []
    limit = 2 * int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for i in range(count):
        # Every kind of file as often as any other, whatever their number.
        of_kind, kind = by_kind[kinds[i % len(kinds)]], draw.choice(KINDS)
        with damaged(of_kind, kind, draw) as what:
            try:
                with deadline():
                    same = everything(path) == expected
                outcome = "same" if same else "other values"
            except ALLOWED:
                outcome = "error"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
        outcomes[f"{kind}: {outcome}"] += 1
        if outcome not in ("same", "error"):
            faults.append(f"{what}: {outcome}")
    assert everything(path) == expected
    print(json.dumps({"outcomes": outcomes, "kinds": kinds, "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
