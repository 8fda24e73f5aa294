"""The teacher's distribution of all ids, by its sketch, given to the student's ids, on a device.

    q(s) = Σ_{v: first(v) = s} p(v),   then  q(first(t₁)) −= P(y),  q(y) += P(y)

p has the stored head and the tail's exact mass at T = 1 with the sketch's shape. Ids that the
student cannot spell are left out, and the others grow by the same factor. A temperature is applied
to q, so the targets serve every T.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.alignment.positions import Positions
from decant.pipelines.teacher.targets import (
    CHUNK_TOKENS,
    LogitsSpec,
    TokenInputs,
    targets_of_logits,
)
from decant.schemas.targets.sketch import SketchHead

_FLOOR = -1000.0
"""The log-probability of ids that get nothing: finite, and 0 at every node after exp."""


class DenseProjection:
    """Makes targets of positions with a sketch; `first` and `size` as in `project_head`."""

    def __init__(
        self,
        head: SketchHead,
        *,
        first: Int[np.ndarray, " vocabulary"],
        size: int,
        spec: LogitsSpec,
    ):
        self._arrays = {
            "matrix": jnp.asarray(head.head),
            "bias": jnp.asarray(head.bias_at(1.0)),
            "first": jnp.asarray(np.where(first < 0, size, first).astype(np.int32)),
        }
        self._program = jax.jit(partial(_targets, size=size, spec=spec, softcap=head.softcap))

    def __call__(
        self, batch: Mapping[str, np.ndarray], at: Positions, inputs: TokenInputs
    ) -> dict[str, np.ndarray]:
        """The targets of n positions, as `teacher.targets.targets` gives them, and
        `label_logprobs`; n ≤ `CHUNK_TOKENS`.

        `batch` has the positions' `sketch`, `topk_ids`, `topk_logprobs` and `tail_logmass`.
        """
        n = len(at)
        given = {name: _padded(batch[name]) for name in ("sketch", "topk_ids", "topk_logprobs")}
        given["tail"] = _padded(batch["tail_logmass"][:, -1])
        known = np.isfinite(at.label_logprob)
        of_labels = {
            "following": at.following,
            "label": at.label,
            "moved": at.moved.astype(np.float32),
            # NaN: use the sketch's.
            "own": np.where(known, at.label_logprob, np.nan).astype(np.float32),
        }
        given |= {name: _padded(array) for name, array in of_labels.items()}
        starts = TokenInputs(*(None if x is None else _padded(x) for x in inputs))
        out = self._program(self._arrays, given, starts)
        return {name: np.asarray(array)[:n] for name, array in out.items()}


def _padded(array: Any) -> Any:
    """With rows of zeros up to `CHUNK_TOKENS`, so that all batches have one shape."""
    return np.pad(array, [(0, CHUNK_TOKENS - len(array))] + [(0, 0)] * (array.ndim - 1))


def _targets(
    head: Mapping[str, Array],
    at: Mapping[str, Array],
    inputs: TokenInputs,
    *,
    size: int,
    spec: LogitsSpec,
    softcap: float | None,
) -> dict[str, Array]:
    p = _probabilities(head, at, softcap=softcap)
    position = jnp.arange(p.shape[0])
    first = head["first"]
    # A scatter of rows: one of columns is slow, and so is a gather of rows in the order of `first`.
    summed = jnp.zeros((size, p.shape[0])).at[first].add(p.T, mode="drop")
    to, label = first[at["following"]], at["label"]
    of_next = p[position, at["following"]]
    moved = of_next * at["moved"]
    before = summed[label, position]
    summed = summed.at[to, position].add(-moved, mode="drop").at[label, position].add(moved)
    q = jnp.maximum(summed.T, 0.0)
    whole = jnp.sum(q, axis=-1)
    logits = jnp.maximum(jnp.log(q), _FLOOR)
    fields = targets_of_logits(logits, inputs, spec=spec, vocabulary=Vocabulary(size))
    # P(t₁) is stored more exactly than the sketch has it.
    own = jnp.where(jnp.isnan(at["own"]), of_next, jnp.exp(at["own"]))
    same = to == label
    others = jnp.maximum(before - jnp.where(same, of_next, 0.0), 0.0)
    labelled = others + own * jnp.where(same, 1.0, at["moved"])
    return fields | {"label_logprobs": jnp.minimum(jnp.log(labelled / whole), 0.0)}


def _probabilities(
    head: Mapping[str, Array], at: Mapping[str, Array], *, softcap: float | None
) -> Float[Array, "n vocabulary"]:
    """p of every teacher id at T = 1."""
    logits = jnp.dot(at["sketch"], head["matrix"], precision="highest") + head["bias"]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    position = jnp.arange(len(logits))[:, None]
    stored = jnp.isfinite(at["topk_logprobs"])
    # Empty slots repeat id 0: they must not hide it.
    ids = jnp.where(stored, at["topk_ids"], logits.shape[1])
    tail = logits.at[position, ids].set(-jnp.inf, mode="drop")
    mass = jnp.exp(at["tail"])[:, None]
    p = jax.nn.softmax(tail, axis=-1) * jnp.where(jnp.isfinite(mass), mass, 0.0)
    p = jnp.where(jnp.isnan(p), 0.0, p)  # an empty tail
    return p.at[position, ids].set(jnp.exp(at["topk_logprobs"]), mode="drop")
