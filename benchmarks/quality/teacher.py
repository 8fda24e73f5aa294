"""The dense teacher: its last hidden states for every row of the study, computed once.

Its full next-token distribution at any position is `softmax(hidden @ unembedding)`, recomputed
where it is needed: 49,152 numbers a token do not fit on a disk, 576 do.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from decant.models import open_checkpoint
from decant.models.numerics import logits as head
from decant.schemas import Cache
from decant.schemas.disk.atomic import read_json, replacing, write_json

ROWS_AT_A_TIME = 8


class DenseTeacher:
    """The teacher's distribution over the whole vocabulary, for the rows of one corpus."""

    def __init__(self, hidden: np.ndarray, unembedding: jax.Array, *, seconds_per_row: float):
        self._hidden = hidden
        self.unembedding = unembedding
        """[width, vocabulary], in the dtype that the teacher computes in."""
        self.seconds_per_row = seconds_per_row
        """Of its forward pass up to the last hidden state, measured when that was computed."""

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer: what distributions are over."""
        return self.unembedding.shape[1]

    def hidden(self, rows: np.ndarray) -> jax.Array:
        """[n, S, width] of these rows, in the teacher's dtype."""
        return jnp.asarray(self._hidden[np.asarray(rows)], self.unembedding.dtype)


def dense_teacher(name: str, *, cache: Cache, dtype: str, directory: Path) -> DenseTeacher:
    """The teacher `name` on all rows of `cache`; computed unless `directory` has it.

    ValueError if what `directory` has belongs to other rows or another dtype.
    """
    model = open_checkpoint(name).load(dtype=dtype)
    if model.config.final_softcap is not None:
        raise ValueError(f"{name}: caps its logits, which this study's dense teacher does not")
    vocabulary = cache.manifest.vocabulary_size
    unembedding = model.unembedding()[:, :vocabulary].astype(dtype)
    path, about = directory / "teacher-hidden.npy", directory / "teacher-hidden.json"
    belongs = {"rows_id": cache.manifest.rows_id, "teacher": name, "dtype": dtype}
    if not about.exists():
        seconds = _compute(model, cache, path)
        write_json(about, {**belongs, "seconds_per_row": seconds})
    saved = read_json(about)
    seconds = saved.pop("seconds_per_row")
    if saved != belongs:
        raise ValueError(
            f"{path}: holds {json.dumps(saved)}, asked for {json.dumps(belongs)}; use another "
            "--work directory"
        )
    return DenseTeacher(np.load(path, mmap_mode="r"), unembedding, seconds_per_row=seconds)


def _compute(model, cache: Cache, path: Path) -> float:
    """Write [rows, S, width] float32 to `path`; the seconds that a row takes."""
    graph, weights = nnx.split(model)
    width, length = model.config.hidden_size, cache.manifest.sequence_length

    @jax.jit
    def forward(weights, tokens, segment_ids, positions):
        return nnx.merge(graph, weights)(tokens, segment_ids, positions)[0].astype(jnp.float32)

    hidden = np.zeros((len(cache), length, width), np.float32)
    times = []
    for at in range(0, len(cache), ROWS_AT_A_TIME):
        rows = np.arange(at, at + ROWS_AT_A_TIME).clip(max=len(cache) - 1)  # one shape
        batch = cache.read(rows, signals=())
        start = time.perf_counter()
        found = forward(weights, *(batch[x] for x in ("tokens", "segment_ids", "positions")))
        hidden[rows] = np.asarray(found)
        times.append((time.perf_counter() - start) / ROWS_AT_A_TIME)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, hidden)
    return float(np.median(times))


def require_same_teacher(teacher: DenseTeacher, cache: Cache) -> None:
    """ValueError unless the cache's stored log-probabilities are the dense teacher's.

    Within what `compact` may change: hidden states of other rows, or of another model, are off by
    nats.
    """
    rows = cache.rows(split="train")[:2]
    batch, dense = cache.read(rows), np.asarray(logprobs(teacher, rows))
    stored = np.isfinite(batch["topk_logprobs"])
    found = np.take_along_axis(dense, batch["topk_ids"], axis=-1)
    error = np.abs(found - batch["topk_logprobs"])[stored].mean()
    if not error < 0.2:
        raise ValueError(
            f"{cache.path}: its log-probabilities differ from the dense teacher's by {error:.3f} "
            "nats in the mean; they are not the same teacher's on the same rows"
        )


def logprobs(teacher: DenseTeacher, rows: np.ndarray, *, temperature: float = 1.0) -> jax.Array:
    """Dense log-probabilities [n, S, vocabulary] at T: for few rows only."""
    hidden = teacher.hidden(rows)
    flat = head(hidden.reshape(-1, hidden.shape[-1]), teacher.unembedding, softcap=None)
    return jax.nn.log_softmax(flat / temperature, axis=-1).reshape(*hidden.shape[:2], -1)
