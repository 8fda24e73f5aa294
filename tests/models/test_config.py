"""Model configs: which values fit together, and what their identity covers."""

import dataclasses

import pytest

from decant.models import open_checkpoint
from tests.models.decoder.test_decoder import TINY
from tests.paths import GOLDEN


def test_a_config_whose_values_do_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        dataclasses.replace(TINY, num_kv_heads=3)
    with pytest.raises(ValueError, match="must be even"):
        dataclasses.replace(TINY, head_dim=5)
    with pytest.raises(ValueError, match="num_layers is 0"):
        dataclasses.replace(TINY, num_layers=0)
    with pytest.raises(ValueError, match=r"windows is \(4, 0\)"):
        dataclasses.replace(TINY, windows=(4, 0))
    with pytest.raises(ValueError, match=r"experts_per_token is 3; expected 1 to num_experts = 2"):
        dataclasses.replace(TINY, num_experts=2, experts_per_token=3)


def test_a_later_field_enters_the_identity_only_if_it_differs_from_its_default():
    plain = open_checkpoint(GOLDEN / "families" / "llama").config
    # The fields that teacher_id was made from before others were added.
    assert plain.identity() == {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rope_theta": 500.0,
        "norm_eps": 1e-5,
        "max_positions": 128,
        "tie_embeddings": False,
        "qkv_bias": False,
        "family": "llama",
    }
    assert dataclasses.replace(plain, windows=(6,)).identity() == plain.identity() | {
        "windows": (6,)
    }
