"""The configs of the most used models mean what they should, or are refused with a remedy.

Parameters are held to what each model's page states; the table is published.py.
"""

import math

import jax.numpy as jnp
import pytest
from flax import nnx

from decant.models import ModelConfig
from decant.models.decoder.decoder import Decoder
from decant.models.families import config_from_json, config_to_json
from decant.models.parameters import parameters_by_path
from tests.models.families.published import REFUSED, TABLE, TOWERS, fields_of

FAMILY = {"gemma3_text": "gemma3"}


def billions(config):
    """Parameters of a decoder of this config."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    shapes = (p.get_value().shape for p in parameters_by_path(model).values())
    return sum(map(math.prod, shapes)) / 1e9


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_published_config_means_what_it_should(row):
    fields, sizes = fields_of(row), row.sizes
    config = config_from_json(fields)
    assert config == ModelConfig(
        **{
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.mlp,
            "num_layers": sizes.layers,
            "num_heads": sizes.heads,
            "num_kv_heads": sizes.kv_heads,
            "head_dim": fields.get("head_dim", sizes.width // sizes.heads),
            "max_positions": sizes.positions,
            "rope_theta": float(fields.get("rope_theta", 10_000.0)),
            "norm_eps": fields.get("rms_norm_eps", config.norm_eps),
            "tie_embeddings": fields["tie_word_embeddings"],
            "family": FAMILY.get(row.kind, row.kind),
        }
        | row.expected
    )
    assert billions(config) == pytest.approx(row.billions, rel=6e-4)
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(
    ("kind", "text", "expected", "stated"), [t[1:] for t in TOWERS], ids=[t[0] for t in TOWERS]
)
def test_a_published_config_of_a_model_of_images_and_text_means_its_text_model(
    kind, text, expected, stated
):
    config = config_from_json({"model_type": kind, "text_config": text, "vision_config": {}})
    assert {name: getattr(config, name) for name in expected} == expected
    assert billions(config) == pytest.approx(stated, rel=5e-3)
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_a_model_that_cannot_be_run_is_refused_with_a_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(fields)


def test_the_table_holds_the_models_that_people_name():
    names = [*(row.name for row in TABLE), *(t[0] for t in TOWERS), *(r[0] for r in REFUSED)]
    assert len({*names}) == len(names) >= 60
