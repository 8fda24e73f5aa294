"""What a loss asks of a cache, and the answer when the cache does not have it."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from models.sharding import make_mesh
from schemas import Cache
from schemas.targets import BETAS
from tests.trainer.heads import prior_nodes
from trainer.config import Loss
from trainer.needs import check_cache, fields, tail_prior


def cache_with(*, draws=0, betas=BETAS, prior=None):
    cache = Mock(spec=Cache)
    cache.path = "somewhere"
    logits = SimpleNamespace(draws=draws, betas=betas)
    cache.manifest = SimpleNamespace(signals={"logits": logits})
    missing = ValueError("somewhere: part 0000 has no tail prior")
    cache.tail_prior = Mock(return_value=prior, side_effect=missing if prior is None else None)
    return cache


def test_draws_go_to_the_device_only_for_the_loss_that_needs_them():
    assert set(fields("sampled")) - set(fields("bucket")) == {
        "tail_ids",
        "tail_logprobs",
        "tail_logweights",
    }
    assert fields("prior") == fields("renormalize") == fields("bucket")


def test_sampled_needs_draws():
    with pytest.raises(ValueError, match=r"somewhere: .* without draws .* --signals.logits.draws"):
        check_cache(cache_with(), loss=Loss(tail="sampled"))
    check_cache(cache_with(draws=32), loss=Loss(tail="sampled"))
    check_cache(cache_with(), loss=Loss(tail="bucket"))


@pytest.mark.parametrize("temperatures", [{"temperature": 2.0}, {"temperature_end": 2.0}])
def test_a_cache_of_one_temperature_is_refused_at_another(temperatures):
    cache = cache_with(draws=20, betas=(1.0,))
    with pytest.raises(ValueError, match=r"somewhere: .* at T = 1 only, but loss.temperature"):
        check_cache(cache, loss=Loss(**temperatures))
    check_cache(cache, loss=Loss(tail="sampled"))
    check_cache(cache_with(), loss=Loss(**temperatures))


def test_prior_needs_one_and_nothing_else_asks_for_it():
    mesh, loss = make_mesh(), Loss(tail="prior")
    with pytest.raises(ValueError, match="has no tail prior"):
        tail_prior(cache_with(), loss=loss, mesh=mesh)
    assert tail_prior(cache_with(), loss=Loss(), mesh=mesh) is None
    nodes = prior_nodes()
    got = tail_prior(cache_with(prior=nodes), loss=loss, mesh=mesh)
    np.testing.assert_array_equal(got, nodes)
    assert got.sharding.is_fully_replicated
