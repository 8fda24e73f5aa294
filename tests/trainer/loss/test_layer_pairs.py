"""Which layers are compared, and the answer when they cannot be."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from decant.models import ModelConfig
from decant.schemas import Cache
from decant.schemas.signals import AttentionSignal, HiddenSignal
from decant.trainer.config import AttentionLoss, HiddenLoss, Loss
from decant.trainer.loss.layer_pairs import AttentionPair, HiddenPair, nearest, pairs, with_layers

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


def settled(*terms, cache=WHOLE, student=STUDENT, cut_from=None):
    """The pairs of one loss with these terms."""
    loss = Loss(
        hidden=tuple(term for term in terms if isinstance(term, HiddenLoss)),
        attention=tuple(term for term in terms if isinstance(term, AttentionLoss)),
    )
    loss = with_layers(loss, cache=cache, teacher=TEACHER, student=student, cut_from=cut_from)
    return pairs(loss, cache=cache, student=student)


def layers(found):
    return [(pair.student, pair.signal) for pair in found]


def test_by_default_the_last_states_are_compared():
    ((pair,),) = settled(HiddenLoss()).hidden
    assert pair == HiddenPair(3, "hidden/6", 32)


def test_layers_count_from_the_end_where_negative():
    """Hidden layers are one more than blocks: the embedding's output is the first."""
    term = HiddenLoss(student_layers=(-4, -3, 2), teacher_layers=(-7, -4, -1))
    (found,) = settled(term).hidden
    assert layers(found) == [(0, "hidden/0"), (1, "hidden/3"), (2, "hidden/6")]
    term = AttentionLoss(student_layers=(-3, -1), teacher_layers=(-3, -1))
    (found,) = settled(term).attention
    assert layers(found) == [(0, "attention/3"), (2, "attention/5")]


def test_by_default_every_stored_map_is_compared_with_the_block_that_was_cut_from_it():
    (found,) = settled(AttentionLoss(), cut_from=(0, 3, 5)).attention
    assert layers(found) == [(0, "attention/0"), (1, "attention/3"), (2, "attention/5")]


def test_without_such_a_block_the_nearest_in_depth_learns_it():
    assert nearest([0, 2, 5], ours=3, theirs=6, cut_from=(0, 1, 4)) == [(0, 0), (1, 2), (2, 5)]
    assert nearest([3], ours=2, theirs=6, cut_from=(2, 4)) == [(0, 3)]  # of two, the earlier
    # Not cut: the student's 0, 1, 2 lie at 0, 2.5, 5 of the teacher's.
    assert nearest([0, 1, 2, 3, 4, 5], ours=3, theirs=6) == [
        (0, 0),
        (0, 1),
        (1, 2),
        (1, 3),
        (2, 4),
        (2, 5),
    ]
    assert nearest([0, 2, 5], ours=6, theirs=6) == [(0, 0), (2, 2), (5, 5)]
    assert nearest([0, 3], ours=1, theirs=6) == [(0, 0), (0, 3)]


def test_only_what_is_compared_is_read_and_each_once():
    found = settled(
        HiddenLoss(),
        HiddenLoss(kind="cosine", student_layers=(1, 3), teacher_layers=(3, 6)),
        AttentionLoss(student_layers=(2,), teacher_layers=(3,)),
    )
    assert found.signals == ("hidden/6", "hidden/3", "attention/3")
    assert found.hidden_layers == (1, 2, 3)  # block 2 reads what layer 2 is
    assert settled().signals == settled().hidden_layers == ()


def test_a_projection_has_a_name_for_each_pair_and_takes_states_of_any_width():
    narrow = dataclasses.replace(STUDENT, hidden_size=16)
    term = HiddenLoss(student_layers=(1, 3), teacher_layers=(3, 6), projection=True)
    first, second = settled(term, HiddenLoss(projection=True), student=narrow).hidden
    names = [pair.projection for pair in (*first, *second)]
    assert len(set(names)) == 3
    assert all(names)


def test_states_along_directions_are_compared_there_by_a_student_of_the_teacher_s_width():
    cache = FakeCache(states(6, width=8, directions="directions-6.npy"))
    ((pair,),) = settled(HiddenLoss(), cache=cache).hidden
    assert pair == HiddenPair(3, "hidden/6", 8, directions=True)
    narrow = dataclasses.replace(STUDENT, hidden_size=8)
    ((pair,),) = settled(HiddenLoss(projection=True), cache=cache, student=narrow).hidden
    assert (pair.directions, bool(pair.projection)) == (False, True)
    # Eight numbers of another meaning: equal widths are no excuse.
    with pytest.raises(ValueError, match=r"width 8, but fake holds hidden/6 with 8 numbers .* 32"):
        settled(HiddenLoss(), cache=cache, student=narrow)


def test_the_student_s_own_heads_are_compared_where_the_teacher_has_as_many():
    cache = FakeCache(maps(0, heads=(1, 3)), maps(3, heads="mean"))
    term = AttentionLoss(student_layers=(0,), teacher_layers=(0,))
    assert settled(term, cache=cache).attention == ((AttentionPair(0, "attention/0", (1, 3)),),)
    two = dataclasses.replace(STUDENT, num_heads=2)
    assert settled(term, cache=cache, student=two).attention[0][0].heads is None
    every = AttentionLoss(average_heads=True)
    assert settled(every, cache=cache, student=two).attention[0][1].heads is None


def test_the_student_s_widths_and_heads_must_fit_and_the_remedy_is_named():
    narrow = dataclasses.replace(STUDENT, hidden_size=16, num_heads=2)
    message = r"loss.hidden\[0\]: .* width 16, but fake holds hidden/6 with 32 .* projection = true"
    with pytest.raises(ValueError, match=message):
        settled(HiddenLoss(), student=narrow)
    message = r"attention\[1\]: .* 2 heads, but fake holds attention/0 as 4 heads .* average_heads"
    with pytest.raises(ValueError, match=message):
        settled(AttentionLoss(average_heads=True), AttentionLoss(), student=narrow)
    with pytest.raises(ValueError, match=r"the student has 4 heads, but .* as the mean over"):
        settled(AttentionLoss(), cache=FakeCache(maps(0, heads="mean")))


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
        settled(term)


def test_a_cache_without_maps_has_none_to_learn_by_default():
    with pytest.raises(ValueError, match=r"no attention maps in this cache, which holds logits, h"):
        settled(AttentionLoss(), cache=FakeCache(states(6)))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"student_layers": (1, 2)}, r"loss.hidden\[0\]: student_layers \[1, 2\] and .* \[\] are"),
        ({"student_layers": (1,), "teacher_layers": (1, 2)}, r"different lengths, 1 and 2"),
        ({"weight": -1.0}, r"loss.hidden\[0\].weight is -1.0"),
        ({"weight_end": float("inf")}, r"loss.hidden\[0\].weight_end is inf"),
        ({"weight_schedule": "cosine"}, r"loss.hidden\[0\].weight_schedule is cosine, but"),
    ],
)
def test_what_no_term_could_mean_is_refused(term, message):
    with pytest.raises(ValueError, match=message):
        Loss(hidden=(HiddenLoss(**term),))
