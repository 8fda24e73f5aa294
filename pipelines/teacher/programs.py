"""The programs that the teacher's devices run: forward pass, targets, attention maps."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from decant.models.mesh.sharding import DATA
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.states_and_maps import (
    map_encoder,
    rows_are_finite,
    stored_states,
    zero_unstored,
)
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs, targets
from decant.schemas.records.rows import stored_positions
from decant.schemas.signals import MEAN, AttentionSignal

finite_rows = jax.jit(rows_are_finite)
stored_mask = jax.jit(partial(stored_positions, xp=jnp))
encoded_states = jax.jit(stored_states, static_argnames="dtype")


def forward(graph, weights, tokens, segment_ids, positions, *, layers):
    """The states after the final norm [batch, time, width], and those of `layers` by number."""
    model = nnx.merge(graph, weights)
    return model(tokens, segment_ids, positions, hidden_layers=layers)


def batch_targets(hidden, unembedding, inputs: TokenInputs, *, spec: LogitsSpec, head: Head):
    """`targets.targets` of a batch [batch, time, width]; its results get these two axes, too.

    The inputs are [batch, time]. Each device works on its rows and its part of the vocabulary;
    logits never leave the device.
    """

    def of_device(hidden, unembedding, inputs):
        batch, time, width = hidden.shape
        flat = hidden.reshape(batch * time, width)
        of_tokens = jax.tree.map(jnp.ravel, inputs)
        results = targets(flat, unembedding, of_tokens, spec=spec, head=head)
        return {name: x.reshape(batch, time, *x.shape[1:]) for name, x in results.items()}

    return head.on_each_device(of_device, hidden, unembedding, inputs, out=P(DATA))


@jax.jit
def sketches(hidden, mean, projection):
    """The sketch of each state after the final norm: float32 [batch, time, rank]."""
    centred = hidden.astype(jnp.float32) - mean
    return jnp.einsum("btd,dr->btr", centred, projection, precision=lax.Precision.HIGHEST)


def attention_maps(
    graph, weights, states, segment_ids, positions, stored, layer=None, *, signal: AttentionSignal
):
    """The maps that `signal` stores, [batch, heads, time, time], from block `layer`'s input.

    `layer` is an argument of the program, so that all blocks share one; `signal.layer` is unused.
    None: it is `signal.layer`, in models whose blocks have attention of several sizes.
    """
    layer = signal.layer if layer is None else layer
    heads = None if signal.heads == MEAN else signal.heads
    maps = nnx.merge(graph, weights).attention_maps(
        states, segment_ids, positions, layer=layer, heads=heads, keep=map_encoder(signal)
    )
    return zero_unstored(maps, stored)
