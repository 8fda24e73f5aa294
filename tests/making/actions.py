"""What a stress test's processes do to one cache: each command, and a reader that records rows."""

import dataclasses
import hashlib
import json
import random
import traceback
from pathlib import Path

import numpy as np

from decant.pipelines.config import Attention, Hidden, Precompute
from decant.schemas import Cache, open_cache
from decant.schemas.disk import steps
from decant.schemas.reading.units import read_unit_rows
from tests.making.grown import settings

HELD = ("logits", "hidden/1")
ADDED = "hidden/2"
MOST_FILES = 10


def config(root: Path, *, added: bool) -> Precompute:
    """The capture's settings; `added`: with one more signal."""
    hidden = Hidden(layers=(1, 2) if added else (1,), dtype="int8", width=6)
    return settings(root, hidden=hidden, attention=Attention())


def run(request: dict) -> int:
    """Do what `request` says in this process, and return the status as the command line would."""
    if request["step"]:
        steps.reached = _dying(*request["step"])
    try:
        return _ACTIONS[request["action"]](Path(request["root"]), request)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}")
        return 1
    except BaseException:
        traceback.print_exc()
        return 70


def _dying(step: str, visit: int):
    import os
    import signal

    left = visit

    def reached(here: steps.Step) -> None:
        nonlocal left
        left -= here == step
        if here == step and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def _precompute(root: Path, request: dict) -> int:
    from decant.pipelines.capture.job import precompute

    asked = config(root, added=request["added"])
    precompute(dataclasses.replace(asked, seal_partial=request["partial"]))
    return 0


def _main(root: Path, request: dict) -> int:
    from decant.pipelines.__main__ import main

    return main(request["arguments"])


def _read(root: Path, request: dict) -> int:
    """Append what some rows hold now to the file `request["seen"]`, one JSON object a row."""
    cache = open_cache(root / "cache")
    rows = list(range(len(cache)))
    if request["rows"]:
        rows = random.Random(request["seed"]).sample(rows, min(len(rows), request["rows"]))
    lines = [json.dumps(row) for row in observed(cache, rows)]
    with Path(request["seen"]).open("a") as file:
        file.write("".join(line + "\n" for line in lines))
    return 0


def observed(cache: Cache, rows: list[int]):
    """For each row: its place, its segments' sources, and hashes of what it holds.

    A forgotten segment's hash is None; AssertionError if such a segment is not blank.
    """
    places = [
        (part, number, offset, row)
        for part in cache.manifest.parts
        for number, unit in part.numbered_units
        for offset, row in enumerate(
            read_unit_rows(
                cache.path / part.path, number, unit, length=cache.manifest.sequence_length
            )
        )
    ]
    for number in rows:
        part, unit, offset, row = places[number]
        batch = cache.read([number], HELD, decode=False)
        gone = {(f.source, f.document) for f in part.forgotten}
        segments, whole = [], True
        for at, (source, document, start) in enumerate(row.origins.tolist(), 1):
            positions = row.segment_ids == at
            name = part.sources[source].name
            if (source, None) in gone or (source, document) in gone:
                whole = False
                for array in ("tokens", "loss_mask", "segment_ids", "hidden/1"):
                    assert not batch[array][0, positions].any(), (number, name, array)
                segments.append([name, document, start, None])
                continue
            held = b"".join(
                np.ascontiguousarray(batch[array][0, positions]).tobytes()
                for array in ("tokens", "loss_mask", "hidden/1")
            )
            segments.append([name, document, start, hashlib.sha256(held).hexdigest()[:16]])
        arrays = [batch["topk_ids"][0], batch["topk_logprobs"][0], batch["tail_logmass"][0]]
        logits = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
        yield {
            "place": [part.path, unit, offset],
            "segments": segments,
            "logits": logits if whole else None,
        }


_ACTIONS = {"precompute": _precompute, "main": _main, "read": _read}
