"""Gradients from tail draws are unbiased, through capture, codec, `Cache.read` and fused loss.

All documents begin with the same tokens and then differ, so that every row has other draws from the
same tails. The mean over rows of the sampled gradients is compared, along fixed random directions,
with the gradient towards the whole distribution.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.schemas import Cache
from decant.trainer.loss.chunk_loss import Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.targets import BatchTargets
from tests.formulas import sampling
from tests.making.caches import WORDS, tiny_cache

SHARED, ROWS, DIRECTIONS, WIDTH = 24, 256, 64, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unbiased")
    (root / "corpus").mkdir()
    rng = np.random.default_rng(0)
    beginning = " ".join(WORDS[i % len(WORDS)] for i in range(30))
    for number in range(ROWS + 40):
        words = " ".join(rng.choice(WORDS, 12))
        (root / "corpus" / f"{number:03d}.txt").write_text(f"{beginning} {words}")
    return root


def rows_that_begin_alike(cache: Cache) -> dict[str, np.ndarray]:
    """The beginnings of rows, as far as all documents are the same."""
    batch = cache.read(cache.rows())
    first = batch["tokens"][0, :SHARED]
    alike = (batch["tokens"][:, :SHARED] == first).all(1)
    alike &= (batch["segment_ids"][:, SHARED] == 1) & batch["loss_mask"][:, :SHARED].all(1)
    assert alike.sum() >= ROWS
    return {name: x[alike, : SHARED - 1] for name, x in batch.items()}


def teacher_logits(root: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    model = open_checkpoint(str(root / "teacher")).load(dtype="float32")
    names = ("tokens", "segment_ids", "positions")
    hidden, _ = model(*(batch[name][:1] for name in names))
    return np.asarray(hidden, np.float64)[0] @ np.asarray(model.unembedding(), np.float64)


@partial(jax.jit, static_argnames="tail")
def gradients(hidden, unembedding, batch, directions, *, temperature, tail):
    """Each row's gradient of the unembedding, along each direction: [rows, directions]."""

    names = [name for name in BatchTargets._fields[2:] if name in batch]

    def of_row(row):
        targets = BatchTargets(
            labels=jnp.zeros(row["loss_mask"].shape, jnp.int32)[None],
            mask=row["loss_mask"][None],
            **{name: row[name][None] for name in names},
        )
        gradient = jax.grad(
            lambda w: distillation_loss(
                hidden[None],
                w,
                targets,
                temperature=temperature,
                alpha=1.0,
                recipe=Recipe(tail=tail),
            )[0]
        )(unembedding)
        return jnp.einsum("dv,xdv->x", gradient, directions)

    return jax.lax.map(of_row, {name: batch[name] for name in ("loss_mask", *names)})


@pytest.mark.parametrize(
    ("temperature", "logits"),
    [
        (1.0, {"draws": 8}),
        pytest.param(2.0, {"draws": 16, "draw_temperatures": (1.0, 2.0)}, marks=pytest.mark.slow),
        pytest.param(1.0, {"draws": 8, "profile": "compact"}, marks=pytest.mark.slow),
    ],
    ids=["T1", "T2", "compact"],
)
def test_sampled_gradients_are_unbiased_from_capture_to_fused_loss(root, temperature, logits):
    name = "-".join(map(str, logits.values()))
    cache = tiny_cache(
        root,
        sequence_length=56,
        heldout=0.01,
        batch_rows=16,
        shard_bytes=1 << 20,
        output=root / name,
        **logits,
    )
    batch = rows_that_begin_alike(cache)
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(SHARED - 1, WIDTH)).astype(np.float32)
    unembedding = rng.normal(size=(WIDTH, 512)).astype(np.float32)
    directions = rng.normal(size=(DIRECTIONS, WIDTH, 512)).astype(np.float32)

    sampled, bucket = (
        np.asarray(
            gradients(hidden, unembedding, batch, directions, temperature=temperature, tail=tail),
            np.float64,
        )
        for tail in ("sampled", "bucket")
    )
    teacher = teacher_logits(root, batch)
    p, q = (
        np.exp(sampling.log_softmax(x / temperature))
        for x in (teacher, hidden.astype(np.float64) @ unembedding)
    )
    # The gradient of T² · KL at T in the logits that the tail's inner shape adds.
    tail = sampling.tail_of(teacher, 8)
    share = np.where(tail, p, 0).sum(1) / np.where(tail, q, 0).sum(1)
    shape = temperature * np.where(tail, share[:, None] * q - p, 0)
    exact = np.einsum("td,tv,xdv->x", hidden, shape, directions)
    # A codec's rounding of the top-k changes both losses equally, so it cancels.
    added = sampled - bucket
    deviation = added.std(0, ddof=1) / np.sqrt(len(added))
    rounding = 0.03 * np.sqrt(np.mean(exact**2)) if "profile" in logits else 0.0
    assert (np.abs(added.mean(0) - exact) < 4 * deviation + rounding).all()
    # The test is sharp enough: most of the added gradient exceeds its noise.
    assert (np.abs(exact) > 4 * deviation + rounding).mean() > 0.5
    if "profile" not in logits:
        whole = np.einsum("td,tv,xdv->x", hidden, temperature * (q - p), directions)
        deviation = sampled.std(0, ddof=1) / np.sqrt(len(sampled))
        assert (np.abs(sampled.mean(0) - whole) < 4 * deviation).all()


@pytest.mark.parametrize("k", [0, 8])
def test_gradients_of_counts_are_unbiased_from_capture_to_fused_loss(root, k):
    cache = tiny_cache(
        root,
        sequence_length=56,
        heldout=0.01,
        batch_rows=16,
        shard_bytes=1 << 20,
        output=root / f"counts-{k}",
        k=k,
        counts=20,
        profile="compact",
    )
    batch = rows_that_begin_alike(cache)
    assert (batch["counts"].sum(-1) == 20).all()
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(SHARED - 1, WIDTH)).astype(np.float32)
    unembedding = rng.normal(size=(WIDTH, 512)).astype(np.float32)
    directions = rng.normal(size=(DIRECTIONS, WIDTH, 512)).astype(np.float32)
    got = gradients(hidden, unembedding, batch, directions, temperature=1.0, tail="counts")
    got = np.asarray(got, np.float64)
    p, q = (
        np.exp(sampling.log_softmax(x))
        for x in (teacher_logits(root, batch), hidden.astype(np.float64) @ unembedding)
    )
    exact = np.einsum("td,tv,xdv->x", hidden, q - p, directions)
    deviation = got.std(0, ddof=1) / np.sqrt(len(got))
    assert (np.abs(got.mean(0) - exact) < 4 * deviation).all()
    # The test is sharp enough: most of the gradient exceeds its noise.
    assert (np.abs(exact) > 4 * deviation).mean() > 0.5
