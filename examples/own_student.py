"""A student of one's own, learned from a cache by one's own loop: a GRU in Flax, updated by Optax.

    python examples/own_student.py runs/cache --updates 300

Only `decant.batches`, `decant.loss` and `decant.evaluate` know the cache. Packed rows hold several
documents: the GRU's state is reset where `positions` is 0.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import decant


class GRU(nnx.Module):
    """An embedding, one recurrent layer and an unembedding."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.cell = nnx.GRUCell(width, width, rngs=rngs)
        self.unembedding = nnx.Param(0.02 * rngs.normal((width, vocabulary)))

    def __call__(self, tokens, positions):
        """Hidden states [rows, S, width] of tokens [rows, S]."""

        def step(state, now):
            inputs, position = now
            state = jnp.where(position[:, None] == 0, 0.0, state)
            return self.cell(state, inputs)

        by_time = jnp.moveaxis(self.embedding(tokens), 1, 0), positions.T
        start = jnp.zeros((len(tokens), self.unembedding.shape[0]))
        return jnp.moveaxis(jax.lax.scan(step, start, by_time)[1], 0, 1)


def main(arguments: list[str] | None = None) -> dict:
    """Train and judge the student; returns its held-out measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    flags = parser.parse_args(arguments)

    cache = decant.open_cache(flags.cache)
    student = GRU(cache.manifest.vocabulary_size, flags.width, rngs=nnx.Rngs(0))
    graph, params = nnx.split(student)
    optimiser = optax.adamw(optax.cosine_decay_schedule(flags.learning_rate, flags.updates))
    moments = optimiser.init(params)

    @jax.jit
    def update(params, moments, batch):
        def objective(params):
            student = nnx.merge(graph, params)
            hidden = student(batch["tokens"], batch["positions"])
            return decant.loss(hidden, student.unembedding[...], batch, has_aux=True)

        (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        changes, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments, metrics

    with decant.batches(cache, batch_rows=flags.batch_rows, epochs=None) as batches:
        for number in range(1, flags.updates + 1):
            params, moments, metrics = update(params, moments, next(batches))
            if number % 50 == 0 or number == flags.updates:
                print(f"update {number}  KL {metrics['kl_loss']:.3f}  CE {metrics['ce_loss']:.3f}")

    @jax.jit
    def logits(tokens, segment_ids, positions):
        student = nnx.merge(graph, params)
        return student(tokens, positions) @ student.unembedding[...]

    judged = decant.evaluate(cache, logits)
    print(
        f"held out: KL {judged['heldout_kl']:.3f} ({judged['heldout_kl_by']}), "
        f"CE {judged['heldout_ce']:.3f}, agreement {judged['heldout_agreement']:.1%}"
    )
    return judged


if __name__ == "__main__":
    main()
