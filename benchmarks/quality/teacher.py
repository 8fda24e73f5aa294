"""The dense teacher: its last hidden states for every row of the study, computed once.

Its next-token distribution at a position is `softmax(hidden @ unembedding)`, computed when needed:
576 numbers a token fit on a disk, 49,152 do not.
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
        """[width, vocabulary], in the teacher's compute dtype."""
        self.seconds_per_row = seconds_per_row
        """Time of a forward pass up to the last hidden state."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens in a distribution: the tokenizer's."""
        return self.unembedding.shape[1]

    def hidden(self, rows: np.ndarray) -> jax.Array:
        """Hidden states [n, S, width] of these rows, in the teacher's dtype."""
        return jnp.asarray(self._hidden[np.asarray(rows)], self.unembedding.dtype)


def dense_teacher(name: str, *, cache: Cache, dtype: str, directory: Path) -> DenseTeacher:
    """The teacher `name` on all rows of `cache`, read from `directory` or computed.

    Raises ValueError if the states in `directory` are of other rows, another teacher or dtype.
    """
    model = open_checkpoint(name).load(dtype=dtype)
    if model.config.final_softcap is not None:
        raise ValueError(f"{name}: it caps its logits, which this study does not support")
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
    """Write states [rows, S, width] in float32 to `path`; returns the seconds a row."""
    graph, weights = nnx.split(model)
    width, length = model.config.hidden_size, cache.manifest.sequence_length

    @jax.jit
    def forward(weights, tokens, segment_ids, positions):
        return nnx.merge(graph, weights)(tokens, segment_ids, positions)[0].astype(jnp.float32)

    hidden = np.zeros((len(cache), length, width), np.float32)
    times = []
    for at in range(0, len(cache), ROWS_AT_A_TIME):
        # The last row fills up the last batch, so that all batches have one shape.
        rows = np.arange(at, at + ROWS_AT_A_TIME).clip(max=len(cache) - 1)
        batch = cache.read(rows, signals=())
        start = time.perf_counter()
        states = forward(weights, *(batch[x] for x in ("tokens", "segment_ids", "positions")))
        hidden[rows] = np.asarray(states)
        times.append((time.perf_counter() - start) / ROWS_AT_A_TIME)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, hidden)
    return float(np.median(times))


def require_same_teacher(teacher: DenseTeacher, cache: Cache) -> None:
    """Raise ValueError unless the cache's stored log-probabilities are the dense teacher's.

    The tolerance is that of `compact`. Other rows or another model would differ by several nats.
    """
    rows = cache.rows(split="train")[:2]
    batch, dense = cache.read(rows), np.asarray(logprobs(teacher, rows))
    stored = np.isfinite(batch["topk_logprobs"])
    expected = np.take_along_axis(dense, batch["topk_ids"], axis=-1)
    error = np.abs(expected - batch["topk_logprobs"])[stored].mean()
    if not error < 0.2:
        raise ValueError(
            f"{cache.path}: its log-probabilities differ from the dense teacher's by {error:.3f} "
            "nats on average; they are of another teacher or of other rows"
        )


def logprobs(teacher: DenseTeacher, rows: np.ndarray, *, temperature: float = 1.0) -> jax.Array:
    """Log-probabilities [n, S, vocabulary] at T; they are large, so ask for few rows only."""
    hidden = teacher.hidden(rows)
    flat = head(hidden.reshape(-1, hidden.shape[-1]), teacher.unembedding, softcap=None)
    return jax.nn.log_softmax(flat / temperature, axis=-1).reshape(*hidden.shape[:2], -1)
