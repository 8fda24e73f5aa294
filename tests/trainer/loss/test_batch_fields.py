"""The fields of a batch that a loss reads, and the errors for caches without them."""

import contextlib
import dataclasses

import numpy as np
import pytest

from decant.schemas import Cache
from decant.schemas.reading.held import loss_targets
from decant.trainer.config import Data, Loss
from decant.trainer.data.batches import Batches
from decant.trainer.loss.batch_fields import ROWS, check_targets, loss_fields
from tests.making.companions import with_companions
from tests.making.resealed import copy_of


def test_draws_are_read_only_for_tail_sampled():
    assert set(loss_fields("sampled")) - set(loss_fields("bucket")) == {
        "tail_ids",
        "tail_logprobs",
        "tail_logweights",
    }
    assert loss_fields("prior") == loss_fields("renormalize") == loss_fields("bucket")


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [
        ("counts", "forward_kl"),
        ("sketch", "jsd"),
        ("sampled", "forward_kl"),
        ("bucket", "tv"),
        (None, "on_policy"),
    ],
)
def test_a_batch_of_what_the_loss_reads_has_the_bits_of_a_batch_of_everything(
    drawn_cache, tmp_path, tail, divergence
):
    cache = with_companions(copy_of(drawn_cache, tmp_path / "cache"))
    assert cache.targets == ("draws", "labels", "counts", "sketch")
    read = loss_targets(tail, divergence)
    assert len(read) == (tail != "bucket")
    own, everything = (
        Batches(cache, config=Data(batch_rows=2), targets=targets) for targets in (read, None)
    )
    with contextlib.closing(own), contextlib.closing(everything):
        few, every = own.next(), everything.next()
    assert len(few) < len(every)
    needed = [n for n in loss_fields(tail, divergence) if n != "writer_logprobs"]
    assert few.keys() >= {*needed}
    for name, array in few.items():
        np.testing.assert_array_equal(array, every[name], strict=True)


def test_tail_sampled_needs_a_cache_with_draws(cache, drawn_cache):
    with pytest.raises(ValueError, match=r"cache: .* no draws .* --signals.logits.draws"):
        check_targets(cache, loss=Loss(tail="sampled"))
    check_targets(drawn_cache, loss=Loss(tail="sampled"))
    check_targets(cache, loss=Loss(tail="bucket"))


@pytest.mark.parametrize("temperatures", [{"temperature": 2.5}, {"temperature_end": 4.0}])
def test_temperatures_above_those_of_the_draws_are_refused(temperatures, drawn_cache):
    check_targets(drawn_cache, loss=Loss(temperature=2.0, temperature_end=1.0))
    with pytest.raises(ValueError, match=r"at T up to 2, but loss.temperature is up to"):
        check_targets(drawn_cache, loss=Loss(tail="sampled", **temperatures))
    check_targets(drawn_cache, loss=Loss(tail="prior", **temperatures))


def test_on_policy_reads_no_top_k_and_needs_rollouts(cache):
    loss = Loss(divergence="on_policy")
    read = loss_fields(loss.tail, loss.divergence)
    assert set(read) - set(ROWS) == {"label_logprobs", "writer_logprobs"}
    with pytest.raises(ValueError, match=r"cache: .* wrote them.*decant generate"):
        check_targets(cache, loss=loss)
    check_targets(cache, loss=loss, mixed=True)
    before = dataclasses.replace(cache.manifest.logits, labels=False)
    signals = {**cache.manifest.signals, "logits": before}
    parts = [dataclasses.replace(part, signals=signals) for part in cache.manifest.parts]
    manifest = dataclasses.replace(cache.manifest, parts=tuple(parts))
    with pytest.raises(ValueError, match=r"no teacher's log-probabilities .* Capture"):
        check_targets(Cache(cache.path, manifest), loss=loss, mixed=True)
