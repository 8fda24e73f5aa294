"""Tokens read one at a time with a memory of those before, against whole rows.

The families' golden logits are those of Hugging Face transformers on a whole row of 24 tokens, see
tests/models/families/test_families.py. Here two beginnings of it are read as prompts of different
lengths in one batch, and the rest token by token.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from decant.models import open_checkpoint
from decant.models.numerics import logits
from tests.models.families.test_families import CASES, GOLDEN, close

LENGTHS = (5, 9)
PROMPT, ROW = 12, 24
# One of each switch: learned positions, windows, sinks and experts, two runs of blocks, softcaps,
# blocks without rotation, a scaling by the row's length, queries that grow, blocks in parallel,
# linear attention, blocks that read the keys and values of others, copies of the residual stream.
FEW = (
    *("gpt2", "gpt_oss", "glm4_moe", "gemma2", "smollm3", "llama_longrope", "ministral3"),
    *("gpt_neox", "qwen3_next", "gemma4", "gemma3n"),
)


def prompts(tokens):
    """Ids, segments and positions of the beginnings, padded on their left."""
    ids, segments, positions = (np.zeros((len(LENGTHS), PROMPT), np.int32) for _ in range(3))
    for row, length in enumerate(LENGTHS):
        at = np.s_[row, PROMPT - length :]
        ids[at], segments[at], positions[at] = tokens[:length], 1, np.arange(length)
    return ids, segments, positions


def read(model, prompt, following):
    """Logits [step, row, vocab] after each prompt, and after each token `following` [step, row]."""
    graph, params = nnx.split(model)
    lengths = jnp.asarray(LENGTHS, jnp.int32)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def all_steps(params):
        model = nnx.merge(graph, params)
        head = partial(logits, unembedding=model.unembedding(), softcap=model.config.final_softcap)

        def step(carry, token_and_step):
            (states, memory), (tokens, number) = carry, token_and_step
            return model.read_next(tokens, lengths + number, memory), head(states)

        steps = jnp.arange(len(following), dtype=jnp.int32)
        return jax.lax.scan(step, model.read_prompts(*prompt, slots=ROW), (following, steps))[1]

    return np.asarray(all_steps(params))


def both(name, **dtype):
    """Logits by `read`, and those of transformers at the same places."""
    golden = np.load(GOLDEN / name / "golden.npz")
    tokens = golden["tokens_0"].astype(np.int32)
    ends = np.arange(ROW - PROMPT)[:, None] + LENGTHS
    model = open_checkpoint(GOLDEN / name).load(**dtype)
    return read(model, prompts(tokens), tokens[ends]), golden["logits_0"][ends - 1]


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in FEW)]
)
def test_logits_after_each_token_are_those_of_transformers_on_the_whole_row(name):
    ours, theirs = both(name)
    # Twice the tolerance of whole rows: two orders of summing instead of one.
    close(name, ours, theirs, atol=6e-5)


def test_in_bfloat16_it_is_the_same_model_but_for_rounding():
    ours, theirs = both("gemma2", dtype="bfloat16")
    assert np.median(np.abs(ours - theirs)) < 0.05
