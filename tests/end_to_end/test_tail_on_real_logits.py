"""The stored tail mass of the embedded teacher at temperatures between the nodes, in float64."""

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.models.mesh.vocabulary import Vocabulary
from decant.pipelines.teacher.sharded_head import Head
from decant.pipelines.teacher.targets import LogitsSpec, TokenInputs, targets
from decant.schemas.codecs import Tables, decode, encode
from decant.schemas.signals import TargetSpec
from decant.schemas.targets.targets import BETAS, EIGHTHS, Targets, tail_logmass_at
from tests.formulas import sampling

TOKENS, VOCABULARY = 160, 49_152
TEMPERATURES = (1, 1.05, 1.2, 1.4, 1.7, 2, 2.5, 3, 4, 5.5, 8, 12, 30, 1000)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of the embedded teacher on source code, and its unembedding."""
    checkpoint = open_checkpoint("embedded")
    ids = checkpoint.tokenizer().encode_batch([inspect.getsource(json)])[0][:TOKENS]
    model = checkpoint.load(dtype="float32")
    ones = jnp.ones((1, TOKENS), jnp.int32)
    hidden, _ = model(jnp.asarray(ids)[None], ones, jnp.arange(TOKENS)[None])
    return np.asarray(hidden[0]), np.asarray(model.unembedding()[:, :VOCABULARY])


@pytest.mark.parametrize(
    ("k", "nodes", "bound"),
    [(64, EIGHTHS, 2e-6), (16, EIGHTHS, 2e-6), (64, BETAS, 5e-6), (16, BETAS, 5e-5)],
)
def test_at_every_temperature_and_position_the_stored_tail_is_close(real, k, nodes, bound):
    hidden, unembedding = real
    fields = targets(
        jnp.asarray(hidden),
        jnp.asarray(unembedding),
        TokenInputs(),
        spec=LogitsSpec(TargetSpec(k, betas=nodes)),
        head=Head(Vocabulary(VOCABULARY)),
    )
    held = Targets(*(np.asarray(fields[name]) for name in ("ids", "logprobs", "tail_logmass")))
    shape = {"vocabulary": VOCABULARY, "tables": Tables({})}
    stored = decode([encode("lossless", held, **shape)], positions=[TOKENS], k=k, **shape)
    logp = sampling.log_softmax(hidden.astype(np.float64) @ unembedding.astype(np.float64))
    top = np.take_along_axis(logp, stored.ids, 1)
    tail = np.ones(logp.shape, bool)
    np.put_along_axis(tail, stored.ids, False, axis=1)
    rest = logp[tail].reshape(TOKENS, -1)
    worst = []
    for temperature in TEMPERATURES:
        beta = np.float32(1 / temperature)
        mass = np.logaddexp.reduce(rest / temperature, axis=1)
        p = normalised(np.concatenate([top / temperature, mass[:, None]], axis=1))
        # In float32, as the loss computes it.
        read = tail_logmass_at(stored.tail_logmass, beta)
        assert read.dtype == np.float32
        q = normalised(np.concatenate([beta * stored.logprobs, read[:, None]], axis=1))
        worst.append((np.exp(p) * (p - q)).sum(1).max())
    assert max(worst) < bound


def normalised(logs: np.ndarray) -> np.ndarray:
    logs = logs.astype(np.float64)
    return logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)
