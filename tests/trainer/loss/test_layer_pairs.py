"""The pairs of layers that terms compare, and the errors for pairs that do not fit."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from decant.models import ModelConfig
from decant.schemas import Cache
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.trainer.config import AttentionLoss, HiddenLoss, Loss
from decant.trainer.loss.layer_pairs import (
    AttentionPair,
    HiddenPair,
    layer_pairs,
    nearest_blocks,
    number_layers,
)

TEACHER = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
STUDENT = dataclasses.replace(TEACHER, num_layers=3)


class FakeCache(Cache):
    def __init__(self, *signals):
        self.path = Path("fake")
        names = {AttentionSignal: "attention", HiddenSignal: "hidden"}
        held = {f"{names[type(signal)]}/{signal.layer}": signal for signal in signals}
        self.manifest = SimpleNamespace(signals={"logits": None, **held})


def states(layer, *, width=32, directions=None):
    return HiddenSignal("id", "t", layer, "bfloat16", width, 32, 4, directions)


def maps(layer, heads=(0, 1, 2, 3)):
    return AttentionSignal("id", "t", layer, "uint8-log", heads, 4, 4)


WHOLE = FakeCache(states(0), states(3), states(6), maps(0), maps(3), maps(5))


def pairs_of(*terms, cache=WHOLE, student=STUDENT, cut_from=None):
    """The pairs of a loss with these terms."""
    loss = Loss(
        hidden=tuple(term for term in terms if isinstance(term, HiddenLoss)),
        attention=tuple(term for term in terms if isinstance(term, AttentionLoss)),
    )
    loss = number_layers(loss, cache=cache, teacher=TEACHER, student=student, cut_from=cut_from)
    return layer_pairs(loss, cache=cache, student=student)


def layers(pairs):
    return [(pair.student, pair.signal) for pair in pairs]


def test_by_default_the_last_states_are_compared():
    ((pair,),) = pairs_of(HiddenLoss()).hidden
    assert pair == HiddenPair(3, "hidden/6", 32)


def test_negative_layers_count_from_the_end():
    """There is one hidden layer more than blocks: the embedding's output."""
    term = HiddenLoss(student_layers=(-4, -3, 2), teacher_layers=(-7, -4, -1))
    (pairs,) = pairs_of(term).hidden
    assert layers(pairs) == [(0, "hidden/0"), (1, "hidden/3"), (2, "hidden/6")]
    term = AttentionLoss(student_layers=(-3, -1), teacher_layers=(-3, -1))
    (pairs,) = pairs_of(term).attention
    assert layers(pairs) == [(0, "attention/3"), (2, "attention/5")]


def test_by_default_every_stored_map_is_compared_with_the_block_that_was_cut_from_it():
    (pairs,) = pairs_of(AttentionLoss(), cut_from=(0, 3, 5)).attention
    assert layers(pairs) == [(0, "attention/0"), (1, "attention/3"), (2, "attention/5")]


def test_a_stored_block_that_was_not_cut_is_paired_with_the_nearest_in_depth():
    assert nearest_blocks([0, 2, 5], ours=3, theirs=6, cut_from=(0, 1, 4)) == [
        (0, 0),
        (1, 2),
        (2, 5),
    ]
    assert nearest_blocks([3], ours=2, theirs=6, cut_from=(2, 4)) == [(0, 3)]  # of two, the earlier
    # Not cut: the student's blocks 0, 1, 2 count as the teacher's 0, 2.5, 5.
    assert nearest_blocks([0, 1, 2, 3, 4, 5], ours=3, theirs=6) == [
        (0, 0),
        (0, 1),
        (1, 2),
        (1, 3),
        (2, 4),
        (2, 5),
    ]
    assert nearest_blocks([0, 2, 5], ours=6, theirs=6) == [(0, 0), (2, 2), (5, 5)]
    assert nearest_blocks([0, 3], ours=1, theirs=6) == [(0, 0), (0, 3)]


def test_signals_and_layers_are_those_of_the_pairs_without_repeats():
    pairs = pairs_of(
        HiddenLoss(),
        HiddenLoss(kind="cosine", student_layers=(1, 3), teacher_layers=(3, 6)),
        AttentionLoss(student_layers=(2,), teacher_layers=(3,)),
    )
    assert pairs.signals == ("hidden/6", "hidden/3", "attention/3")
    assert pairs.hidden_layers == (1, 2, 3)  # block 2 needs hidden layer 2, its input
    assert pairs_of().signals == pairs_of().hidden_layers == ()


def test_a_projection_has_a_name_for_each_pair_and_takes_states_of_any_width():
    narrow = dataclasses.replace(STUDENT, hidden_size=16)
    term = HiddenLoss(student_layers=(1, 3), teacher_layers=(3, 6), projection=True)
    first, second = pairs_of(term, HiddenLoss(projection=True), student=narrow).hidden
    names = [pair.projection for pair in (*first, *second)]
    assert len(set(names)) == 3
    assert all(names)


def test_states_along_directions_are_compared_there_by_a_student_of_the_teacher_s_width():
    cache = FakeCache(states(6, width=8, directions="directions-6.npy"))
    ((pair,),) = pairs_of(HiddenLoss(), cache=cache).hidden
    assert pair == HiddenPair(3, "hidden/6", 8, directions=True)
    narrow = dataclasses.replace(STUDENT, hidden_size=8)
    ((pair,),) = pairs_of(HiddenLoss(projection=True), cache=cache, student=narrow).hidden
    assert (pair.directions, bool(pair.projection)) == (False, True)
    # Eight numbers of another meaning: equal widths do not make them comparable.
    with pytest.raises(ValueError, match=r"width 8, but fake holds hidden/6 with 8 numbers .* 32"):
        pairs_of(HiddenLoss(), cache=cache, student=narrow)


def test_single_heads_are_compared_if_both_models_have_as_many():
    cache = FakeCache(maps(0, heads=(1, 3)), maps(3, heads="mean"))
    term = AttentionLoss(student_layers=(0,), teacher_layers=(0,))
    assert pairs_of(term, cache=cache).attention == ((AttentionPair(0, "attention/0", (1, 3)),),)
    two = dataclasses.replace(STUDENT, num_heads=2)
    assert pairs_of(term, cache=cache, student=two).attention[0][0].heads is None
    every = AttentionLoss(average_heads=True)
    assert pairs_of(every, cache=cache, student=two).attention[0][1].heads is None


def test_other_widths_and_heads_are_refused_with_the_remedy():
    narrow = dataclasses.replace(STUDENT, hidden_size=16, num_heads=2)
    message = r"loss.hidden\[0\]: .* width 16, but fake holds hidden/6 with 32 .* projection = true"
    with pytest.raises(ValueError, match=message):
        pairs_of(HiddenLoss(), student=narrow)
    message = r"attention\[1\]: .* 2 heads, but fake holds attention/0 as 4 heads .* average_heads"
    with pytest.raises(ValueError, match=message):
        pairs_of(AttentionLoss(average_heads=True), AttentionLoss(), student=narrow)
    with pytest.raises(ValueError, match=r"the student has 4 heads, but .* as the mean over"):
        pairs_of(AttentionLoss(), cache=FakeCache(maps(0, heads="mean")))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            HiddenLoss(student_layers=(4,), teacher_layers=(6,)),
            r"hidden\[0\].student_layers: layer 4 .* the student has layers 0 to 3, .* −1 to −4",
        ),
        (
            HiddenLoss(student_layers=(0,), teacher_layers=(-8,)),
            r"hidden\[0\].teacher_layers: layer -8 .* the teacher has layers 0 to 6, .* −1 to −7",
        ),
        (
            AttentionLoss(student_layers=(-4,), teacher_layers=(0,)),
            r"attention\[0\].student_layers: layer -4 .* the student has layers 0 to 2,",
        ),
        (
            AttentionLoss(student_layers=(0,), teacher_layers=(6,)),
            r"attention\[0\].teacher_layers: layer 6 .* the teacher has layers 0 to 5,",
        ),
        (
            HiddenLoss(student_layers=(0,), teacher_layers=(2,)),
            r"no hidden/2 in this cache, which holds logits, hidden/0, hidden/3, hidden/6, attent",
        ),
        (
            AttentionLoss(student_layers=(0,), teacher_layers=(1,)),
            r"no attention/1 in this cache, which holds logits, hidden/0,",
        ),
    ],
)
def test_a_layer_that_does_not_exist_or_is_not_stored_is_refused(term, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(term)


def test_a_cache_without_maps_is_refused_for_a_default_attention_term():
    with pytest.raises(ValueError, match=r"no attention maps in this cache, which holds logits, h"):
        pairs_of(AttentionLoss(), cache=FakeCache(states(6)))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"student_layers": (1, 2)}, r"loss.hidden\[0\]: student_layers \[1, 2\] and .* \[\] have"),
        ({"student_layers": (1,), "teacher_layers": (1, 2)}, r"different lengths, 1 and 2"),
        ({"weight_schedule": "cosine"}, r"loss.hidden\[0\].weight_schedule is cosine, but"),
    ],
)
def test_contradictory_settings_of_a_term_are_refused(term, message):
    with pytest.raises(ValueError, match=message):
        Loss(hidden=(HiddenLoss(**term),))
