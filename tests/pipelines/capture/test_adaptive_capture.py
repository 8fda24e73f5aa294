"""Adaptive heads through a capture: each position stores the ids that hold the mass asked for."""

import numpy as np
import pytest
from rich.console import Console

from decant.models import open_checkpoint
from decant.pipelines.config import Logits
from decant.pipelines.verification.verify import verify
from decant.schemas import Cache
from decant.schemas.targets.targets import BETAS
from tests.formulas import sampling
from tests.making.caches import tiny_cache

K, MASS = 24, 0.999


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adaptive")


@pytest.fixture(scope="module")
def cache(root) -> Cache:
    return tiny_cache(root, k=K, mass=MASS, profile="compact")


def test_a_position_holds_the_top_ids_of_the_mass_and_the_rest_is_its_tail(root, cache):
    rows = cache.read(cache.rows())
    model = open_checkpoint(str(root / "teacher")).load(dtype="float32")
    states, _ = model(rows["tokens"], rows["segment_ids"], rows["positions"])
    scored = rows["loss_mask"]
    logits = np.asarray(states, np.float64)[scored] @ np.asarray(model.unembedding(), np.float64)
    exact = sampling.log_softmax(logits)
    ids, logprobs = rows["topk_ids"][scored], rows["topk_logprobs"][scored]
    held = np.isfinite(logprobs)
    sizes = held.sum(1)
    assert len(np.unique(sizes)) > 2, np.unique(sizes)
    for position, size in enumerate(sizes.tolist()):
        order = np.argsort(-exact[position], kind="stable")
        probabilities = np.exp(exact[position][order])
        assert set(ids[position, :size].tolist()) == set(order[:size].tolist())
        assert size == K or probabilities[:size].sum() > MASS - 1e-4
        rest = exact[position][order[size:]]
        expected = [np.logaddexp.reduce(beta * rest) for beta in BETAS]
        np.testing.assert_allclose(rows["tail_logmass"][scored][position], expected, atol=0.1)


def test_fewer_ids_are_stored_than_k(cache):
    rows = cache.read(cache.rows())
    stored = np.isfinite(rows["topk_logprobs"][rows["loss_mask"]]).sum(1)
    assert stored.mean() < 0.9 * K


def test_verify_finds_no_fault_in_it(cache, tmp_path):
    result = verify(
        cache.path, rows=2, teacher=None, memory=tmp_path / "m", console=Console(quiet=True)
    )
    assert result.status == 0, result


def test_draws_from_the_tail_of_other_ids_are_refused():
    with pytest.raises(ValueError, match=r"mass is 0\.95, but .* signals\.logits\.draws = 0"):
        Logits(mass=0.95, draws=4).target_spec()
    assert Logits(mass=0.95).target_spec().mass == 0.95
