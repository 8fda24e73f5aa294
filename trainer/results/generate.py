"""A few samples from a run's student, for a look.

Every token is one pass over whole rows of fixed length, so that one program is compiled and
nothing is remembered between tokens: right for a look, wasteful for serving. A draw depends on the
seed, the sample's number and its place in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from decant.models import open_checkpoint
from decant.models.numerics import logits as logits_of
from decant.models.text.tokenizer import Tokenizer
from decant.trainer.config import Generate
from decant.trainer.run.loop import load_run
from decant.trainer.run.student import INITIAL
from decant.trainer.update.step import Parameters

NextTokens = Callable[[Int[np.ndarray, "sample position"], int], Int[np.ndarray, " sample"]]
"""From rows and how much of them is text, the next token of each."""


def generate(config: Generate) -> list[str]:
    """The samples with their prompt, special tokens in sight."""
    if not (config.run / INITIAL).is_dir():
        raise FileNotFoundError(
            f"{config.run / INITIAL}: not there; {config.run} is not the directory of a run"
        )
    initial = open_checkpoint(config.run / INITIAL)
    tokenizer, longest = initial.tokenizer(), initial.config.max_positions
    prompt = prompt_ids(config, tokenizer)
    if len(prompt) + config.max_tokens > longest:
        raise ValueError(
            f"{config.run}: a prompt of {len(prompt)} tokens and max_tokens = {config.max_tokens} "
            f"are more than the {longest} positions that this student was made for; ask for "
            f"at most {max(longest - len(prompt), 0)}"
        )
    graph, params = load_run(config.run, dtype=config.dtype, checkpoint=config.checkpoint)
    choose = next_tokens(graph, params, config=config, vocabulary=tokenizer.size)
    rows = completed(
        choose,
        prompt,
        samples=config.samples,
        max_tokens=config.max_tokens,
        stop={tokenizer.eos_id},
    )
    return [tokenizer.decode(row) for row in rows]


def prompt_ids(config: Generate, tokenizer: Tokenizer) -> list[int]:
    """The prompt as rows have it: a document's beginning, or what a template makes of a message."""
    if not config.chat:
        (ids,) = tokenizer.encode_batch([config.prompt])
        begins = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        found = [*begins, *ids.tolist()]
        if not found:
            raise ValueError("an empty prompt, and a tokenizer without a token to begin with")
        return found
    template = tokenizer.chat_template(date=config.chat_date)
    if template is None:
        raise ValueError(f"{config.run}: its tokenizer has no chat template; leave out --chat")
    messages = [{"role": "user", "content": config.prompt}]
    text = template.render(messages, add_generation_prompt=True).text
    return tokenizer.encode_batch([text])[0].tolist()


def completed(
    choose: NextTokens,
    prompt: list[int],
    *,
    samples: int,
    max_tokens: int,
    stop: Collection[int],
) -> list[list[int]]:
    """Ids of each sample, prompt included, up to `max_tokens` more or the first of `stop`."""
    rows = np.zeros((samples, len(prompt) + max_tokens), np.int32)
    rows[:, : len(prompt)] = prompt
    ends = np.full(samples, rows.shape[1])
    for at in range(len(prompt), rows.shape[1]):
        rows[:, at] = choose(rows, at)
        going_on = ends == rows.shape[1]
        ends[going_on & np.isin(rows[:, at], list(stop))] = at + 1
        if (ends <= at + 1).all():
            break
    return [row[:end].tolist() for row, end in zip(rows, ends, strict=True)]


def next_tokens(
    graph: nnx.GraphDef, params: Parameters, *, config: Generate, vocabulary: int
) -> NextTokens:
    """What draws the next tokens of this student."""

    @jax.jit
    def choose(
        params: Parameters, rows: Int[Array, "sample position"], at: Int[Array, ""]
    ) -> Int[Array, " sample"]:
        model = nnx.merge(graph, params)
        # What lies after the text is seen by nothing before it.
        places = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        hidden, _ = model(rows, jnp.ones_like(rows), places)
        last = jnp.take(hidden, at - 1, axis=1)
        # A checkpoint may pad its vocabulary; ids beyond the tokenizer's are no tokens.
        logits = logits_of(
            last, model.unembedding()[:, :vocabulary], softcap=model.config.final_softcap
        )
        if config.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        seed = jax.random.key(config.seed)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(seed, i), at))(
            jnp.arange(len(rows))
        )
        draw = partial(drawn, top_p=config.top_p)
        return jax.vmap(draw)(logits / config.temperature, keys)

    return lambda rows, at: np.asarray(choose(params, rows, at))


def drawn(
    logits: Float[Array, " vocab"], key: Array, *, top_p: Float[Array, ""] | float
) -> Int[Array, ""]:
    """A token out of the fewest likeliest whose probabilities make up `top_p`."""
    order = jnp.argsort(-logits)
    falling = logits[order]
    before = jnp.cumsum(jax.nn.softmax(falling)) - jax.nn.softmax(falling)
    return order[jax.random.categorical(key, jnp.where(before < top_p, falling, -jnp.inf))]
