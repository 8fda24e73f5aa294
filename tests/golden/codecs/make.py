"""Write a golden record for each codec version that has none yet.

    python -m tests.golden.codecs.make

A golden file is never rewritten: a released version wrote it. A codec change that decodes a golden
record to other targets needs a new codec id.
"""

from pathlib import Path

import numpy as np

from decant.schemas.codecs import Profile, compact, decode, encode, fit
from decant.schemas.targets.draws import Draws
from decant.schemas.targets.targets import BETAS, EIGHTHS, Targets
from tests.formulas import sampling

HERE = Path(__file__).parent
VOCABULARY, K, POSITIONS = 1000, 12, 24
CODECS: dict[str, Profile] = {
    "topk-1-tail-1": "lossless",
    "topk-1-tail-3": "lossless",
    "topk-2-tail-2": "fast",
    "topk-3-tail-2": "compact",
    "topk-1-tail-1-draws-1": "lossless",
    "topk-3-tail-2-draws-2": "compact",
}


def example(betas: tuple[float, ...]) -> tuple[Targets, Targets]:
    """A record's targets, and the sample for its tables.

    Two kinds of positions, one position with nearly all mass on one id, one with ids of log 0.
    """
    rng = np.random.default_rng(2)
    kinds = rng.normal(size=(2, VOCABULARY)) * 3
    logits = kinds[rng.integers(2, size=600)] + rng.normal(size=(600, VOCABULARY))
    logits[1, 7] += 90
    logits[2, 4:] = -np.inf
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1, kind="stable")
    nodes = np.full((600, len(betas)), -np.inf)
    nodes[:, 0] = np.log(VOCABULARY - K)
    tail = np.take_along_axis(logprobs, ids[:, K:], 1)
    for i, beta in enumerate(betas[1:], start=1):
        nodes[:, i] = np.logaddexp.reduce(beta * tail, axis=1)
    head = np.take_along_axis(logprobs, ids[:, :K], 1)
    arrays = ids[:, :K].astype(np.int32), head.astype(np.float32), nodes.astype(np.float32)
    return Targets(*(a[:POSITIONS] for a in arrays)), Targets(*(a[POSITIONS:] for a in arrays))


def with_draws() -> tuple[Targets, Targets]:
    """A record's targets and its sample, both with tail draws."""
    rng = np.random.default_rng(3)
    kinds = rng.normal(size=(2, VOCABULARY)) * 3
    logits = kinds[rng.integers(2, size=600)] + rng.normal(size=(600, VOCABULARY))
    logits[1, 7] += 90
    targets = sampling.with_draws(logits, rng.random(600), k=K, m=6, betas=(0.5, 1.0))
    return targets[:POSITIONS], targets[POSITIONS:]


def main():
    compact._ENTRIES_PER_FRAME = 12  # several groups of positions in a tiny record
    for name, profile in CODECS.items():
        path = HERE / f"{name}.npz"
        if path.exists():
            continue
        nodes = EIGHTHS if "tail-3" in name else BETAS
        record, sample = with_draws() if "draws" in name else example(nodes)
        tables = fit(profile, sample, vocabulary=VOCABULARY)
        blocks = encode(profile, record, tables=tables, vocabulary=VOCABULARY)
        shape = {"positions": [POSITIONS], "k": K, "vocabulary": VOCABULARY}
        expected = decode([blocks], tables=tables, **shape)
        np.savez_compressed(
            path,
            **{f"table_{n}": array for n, array in tables.arrays().items()},
            **{f"block_{b.field}_{b.codec}": np.frombuffer(b.payload, np.uint8) for b in blocks},
            ids=expected.ids,
            logprobs=expected.logprobs,
            tail_logmass=expected.tail_logmass,
            **_arrays_of(expected.draws),
        )


def _arrays_of(draws: Draws | None) -> dict[str, np.ndarray]:
    if draws is None:
        return {}
    return {
        "draws_ids": draws.ids,
        "draws_logprobs": draws.logprobs,
        "betas": np.array(draws.betas),
    }


if __name__ == "__main__":
    main()
