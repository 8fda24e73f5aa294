"""The config.json published with a model of each family, read and written back."""

import pytest

from decant.models.families import config_from_json, config_to_json
from decant.models.rotary import LongRopeScaling
from tests.models.families.whole_configs import COMMON, PHI_4_MINI, WHOLE


@pytest.mark.parametrize(
    ("fields", "expected"), WHOLE, ids=[fields["model_type"] for fields, _ in WHOLE]
)
def test_a_published_config_is_read_and_written_back(fields, expected):
    config = config_from_json(COMMON | fields)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config_from_json(config_to_json(config)) == config


def test_phi_4_minis_scaling_goes_by_the_length_that_stands_beside_it():
    scaling = config_from_json(PHI_4_MINI).rope_scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.original_max_positions == 4096
    # √(1 + ln 32 / ln 4096)
    assert scaling.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)
