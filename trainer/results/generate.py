"""The command `generate`: a few text samples from a run's student.

Every new token costs one forward pass over whole rows of fixed length, without a key/value cache:
one compiled program, fast enough for a few samples, too slow for serving. A token is drawn with a
key made from the seed, the sample's number and the token's position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from decant.models.numerics import logits as logits_of
from decant.models.text.tokenizer import Tokenizer
from decant.trainer.config import Generate
from decant.trainer.loss.projections import Parameters
from decant.trainer.run.initial_student import open_initial
from decant.trainer.run.trained_student import load_student

_COLDEST = 1e-6
"""Logits divided by less could leave the range of float32."""
Sampler = Callable[[Int[np.ndarray, "sample position"], int], Int[np.ndarray, " sample"]]
"""(rows, length): the token that follows the first `length` tokens of each row."""


def generate(config: Generate) -> list[str]:
    """The samples as text, each with its prompt and with special tokens spelled out.

    Raises FileNotFoundError if the run does not exist, ValueError if prompt and `max_tokens`
    exceed the student's positions, the tokenizer cannot make the prompt, or the student has no
    embedding for one of its tokens.
    """
    initial = open_initial(config.run)
    tokenizer, longest = initial.tokenizer(), initial.config.longest_row
    prompt, rows = prompt_ids(config, tokenizer), initial.config.vocab_size
    if max(prompt) >= rows:
        raise ValueError(
            f"{config.run}: the prompt holds {tokenizer.decode([max(prompt)])!r}, token "
            f"{max(prompt)}, but the student has embeddings for ids below {rows} only"
        )
    if len(prompt) + config.max_tokens > longest:
        raise ValueError(
            f"{config.run}: a prompt of {len(prompt)} tokens and max_tokens = {config.max_tokens} "
            f"are more than the {longest} positions of this student; set max_tokens to at most "
            f"{max(longest - len(prompt), 0)}"
        )
    graph, params = load_student(config.run, dtype=config.dtype, checkpoint=config.checkpoint)
    samples = complete(
        make_sampler(graph, params, config=config, vocabulary=tokenizer.size),
        prompt,
        samples=config.samples,
        max_tokens=config.max_tokens,
        stop=tokenizer.end_ids,
    )
    return [tokenizer.decode(ids) for ids in samples]


def prompt_ids(config: Generate, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids, as a document begins in a row: BOS if the tokenizer has one, then text.

    With `chat` the prompt is a user's message in the tokenizer's chat template.
    """
    if not config.chat:
        (text_ids,) = tokenizer.encode_batch([config.prompt])
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = [*bos, *text_ids.tolist()]
        if not ids:
            raise ValueError(
                "the prompt is empty and the tokenizer has no BOS token; give --prompt some text"
            )
        return ids
    template = tokenizer.chat_template(date=config.chat_date, variables=config.chat_variables)
    if template is None:
        raise ValueError(f"{config.run}: its tokenizer has no chat template; leave out --chat")
    messages = [{"role": "user", "content": config.prompt}]
    text = template.render(messages, add_generation_prompt=True).text
    return tokenizer.encode_batch([text])[0].tolist()


def complete(
    sampler: Sampler,
    prompt: list[int],
    *,
    samples: int,
    max_tokens: int,
    stop: Collection[int],
) -> list[list[int]]:
    """Ids of each sample: the prompt and up to `max_tokens` more, ending after a `stop` id."""
    rows = np.zeros((samples, len(prompt) + max_tokens), np.int32)
    rows[:, : len(prompt)] = prompt
    ends = np.full(samples, rows.shape[1])
    for at in range(len(prompt), rows.shape[1]):
        rows[:, at] = sampler(rows, at)
        unfinished = ends == rows.shape[1]
        ends[unfinished & np.isin(rows[:, at], list(stop))] = at + 1
        if (ends <= at + 1).all():
            break
    return [row[:end].tolist() for row, end in zip(rows, ends, strict=True)]


def make_sampler(
    graph: nnx.GraphDef, params: Parameters, *, config: Generate, vocabulary: int
) -> Sampler:
    """A sampler of this student by `config.temperature`, `top_p` and `seed`.

    `vocabulary` is the tokenizer's size: ids above it, which a checkpoint may have as padding,
    are never drawn.
    """

    @jax.jit
    def next_ids(
        params: Parameters, rows: Int[Array, "sample position"], length: Int[Array, ""]
    ) -> Int[Array, " sample"]:
        model = nnx.merge(graph, params)
        # Attention is causal, so the zeros after `length` do not matter.
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        hidden, _ = model(rows, jnp.ones_like(rows), positions)
        last = jnp.take(hidden, length - 1, axis=1)
        logits = logits_of(
            last, model.unembedding()[:, :vocabulary], softcap=model.config.final_softcap
        )
        if config.temperature < _COLDEST:
            return jnp.argmax(logits, axis=-1)
        seed = jax.random.key(config.seed)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(seed, i), length))(
            jnp.arange(len(rows))
        )
        sample = partial(sample_top_p, top_p=config.top_p)
        return jax.vmap(sample)(logits / config.temperature, keys)

    return lambda rows, length: np.asarray(next_ids(params, rows, length))


def sample_top_p(
    logits: Float[Array, " vocab"], key: Array, *, top_p: Float[Array, ""] | float
) -> Int[Array, ""]:
    """A token drawn from the fewest likeliest ones whose probabilities add up to `top_p`."""
    order = jnp.argsort(-logits)
    falling = logits[order]
    before = jnp.cumsum(jax.nn.softmax(falling)) - jax.nn.softmax(falling)
    return order[jax.random.categorical(key, jnp.where(before < top_p, falling, -jnp.inf))]
