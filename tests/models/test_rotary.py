"""Rotary positions: scaled frequencies as transformers computes them, and the rotation itself."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models import ModelConfig
from decant.models.families.field_reader import FieldReader
from decant.models.families.json_fields import read_rotary
from decant.models.families.rotary_fields import read_scaling, write_scaling
from decant.models.rotary import LongRopeScaling, YarnScaling, cos_and_sin, frequencies, rotate
from tests.paths import GOLDEN

CASES = json.loads((GOLDEN / "rotary" / "frequencies.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_a_scaling_gives_transformers_frequencies_at_every_row_length(case):
    read = read_rotary(FieldReader("config.json", case["fields"]), head_dim=32)
    scaling, turned = read["rope_scaling"], read["rotary_dim"]
    ours = frequencies(
        head_dim=turned, theta=read["rope_theta"], scaling=scaling, length=case["length"]
    )
    # A float32 power of PyTorch's may differ from the rounded one in the last place or two.
    np.testing.assert_allclose(ours, case["frequencies"], rtol=5e-7)
    assert ours.dtype == np.float32
    factor = getattr(scaling, "attention_factor", 1.0)
    assert factor == pytest.approx(case["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case["case"])
def test_a_scaling_is_written_as_it_is_read(case):
    read = read_rotary(FieldReader("config.json", case["fields"]), head_dim=32)
    longest = case["fields"]["max_position_embeddings"]
    again = FieldReader("config.json", write_scaling(read["rope_scaling"]) or {})
    assert read_scaling(again, max_positions=longest) == read["rope_scaling"]


def test_a_rotation_turns_the_first_coordinates_by_the_angle_and_scales_them():
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    positions, table = np.array([[0, 1, 7]]), np.array([1.0, 0.25, 0.01], np.float32)
    turned = rotate(jnp.asarray(x), cos_and_sin(jnp.asarray(positions), table, factor=1.5))
    for time, position in enumerate(positions[0]):
        for pair, frequency in enumerate(table):
            # As a complex number times 1.5 · exp(i · angle).
            number = x[0, time, :, pair] + 1j * x[0, time, :, pair + 3]
            number = number.astype(np.complex128) * 1.5 * np.exp(1j * position * frequency)
            np.testing.assert_allclose(turned[0, time, :, pair], number.real, rtol=0, atol=2e-6)
            np.testing.assert_allclose(turned[0, time, :, pair + 3], number.imag, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])


SHAPE: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 5}, "5 are turned"),
        ({"rotary_dim": 18}, "18 are turned"),
        ({"rotary_dim": 0}, "0 are turned"),
        (
            {"rotary_dim": 8, "rope_scaling": LongRopeScaling((1.0,) * 8, (2.0,) * 8, 64)},
            r"\[8\] LongRoPE factors; expected 4",
        ),
        ({"rope_theta": 1.0, "rope_scaling": YarnScaling(4.0, 64)}, "rope_theta is 1.0; YaRN"),
    ],
)
def test_a_rotation_that_does_not_fit_the_heads_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SHAPE, **fields)


def test_turning_the_whole_head_is_the_default():
    assert ModelConfig(**SHAPE, rotary_dim=16) == ModelConfig(**SHAPE)
    assert ModelConfig(**SHAPE, rotary_dim=8).turned == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "yarn", "factor": "4"}, "factor = '4'; expected a number"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate = 1; expected true"),
        ({"rope_type": "yarn", "factor": 4.0, "alpha": 2.0}, "alpha = 2.0"),
        ({"rope_type": "longrope", "long_factor": [2.0]}, "'short_factor' is missing"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": 2.0}, "long_factor = 2.0"),
        (
            {"rope_type": "longrope", "short_factor": [1.0, None], "long_factor": [1.0, 2.0]},
            "short_factor: field '1' is missing",
        ),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0],
                "long_factor": [1.0],
                "original_max_position_embeddings": 1,
            },
            "expected at least 2",
        ),
        ({"rope_type": "xpos"}, "rope_type = 'xpos' is not supported"),
    ],
)
def test_a_scaling_that_we_cannot_read_is_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        read_scaling(FieldReader("config.json: rope_scaling", fields), max_positions=128)
