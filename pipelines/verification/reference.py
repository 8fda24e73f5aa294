"""The teacher read plainly: what `verify` compares a cache with.

Nothing of capture is used but the model: one document segment at a time, in a batch of one and at
positions 0 … n−1; the whole vocabulary's logits, their log-softmax in float32; no packing, no
top-k, no tail, no draws, no codec.
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
"""Positions of the smallest program. Segments are padded to powers of two: padding comes after
them, where causal attention does not look, and few programs are compiled."""
_BLOCK = 128
"""Positions whose full logits exist at once."""


@dataclass(frozen=True)
class Said:
    """What the teacher says about one segment of n tokens.

    `logits` float32 [n, V]; `hidden` float32 [n, D] by layer; `maps` float32 [heads, n, n] by
    block.
    """

    logits: np.ndarray
    hidden: dict[int, np.ndarray]
    maps: dict[int, np.ndarray]


class Reference:
    """The teacher of a plan, its weights loaded; run without anything that capture adds."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: PlannedTeacher,
        *,
        layers: Sequence[int] = (),
        blocks: Sequence[int] = (),
    ):
        split = planned.mesh.tensor * planned.mesh.expert > 1
        # One copy of a model that no device can hold alone; the rest is the compiler's.
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

    def say(self, tokens: np.ndarray) -> Said:
        """What the teacher makes of one segment's tokens, int32 [n]."""
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
        return Said(
            logits,
            {layer: np.asarray(x[0, :n], np.float32) for layer, x in hidden.items()},
            {block: np.asarray(x[0, :, :n, :n], np.float32) for block, x in maps.items()},
        )


@partial(jax.jit, static_argnames=("graph", "layers", "blocks"))
def _states(weights, tokens, segments, positions, *, graph, layers, blocks):
    model = nnx.merge(graph, weights)
    wanted = sorted({*layers, *blocks})
    last, hidden = model(tokens, segments, positions, hidden_layers=wanted)
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
    """log of the softmax of β·logits over the last axis, by its definition, float32."""
    scaled = logits * np.float32(beta)
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True, dtype=np.float64)).astype("f4")


def segments_of(batch: Mapping[str, np.ndarray], row: int) -> list[np.ndarray]:
    """Where each segment of a row lies: its positions, int64 [n], in order."""
    ids = batch["segment_ids"][row]
    return [np.flatnonzero(ids == number) for number in range(1, int(ids.max(initial=0)) + 1)]
