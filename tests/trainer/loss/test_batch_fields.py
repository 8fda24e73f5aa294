"""The arrays that a loss reads of a batch, and the error if a cache lacks them."""

import pytest

from decant.trainer.config import Loss
from decant.trainer.loss.batch_fields import check_targets, loss_fields


def test_draws_go_to_the_device_only_for_the_loss_that_needs_them():
    assert set(loss_fields("sampled")) - set(loss_fields("bucket")) == {
        "tail_ids",
        "tail_logprobs",
        "tail_logweights",
    }
    assert loss_fields("prior") == loss_fields("renormalize") == loss_fields("bucket")


def test_sampled_needs_draws(cache, drawn_cache):
    with pytest.raises(ValueError, match=r"cache: .* without draws .* --signals.logits.draws"):
        check_targets(cache, loss=Loss(tail="sampled"))
    check_targets(drawn_cache, loss=Loss(tail="sampled"))
    check_targets(cache, loss=Loss(tail="bucket"))


@pytest.mark.parametrize("temperatures", [{"temperature": 2.5}, {"temperature_end": 4.0}])
def test_draws_are_refused_above_the_temperatures_that_they_were_made_at(temperatures, drawn_cache):
    check_targets(drawn_cache, loss=Loss(temperature=2.0, temperature_end=1.0))
    with pytest.raises(ValueError, match=r"at T up to 2, but loss.temperature goes up to"):
        check_targets(drawn_cache, loss=Loss(**temperatures))
    check_targets(drawn_cache, loss=Loss(tail="prior", **temperatures))
