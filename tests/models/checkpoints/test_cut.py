"""Students cut out of a teacher's blocks."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models.checkpoints.cut import cut_layers, evenly_spaced, spread_layers
from decant.models.config import ModelConfig
from decant.models.parameters import parameters_by_path
from tests.models.decoder.test_decoder import TINY, build, rows, run


def test_a_student_cut_from_layers_has_those_blocks_and_the_rest_unchanged():
    teacher = build()
    student = cut_layers(teacher, (2, 0))
    assert student.config == dataclasses.replace(TINY, num_layers=2)
    _, ours = run(student, *rows(), hidden_layers=(0,))
    _, theirs = run(teacher, *rows(), hidden_layers=(0,))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(
        student.blocks.down[...], teacher.blocks.down[...][jnp.array([2, 0])]
    )
    np.testing.assert_array_equal(student.unembedding(), teacher.unembedding())


def test_training_a_cut_student_leaves_its_teacher_alone():
    teacher = build()
    student = cut_layers(teacher, (0, 1, 2))
    for parameter in parameters_by_path(student).values():
        parameter[...].delete()  # as a training step does that donates its state
    assert all(np.isfinite(p[...]).all() for p in parameters_by_path(teacher).values())


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (1, 4, (0,)),
        (2, 30, (0, 29)),
        (3, 5, (0, 2, 4)),
        (4, 10, (0, 3, 6, 9)),
        (5, 5, (*range(5),)),
    ],
)
def test_evenly_spaced_layers_include_first_and_last(count, total, expected):
    assert evenly_spaced(count, total) == expected


def test_layers_that_do_not_exist_cannot_be_cut():
    with pytest.raises(ValueError, match=r"\[3\] do not exist.*blocks 0 to 2"):
        cut_layers(build(), (0, 3))
    with pytest.raises(ValueError, match="cannot take 6 layers out of 5"):
        evenly_spaced(6, 5)


def test_whole_periods_of_a_model_with_linear_attention_are_spread():
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), 8)
    linear = ("linear_key_heads", "linear_value_heads", "linear_key_dim", "linear_value_dim")
    model = ModelConfig(
        **sizes,
        num_layers=32,
        num_heads=1,
        num_kv_heads=1,
        **dict.fromkeys(linear, 2),
        convolution=4,
        linear_layers=(True, True, True, False),
    )
    assert spread_layers(8, model) == (*range(4), *range(28, 32))
    assert spread_layers(6, model) == (2, 3, *range(28, 32))
    assert spread_layers(12, model) == (*range(4), *range(16, 20), *range(28, 32))
    assert spread_layers(1, model) == (3,)
    # Blocks that follow no period are spread one by one.
    assert spread_layers(2, model.with_layers((0, 3, 4, 5, 6, 8))) == (0, 5)
    with pytest.raises(ValueError, match="cannot take 33 layers out of 32"):
        spread_layers(33, model)
