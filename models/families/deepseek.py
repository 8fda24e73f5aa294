"""DeepSeek V2 and V3, and what is built like V3: Moonlight, Kimi K2, GLM-4.7-Flash, Youtu-LLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families.deepseek_gguf import DEEPSEEK_GGUF, OLDER_MAPS, with_maps_apart
from decant.models.families.family import Family
from decant.models.families.field_reader import FieldReader
from decant.models.families.latent_attention import (
    latent_tensors,
    read_latent_attention,
    write_latent_attention,
)
from decant.models.families.routed_experts import (
    GUESSING_LAYERS,
    read_experts,
    routed_tensors,
    write_experts,
)
from decant.models.families.tensor_name import Naming, TensorName

_GREEDY, _IN_GROUPS = "greedy", "group_limited_greedy"


def read_v2(fields: Mapping[str, Any]) -> ModelConfig:
    """Read DeepSeek V2's config.json."""
    reader, attention = read_latent_attention(fields, eps=1e-6)
    reader.require("mlp_bias", False)
    reader.require("norm_topk_prob", False)
    reader.require("scoring_func", "softmax")
    reader.require("topk_method", _GREEDY, _IN_GROUPS)
    routed = read_experts(reader, attention, dense=0)
    if reader.take("topk_method", _GREEDY) == _GREEDY:
        routed |= {"expert_groups": 1, "groups_per_token": 1}
    config = ModelConfig(**routed, group_votes=1, rotary_neighbours=True, family="deepseek_v2")
    reader.finish()
    return config


def write_v2(config: ModelConfig) -> dict[str, Any]:
    """Write DeepSeek V2's config.json."""
    fields = write_latent_attention(
        config, model_type="deepseek_v2", architecture="DeepseekV2ForCausalLM"
    )
    method = _IN_GROUPS if config.expert_groups > 1 else _GREEDY
    router = {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": method}
    return fields | write_experts(config) | router


def read_v3(fields: Mapping[str, Any]) -> ModelConfig:
    """Read DeepSeek V3's config.json."""
    reader, attention = read_latent_attention(fields, eps=1e-6)
    reader.require("scoring_func", "sigmoid")
    reader.require("topk_method", "noaux_tc")
    return _routed_by_sigmoid(reader, attention, dense=3, family="deepseek_v3")


def write_v3(config: ModelConfig) -> dict[str, Any]:
    """Write DeepSeek V3's config.json."""
    fields = write_latent_attention(
        config, model_type="deepseek_v3", architecture="DeepseekV3ForCausalLM"
    )
    method = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    return fields | method | _write_sigmoid(config)


def read_flash(fields: Mapping[str, Any]) -> ModelConfig:
    """Read GLM-4.7-Flash's config.json."""
    reader, attention = read_latent_attention(fields, eps=1e-5)
    reader.require("topk_method", "noaux_tc")
    count = attention["num_layers"]
    kinds = reader.take("mlp_layer_types", None)
    dense = 1 if kinds is None else [*kinds, "sparse"].index("sparse")
    usual = ["dense"] * dense + ["sparse"] * (count - dense)
    if kinds not in (None, usual) or reader.take("first_k_dense_replace", dense) != dense:
        raise reader.error("mlp_layer_types", kinds, "expected dense blocks before sparse ones")
    return _routed_by_sigmoid(reader, attention, dense=dense, family="glm4_moe_lite")


def write_flash(config: ModelConfig) -> dict[str, Any]:
    """Write GLM-4.7-Flash's config.json."""
    fields = write_latent_attention(
        config, model_type="glm4_moe_lite", architecture="Glm4MoeLiteForCausalLM"
    )
    sparse = config.num_layers - config.dense_layers
    kinds = ["dense"] * config.dense_layers + ["sparse"] * sparse
    return fields | {"mlp_layer_types": kinds} | _write_sigmoid(config)


def _routed_by_sigmoid(
    reader: FieldReader, attention: dict[str, Any], *, dense: int, family: str
) -> ModelConfig:
    config = ModelConfig(
        **read_experts(reader, attention, dense=dense),
        router="sigmoid",
        router_correction=True,
        normalise_experts=reader.flag("norm_topk_prob", True),
        rotary_neighbours=reader.flag("rope_interleave", True),
        family=family,
    )
    reader.finish()
    return config


def _write_sigmoid(config: ModelConfig) -> dict[str, Any]:
    router = {"norm_topk_prob": config.normalise_experts}
    return write_experts(config) | router | {"rope_interleave": config.rotary_neighbours}


def read_youtu(fields: Mapping[str, Any]) -> ModelConfig:
    """Read Youtu-LLM's config.json: DeepSeek V3's attention, no experts."""
    reader, attention = read_latent_attention(fields, eps=1e-6, tied=True)
    reader.require("mlp_bias", False)
    neighbours = reader.flag("rope_interleave", True)
    reader.ignore("embedding_initializer_range")
    config = ModelConfig(**attention, rotary_neighbours=neighbours, family="youtu")
    reader.finish()
    return config


def write_youtu(config: ModelConfig) -> dict[str, Any]:
    """Write Youtu-LLM's config.json."""
    fields = write_latent_attention(config, model_type="youtu", architecture="YoutuForCausalLM")
    return fields | {"rope_interleave": config.rotary_neighbours}


_tensors = partial(routed_tensors, others=latent_tensors)


def tensors_in(
    config: ModelConfig, naming: Naming, present: Collection[str]
) -> dict[str, TensorName]:
    """The tensors in these files, which may hold keys and values apart."""
    names = _tensors(config) if config.num_experts else latent_tensors(config)
    return with_maps_apart(names, present)


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    config_from_json=read_v2,
    config_to_json=write_v2,
    tensors=_tensors,
    tensors_in=tensors_in,
    gguf=DEEPSEEK_GGUF,
    redundant=(*Family.redundant, OLDER_MAPS),
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),
    config_from_json=read_v3,
    config_to_json=write_v3,
    tensors=_tensors,
    tensors_in=tensors_in,
    gguf=DEEPSEEK_GGUF,
    redundant=(*GUESSING_LAYERS, OLDER_MAPS),
)
GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    model_types=("glm4_moe_lite",),
    config_from_json=read_flash,
    config_to_json=write_flash,
    tensors=_tensors,
    redundant=GUESSING_LAYERS,
)
YOUTU = Family(
    name="youtu",
    model_types=("youtu",),
    config_from_json=read_youtu,
    config_to_json=write_youtu,
    tensors=latent_tensors,
    tensors_in=tensors_in,
    gguf=DEEPSEEK_GGUF,
    redundant=(*Family.redundant, OLDER_MAPS),
)
