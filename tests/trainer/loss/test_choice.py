"""The tail that a loss gets if none is asked for, and what is said about a weak one."""

import shutil
from pathlib import Path

import pytest

from decant.schemas.reading.held import draws_of_token, held_by
from decant.served_losses import Held
from decant.trainer.config import Data, Loss, Train
from decant.trainer.loss.batch_fields import check_targets
from decant.trainer.loss.choice import choose_tail
from decant.trainer.run.loss_inputs import with_tail
from tests.making.companions import with_companions

ALL = Held(k=8, counts=True, sketch=True, drawn_at=1.0, prior=True)
OLD = Held(k=8, drawn_at=1.0, prior=True)


@pytest.mark.parametrize(
    ("held", "loss", "tail"),
    [
        (ALL, {}, "counts"),
        (ALL, {"temperature": 2.0}, "sketch"),
        (ALL, {"temperature": 4.0, "temperature_end": 1.0}, "sketch"),
        (ALL, {"divergence": "jsd"}, "sketch"),
        (Held(k=8, sketch=True, drawn_at=1.0), {}, "sketch"),
        (OLD, {}, "sampled"),
        (OLD, {"temperature": 2.0}, "prior"),
        (OLD, {"divergence": "reverse_kl"}, "prior"),
        (Held(k=8, drawn_at=2.0, prior=True), {"temperature": 2.0}, "sampled"),
        (Held(k=8), {"temperature": 4.0}, "bucket"),
        (Held(k=0, counts=True), {}, "counts"),
    ],
)
def test_the_tail_is_the_best_that_cache_temperature_and_divergence_allow(held, loss, tail):
    chosen, line = choose_tail(Loss(**loss), held)
    assert chosen.tail == tail
    assert line.startswith(f"loss.tail is {tail}, for T = ")


@pytest.mark.parametrize(
    ("held", "loss", "draws", "tail"),
    [
        (ALL, {}, 1.0, "counts"),
        (ALL, {}, 0.99, "sketch"),
        (Held(k=8, counts=True, drawn_at=1.0), {}, 0.1, "counts"),
        (Held(k=0, counts=True, sketch=True), {}, 0.1, "counts"),
        (ALL, {"temperature": 2.0}, 0.1, "sketch"),
        (ALL, {"tail": "counts"}, 0.1, "counts"),
    ],
)
def test_a_sketch_comes_before_counts_that_draw_a_token_less_than_once_an_update(
    held, loss, draws, tail
):
    chosen, line = choose_tail(Loss(**loss), held, draws_of_token=draws)
    assert chosen.tail == tail
    reason = "those of one update draw a token 0.99 times on average, and below 1 they teach less"
    assert (reason in (line or "")) == (draws == 0.99)


@pytest.mark.parametrize(("rows", "tail"), [(1, "sketch"), (2, "counts")])
def test_a_run_counts_the_draws_of_its_updates(cache, tmp_path, rows, tail):
    here = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    richer = with_companions(here, draws=lambda part: 4)
    assert richer.manifest.vocabulary_size == 512
    assert richer.manifest.sequence_length == 64
    config = Train(cache=here, run=tmp_path / "run", data=Data(batch_rows=rows))
    settings, line = with_tail(config, cache=richer)
    assert settings.loss.tail == tail
    assert ("draw a token 0.5 times" in line) == (tail == "sketch")
    assert draws_of_token([richer, cache], tokens=64) is None


def test_sorted_probabilities_take_the_tail_as_one_category():
    for kind in ("uld", "gold"):
        assert choose_tail(Loss(divergence=kind), ALL) == (
            Loss(divergence=kind, tail="bucket"),
            None,
        )
    with pytest.raises(ValueError, match="this loss is uld"):
        choose_tail(Loss(divergence="uld"), Held(k=0, counts=True))


def test_gold_needs_a_cache_that_knows_partners(cache):
    with pytest.raises(ValueError, match=r"decant align .* --targets matched"):
        check_targets(cache, loss=Loss(divergence="gold"))


def test_an_explicit_tail_stays_and_a_weak_one_is_told():
    assert choose_tail(Loss(tail="bucket"), ALL) == (Loss(tail="bucket"), None)
    loss = Loss(tail="renormalize", temperature=4.0)
    assert "learns little from it" in choose_tail(loss, ALL)[1]
    assert "--signals.logits.sketch.rank 256" in choose_tail(loss, OLD)[1]
    assert choose_tail(Loss(tail="sampled", temperature=2.0), OLD)[1] is None


def test_counts_serve_no_other_temperature():
    for settings in ({"temperature": 2.0}, {"temperature_end": 2.0}):
        with pytest.raises(ValueError, match=r"up to 2 with tail = counts: .* T = 1 .* sketch"):
            Loss(tail="counts", **settings)
    with pytest.raises(ValueError, match="jsd with tail = counts"):
        Loss(tail="counts", divergence="jsd")
    with pytest.raises(ValueError, match=r"are counts, which serve forward_kl at T = 1 only"):
        choose_tail(Loss(temperature=2.0), Held(k=0, counts=True))


def test_a_tail_that_the_cache_lacks_says_what_it_holds_and_what_to_add(cache):
    for tail, flag in (("counts", "counts 100"), ("sketch", "sketch.rank 256")):
        with pytest.raises(ValueError, match=rf"holds the top 8 .* --signals.logits.{flag}"):
            check_targets(cache, loss=Loss(tail=tail))


def test_what_a_cache_with_counts_and_sketches_holds(cache, tmp_path):
    richer = with_companions(Path(shutil.copytree(cache.path, tmp_path / "cache")))
    held = held_by([richer])
    assert (held.counts, held.sketch, held.prior, held.k) == (True, True, True, 8)
    assert held_by([cache, richer]).counts is False
