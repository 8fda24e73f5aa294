"""The reference that `verify` compares a cache with: the teacher run as plainly as possible.

It shares only the model with capture. It reads one document segment at a time, in a batch of one,
at positions 0 … n−1, and computes the whole vocabulary's logits and their log-softmax in float32.
There is no packing, no top-k, no tail, no draws and no codec.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from decant.models import Checkpoint
from decant.models.mesh.sharding import teacher_mesh
from decant.schemas.manifest.plan import PlannedTeacher

_SHORTEST = 32
"""Positions of the smallest program. Segments are padded at the end to powers of two, so that few
programs are compiled; causal attention never sees the padding."""
LAST = -1
"""The layer after the final norm."""
_BLOCK = 128
"""Positions whose logits are computed at once."""


@dataclass(frozen=True)
class SegmentOutput:
    """The teacher's outputs for one segment of n tokens, all float32."""

    logits: np.ndarray
    """[n, V]."""
    hidden: dict[int, np.ndarray]
    """States [n, D] by layer."""
    maps: dict[int, np.ndarray]
    """Attention maps [heads, n, n] by block."""


class Reference:
    """The teacher of a plan, with loaded weights.

    `layers` and `blocks` are the hidden layers and attention blocks that `run` returns.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: PlannedTeacher,
        *,
        layers: Sequence[int] = (),
        blocks: Sequence[int] = (),
    ):
        split = planned.mesh.tensor * planned.mesh.expert > 1
        # A model that was split over devices is split again: one device may not hold it.
        mesh = (
            teacher_mesh(data=1, tensor=planned.mesh.tensor, expert=planned.mesh.expert)
            if split
            else None
        )
        model = checkpoint.load(dtype=planned.dtype, quantize=planned.quantize, mesh=mesh)
        self._graph, self._weights = nnx.split(model)
        self._layers, self._blocks = tuple(sorted(layers)), tuple(sorted(blocks))
        head = model.unembedding()[:, : planned.vocabulary_size]
        self._head = jnp.asarray(head, jnp.float32)
        self._cap = model.config.final_softcap

    @property
    def unembedding(self) -> np.ndarray:
        """The head [D, V], float32."""
        return np.asarray(self._head)

    def run(self, tokens: np.ndarray) -> SegmentOutput:
        """The teacher's outputs for the tokens of one segment, int32 [n]."""
        n = len(tokens)
        length = max(_SHORTEST, 1 << (n - 1).bit_length())
        ids, segments = np.zeros((2, 1, length), np.int32)
        ids[0, :n], segments[0, :n] = tokens, 1
        last, hidden, maps = _states(
            self._weights,
            ids,
            segments,
            np.arange(length)[None],
            graph=self._graph,
            layers=self._layers,
            blocks=self._blocks,
        )
        blocks = [
            _logits(last[0, i : i + _BLOCK], self._head, cap=self._cap) for i in range(0, n, _BLOCK)
        ]
        logits = np.concatenate([np.asarray(block) for block in blocks])[:n]
        return SegmentOutput(
            logits,
            {layer: np.asarray(x[0, :n], np.float32) for layer, x in hidden.items()},
            {block: np.asarray(x[0, :, :n, :n], np.float32) for block, x in maps.items()},
        )


@partial(jax.jit, static_argnames=("graph", "layers", "blocks"))
def _states(weights, tokens, segments, positions, *, graph, layers, blocks):
    model = nnx.merge(graph, weights)
    wanted = sorted({*layers, *blocks} - {LAST})
    last, hidden = model(tokens, segments, positions, hidden_layers=wanted)
    hidden[LAST] = last
    maps = {
        block: model.attention_maps(hidden[block], segments, positions, layer=block)
        for block in blocks
    }
    return last, {layer: hidden[layer] for layer in layers}, maps


@partial(jax.jit, static_argnames="cap")
def _logits(states, head, *, cap):
    logits = jnp.matmul(states.astype(jnp.float32), head, precision="highest")
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def log_softmax(logits: np.ndarray, *, beta: float = 1.0) -> np.ndarray:
    """log(softmax(β·logits)) over the last axis, float32."""
    scaled = logits * np.float32(beta)
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True, dtype=np.float64)).astype("f4")


def segments_of(batch: Mapping[str, np.ndarray], row: int) -> list[np.ndarray]:
    """Positions of each segment of a row of the batch, int64 [n], in order; none is empty."""
    ids = batch["segment_ids"][row]
    # A forgotten segment leaves a gap in the numbers.
    return [np.flatnonzero(ids == number) for number in np.unique(ids[ids > 0]).tolist()]
