"""Values that change over a run, against values worked by hand."""

import jax
import numpy as np
import pytest

from decant.trainer.config import Loss
from decant.trainer.loss.schedules import Schedule


def values(schedule, steps=5):
    at = jax.jit(lambda step: schedule.at(step, steps=steps))
    return [float(at(step)) for step in range(steps)]


def test_a_constant_stays():
    assert values(Schedule(0.9)) == [np.float32(0.9)] * 5


def test_linear_goes_from_the_first_update_to_the_last():
    assert values(Schedule(4.0, 2.0)) == [4.0, 3.5, 3.0, 2.5, 2.0]


def test_cosine_is_slow_at_both_ends():
    halfway = (1 - np.cos(np.pi / 4)) / 2
    expected = [0.0, halfway, 0.5, 1 - halfway, 1.0]
    np.testing.assert_allclose(values(Schedule(0.0, 1.0, "cosine")), expected, atol=1e-6)


def test_a_run_of_one_update_has_the_first_value_and_later_steps_the_last():
    assert values(Schedule(4.0, 2.0), steps=1) == [4.0]
    assert float(Schedule(4.0, 2.0).at(9, steps=5)) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_schedule": "cosine"}, r"loss.alpha_schedule is cosine, but loss.alpha_end is not"),
        ({"tail": "sampled", "divergence": "jsd"}, r"jsd with tail = sampled: draws are right on"),
        (
            {"tail": "renormalize", "divergence": "tv"},
            r"tv with tail = renormalize: it gives the teacher",
        ),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Loss(**settings)
