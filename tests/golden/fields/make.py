"""Write a golden payload for each codec of labels and sketches that has none yet.

    python -m tests.golden.fields.make

A golden file is never rewritten: a released version wrote it.
"""

from pathlib import Path

import numpy as np

from decant.schemas.codecs import labels_field, sketch_field
from decant.schemas.codecs.block import Tables

HERE = Path(__file__).parent
KEY = bytes(range(16))
POSITIONS, RANK = 40, 30
SKETCHES = {"sketch-1": (0.0, False), "sketch-2": (0.5, False), "sketch-2-dither": (8.0, True)}


def sketch() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of wide and narrow columns, some far out; and the columns' deviations."""
    rng = np.random.default_rng(4)
    deviations = np.geomspace(30, 0.5, RANK)
    values = rng.normal(size=(POSITIONS, RANK)) * deviations
    values[0] *= 100
    return values.astype(np.float32), deviations


def main():
    labels = -np.random.default_rng(5).exponential(3, size=POSITIONS).astype(np.float32)
    labels[:3] = 0, -np.inf, -5000
    for exact in (True, False):
        block = labels_field.encode(labels, exact=exact)
        expected = labels_field.decode([block], positions=[POSITIONS])
        _write(f"labels-{block.codec}", block.payload, expected)
    values, deviations = sketch()
    for name, (step, dither) in SKETCHES.items():
        how = {"deviations": deviations, "step": step, "dither": dither, "tables": Tables({})}
        block = sketch_field.encode(values, row_key=KEY, **how)
        expected = sketch_field.decode(
            [block], positions=[POSITIONS], rank=RANK, row_keys=[KEY], **how
        )
        _write(name, block.payload, expected)


def _write(name: str, payload: bytes, expected: np.ndarray) -> None:
    path = HERE / f"{name}.npz"
    if not path.exists():
        payload_array = np.frombuffer(payload, np.uint8)
        np.savez_compressed(path, payload=payload_array, expected=expected)


if __name__ == "__main__":
    main()
