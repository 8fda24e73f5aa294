"""Targets on the device, compared with dense float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs, targets
from decant.pipelines.teacher.targets import targets_of_logits as of_logits
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import BETAS, EIGHTHS


def targets_of_logits(logits, *, k, betas=BETAS):
    return of_logits(
        logits,
        TokenInputs(),
        spec=LogitsSpec(TargetSpec(k, betas=betas)),
        vocabulary=Vocabulary(logits.shape[1]),
    )


def dense(logits: np.ndarray, *, k: int, betas=BETAS) -> dict[str, np.ndarray]:
    """The definition, in float64, by sorting."""
    x = logits.astype(np.float64)
    top = x.max(-1, keepdims=True)
    logprobs = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ordered = np.take_along_axis(logprobs, order, -1)
    with np.errstate(divide="ignore"):
        tail = np.stack([np.log(np.exp(b * ordered[:, k:]).sum(-1)) for b in betas], -1)
    return {"ids": order[:, :k], "logprobs": ordered[:, :k], "tail_logmass": tail}


def assert_same(fields: dict, expected: dict, *, atol: float = 2e-5) -> None:
    np.testing.assert_array_equal(fields["ids"], expected["ids"])
    np.testing.assert_allclose(fields["logprobs"], expected["logprobs"], atol=atol)
    np.testing.assert_allclose(fields["tail_logmass"], expected["tail_logmass"], atol=atol)


@pytest.mark.parametrize("vocab", [5, 512, 3000, 20_011])
@pytest.mark.parametrize("k", [1, 2, 4, 64])
@pytest.mark.parametrize("betas", [BETAS, EIGHTHS])
def test_any_k_and_vocabulary(vocab, k, betas):
    k = min(k, vocab)
    logits = np.random.default_rng(vocab + k).normal(size=(7, vocab)).astype(np.float32) * 4
    fields = targets_of_logits(jnp.asarray(logits), k=k, betas=betas)
    assert_same(fields, dense(logits, k=k, betas=betas))


@pytest.mark.parametrize("k", [511, 512])
def test_all_or_all_but_one_stored(k):
    logits = np.random.default_rng(k).normal(size=(7, 512)).astype(np.float32) * 4
    assert_same(targets_of_logits(jnp.asarray(logits), k=k), dense(logits, k=k))


@pytest.mark.parametrize("k", [1, 3, 16])
def test_equal_logits_are_taken_by_the_lower_id_and_none_is_lost(k):
    # Few distinct values, so the k-th is tied, inside and across blocks of the two-stage top-k.
    logits = np.random.default_rng(k).integers(0, 3, size=(20, 6000)).astype(np.float32)
    assert_same(targets_of_logits(jnp.asarray(logits), k=k), dense(logits, k=k))


def test_gaps_of_tens_of_nats_and_a_vanishing_tail():
    logits = np.full((3, 4000), -60.0, np.float32)
    logits[:, 7] = 0
    logits[1, 9] = -40
    logits[2] = np.linspace(0, -300, 4000)
    assert_same(targets_of_logits(jnp.asarray(logits), k=2), dense(logits, k=2), atol=1e-4)


def test_a_nearly_whole_tail():
    logits = np.random.default_rng(0).normal(size=(4, 9000)).astype(np.float32) * 1e-3
    assert_same(targets_of_logits(jnp.asarray(logits), k=1), dense(logits, k=1))


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_the_chunk_changes_nothing_but_rounding(chunk):
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(10, 16)).astype(np.float32)
    head = rng.normal(size=(16, 3000)).astype(np.float32)
    fields = targets(
        jnp.asarray(hidden),
        jnp.asarray(head),
        TokenInputs(),
        spec=LogitsSpec(TargetSpec(5)),
        head=Head(Vocabulary(3000)),
        chunk=chunk,
    )
    assert_same(fields, dense(hidden @ head, k=5), atol=1e-4)
