"""Completions of prompts by a student, many at a time, with a memory of the tokens so far.

The loop over tokens runs on the devices. A batch ends when all its rows have ended.

A completion does not depend on what else is in its batch: its shape follows from the length of its
own prompt, and each token is drawn with a key made from the seed, the numbers of prompt and sample,
and the token's number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from decant.models.decoder.decoder import Decoder, Memory
from decant.models.mesh.execution import Execution
from decant.models.mesh.sharding import row_shard_count, shard_rows
from decant.models.numerics import logits as logits_of
from decant.models.parameters import parameters_by_path
from decant.trainer.run.student_parameters import graph_and_parameters

_COLDEST = 1e-6
"""Logits divided by less could leave the range of float32."""
_SHORTEST = 16
"""Prompts are padded to this many tokens, or twice, four times, … as many."""
_NATS, _HALVINGS = 32.0, 24
"""The search for the least likely token of `likeliest`: its range, and its steps."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_tokens: int
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Logits are divided by it. 0: the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens of this probability."""
    seed: int = 0


class Request(NamedTuple):
    """One completion to write. The numbers enter its key."""

    ids: Sequence[int]
    """The prompt's."""
    prompt: int
    sample: int


class Completion(NamedTuple):
    """What the student wrote after a prompt."""

    ids: np.ndarray
    """int32 [n], an end token included."""
    logprobs: np.ndarray
    """float32 [n]: natural log of the probability that the student gave to each token, at
    temperature 1 and over all tokens, however it was drawn."""


class Sampler:
    """Writes completions of a student.

    Args:
        graph: of the student.
        params: its parameters on `mesh`.
        sampling: how tokens are drawn.
        vocabulary: size of the tokenizer. Ids above it, which a checkpoint may have as padding, do
            not exist for probabilities.
        stop: ids that end a completion.
        batch_rows: completions in one batch, rounded up to what the mesh can split.
        mesh: of the parameters.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: dict[str, Any],
        *,
        sampling: Sampling,
        vocabulary: int,
        stop: Collection[int],
        batch_rows: int,
        mesh: Mesh,
    ):
        shards = row_shard_count(mesh)
        self.batch_rows = -(-batch_rows // shards) * shards
        model = nnx.merge(graph, params)
        _round_matrices(model)
        graph, self._params = graph_and_parameters(model)
        self._sampling, self._mesh = sampling, mesh
        self._longest = model.config.longest_row
        self._program = jax.jit(
            _program(
                graph, sampling, vocabulary=vocabulary, stop=sorted(stop), execution=Execution(mesh)
            )
        )

    def complete(
        self,
        requests: Sequence[Request],
        *,
        written: Callable[[Sequence[Completion]], object] = lambda batch: None,
    ) -> list[Completion]:
        """The completion of each request. `written` is called after each batch."""
        shapes: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            shapes[self._columns(len(request.ids))].append(number)
        found: dict[int, Completion] = {}
        for columns, numbers in sorted(shapes.items()):
            for start in range(0, len(numbers), self.batch_rows):
                batch = numbers[start : start + self.batch_rows]
                made = self._batch([requests[number] for number in batch], columns)
                found |= zip(batch, made, strict=True)
                written(made)
        return [found[number] for number in range(len(requests))]

    def _columns(self, length: int) -> int:
        """Columns of a batch with a prompt of this length: few, and by the length alone."""
        columns = _SHORTEST
        while columns < length:
            columns *= 2
        return max(min(columns, self._longest - self._sampling.max_tokens), length)

    def _batch(self, requests: Sequence[Request], columns: int) -> list[Completion]:
        rows = self.batch_rows
        tokens, lengths = np.zeros((rows, columns), np.int32), np.zeros(rows, np.int32)
        numbers, open_ = np.zeros((rows, 2), np.uint32), np.zeros(rows, bool)
        for row, (ids, prompt, sample) in enumerate(requests):
            tokens[row, columns - len(ids) :] = ids
            lengths[row], numbers[row], open_[row] = len(ids), (prompt, sample), True
        placed = (
            shard_rows(array, count=rows, mesh=self._mesh)
            for array in (tokens, lengths, numbers, open_)
        )
        ids, logprobs, counts = map(np.asarray, self._program(self._params, *placed))
        return [
            Completion(ids[row, : counts[row]], logprobs[row, : counts[row]])
            for row in range(len(requests))
        ]


def _round_matrices(model: Decoder) -> None:
    """Keep the blocks' matrices in the dtype of their products, which would round them anyway: for
    every token once more."""
    for path, parameter in parameters_by_path(model).items():
        axes = parameter.get_metadata()["axes"]
        if path.split(".")[0] in model.config.stacks and {"embed", "latent"} & {*axes}:
            parameter.set_value(parameter.get_value().astype(model.dtype))


class _Written(NamedTuple):
    """The state of a batch between two tokens."""

    step: Int[Array, ""]
    states: Float[Array, "batch embed"]
    memory: Memory
    ids: Int[Array, "batch tokens"]
    logprobs: Float[Array, "batch tokens"]
    counts: Int[Array, " batch"]
    open: Bool[Array, " batch"]


def _program(
    graph: nnx.GraphDef,
    sampling: Sampling,
    *,
    vocabulary: int,
    stop: Sequence[int],
    execution: Execution,
) -> Callable:
    """The function of a batch: ids and log-probabilities [batch, max_tokens], and how many count.

    Its arguments are the parameters, ids [batch, columns] of prompts that end in the last column,
    their lengths, the numbers [batch, 2] of prompt and sample, and which rows there are.
    """
    most = sampling.max_tokens

    def program(params, tokens, lengths, numbers, open_):
        model = nnx.merge(graph, params)
        (batch, columns), cap = tokens.shape, model.config.final_softcap
        head = model.unembedding()[:, :vocabulary].astype(model.dtype)
        seed = jax.random.key(sampling.seed)
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(seed, n[0]), n[1]))(numbers)
        positions = jnp.arange(columns) - (columns - lengths[:, None])
        states, memory = model.read_prompts(
            tokens,
            (positions >= 0).astype(jnp.int32),
            jnp.maximum(positions, 0),
            slots=columns + most,
            execution=execution,
        )

        def write(w: _Written) -> _Written:
            logits = logits_of(w.states, head, softcap=cap)
            ids = draw(logits, keys, w.step, sampling=sampling)
            logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=1)
            states, memory = model.read_next(ids, lengths + w.step, w.memory, execution=execution)
            return _Written(
                step=w.step + 1,
                states=states,
                memory=memory,
                ids=lax.dynamic_update_slice_in_dim(w.ids, ids[:, None], w.step, axis=1),
                logprobs=lax.dynamic_update_slice_in_dim(w.logprobs, logprobs, w.step, axis=1),
                counts=w.counts + w.open,
                open=w.open & ~jnp.isin(ids, jnp.asarray(stop, jnp.int32)),
            )

        empty = _Written(
            step=jnp.int32(0),
            states=states,
            memory=memory,
            ids=jnp.zeros((batch, most), jnp.int32),
            logprobs=jnp.zeros((batch, most), jnp.float32),
            counts=jnp.zeros(batch, jnp.int32),
            open=open_,
        )
        done = lax.while_loop(lambda w: (w.step < most) & jnp.any(w.open), write, empty)
        return done.ids, done.logprobs, done.counts

    return program


def draw(
    logits: Float[Array, "batch vocab"],
    keys: Array,
    step: Int[Array, ""],
    *,
    sampling: Sampling,
) -> Int[Array, " batch"]:
    """A token for each row. `keys` are the rows', `step` the number of the token."""
    if sampling.temperature < _COLDEST:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = jnp.where(likeliest(logits, sampling.top_p), logits, -jnp.inf)
    now = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(now, logits).astype(jnp.int32)


def likeliest(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, ""] | float
) -> Bool[Array, "batch vocab"]:
    """The fewest likeliest tokens whose probabilities add up to `top_p`, and those as likely as the
    last of them.

    A search by halves instead of sorting, which took longer than a small student's forward pass.
    """
    logprobs = jax.nn.log_softmax(logits)
    p = jnp.exp(logprobs)
    most = jnp.max(logprobs, axis=-1, keepdims=True)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        mass = jnp.sum(jnp.where(logprobs >= middle, p, 0), axis=-1, keepdims=True)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, _HALVINGS, halve, (most - _NATS, most))
    return logprobs >= low
