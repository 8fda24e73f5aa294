"""Write a golden payload for each codec of labels, counts and sketches that has none yet.

    python -m tests.golden.fields.make

A golden file is never rewritten: a released version wrote it.
"""

from pathlib import Path

import numpy as np

from decant.schemas.codecs import counts_field, labels_field, sizes_field, sketch_field
from decant.schemas.codecs.block import Tables
from decant.schemas.targets.counts import count_draws
from decant.schemas.targets.targets import BETAS, Targets

HERE = Path(__file__).parent
KEY = bytes(range(16))
POSITIONS, RANK = 40, 30
SKETCHES = {
    "sketch-1": (0.0, False),
    "sketch-2": (0.5, False),
    "sketch-2-dither": (8.0, True),
    "sketch-4": (8.0, True),
    "sketch-6": (8.0, True),
}
"""Step and dither."""
CUT = {"sketch-3": "sketch-2-dither", "sketch-5": "sketch-4", "sketch-7": "sketch-6"}
"""Of which sketch these are cut."""
KEPT = np.arange(POSITIONS) % 5 > 1
"""Positions that are left in those that are cut; their row has OTHER_KEY by then."""
OLDER = ("sketch-2-dither", "sketch-3", "sketch-4", "sketch-5")
"""What releases before 0.16 wrote."""
OTHER_KEY = bytes(16)


def sketch() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of wide and narrow columns, some far out; and the columns' deviations."""
    rng = np.random.default_rng(4)
    deviations = np.geomspace(30, 0.5, RANK)
    values = rng.normal(size=(POSITIONS, RANK)) * deviations
    values[0] *= 100
    return values.astype(np.float32), deviations


def make_counts(k: int) -> None:
    """A golden record of 60 draws a position, with a head of k ids whose values are rounded."""
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(400, 1000)) * 1.5 - np.log1p(np.arange(1000))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p[:4] = np.eye(1000)[:4]  # positions with one id
    edges, points = np.cumsum(p, axis=1), (np.arange(60) + rng.random((400, 1))) / 60
    drawn = (edges[:, None, :] < points[:, :, None]).sum(2).clip(0, 999)
    ids = np.argsort(-p, axis=1)[:, :k].astype(np.int32)
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.take_along_axis(p, ids, 1))
    logprobs = np.rint(logprobs * 8) / 8
    logprobs[10:20, 2:] = logprobs[20:24] = -np.inf  # heads of few ids, and of none
    counts = count_draws(drawn.astype(np.int32))
    head = Targets(ids, logprobs.astype(np.float32), np.zeros((400, len(BETAS)), np.float32))
    tables = counts_field.fit(counts[200:], head=head[200:], vocabulary=1000)
    counts, head = counts[:200], head[:200]
    block = counts_field.encode(counts, head=head, tables=tables, vocabulary=1000)
    path = HERE / f"counts-{block.codec}{'-head' if k else ''}.npz"
    arrays = {f"table_{name}": array for name, array in tables.arrays().items()}
    if not path.exists():
        np.savez_compressed(
            path,
            payload=np.frombuffer(block.payload, np.uint8),
            ids=counts.ids,
            counts=counts.counts,
            head_ids=head.ids,
            head_logprobs=head.logprobs,
            **arrays,
        )


def main():
    make_counts(0)
    make_counts(6)
    labels = -np.random.default_rng(5).exponential(3, size=POSITIONS).astype(np.float32)
    labels[:3] = 0, -np.inf, -5000
    for exact in (True, False):
        block = labels_field.encode(labels, exact=exact)
        expected = labels_field.decode([block], positions=[POSITIONS])
        _write(f"labels-{block.codec}", block.payload, expected)
    sizes = np.random.default_rng(6).choice([1, 3, 24], size=POSITIONS)
    _write("sizes-2", sizes_field.encode(sizes), sizes)
    values, deviations = sketch()
    for name, (step, dither) in SKETCHES.items():
        if name in OLDER:
            continue
        how = {"deviations": deviations, "step": step, "dither": dither, "tables": Tables({})}
        block = sketch_field.encode(values, row_key=KEY, **how)
        expected = sketch_field.decode(
            [block], positions=[POSITIONS], rank=RANK, row_keys=[KEY], **how
        )
        _write(name, block.payload, expected)
    # The last one has dither.
    block, expected = sketch_field.cut(block, KEPT, row_key=KEY, **how), expected[KEPT]
    _write("sketch-7", block.payload, expected)


def _write(name: str, payload: bytes, expected: np.ndarray) -> None:
    path = HERE / f"{name}.npz"
    if not path.exists():
        payload_array = np.frombuffer(payload, np.uint8)
        np.savez_compressed(path, payload=payload_array, expected=expected)


if __name__ == "__main__":
    main()
