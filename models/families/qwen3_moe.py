"""Qwen 3 with a mixture of experts in every block."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from decant.models.config import ModelConfig
from decant.models.families import llama, qwen3
from decant.models.families.family import FieldReader, TensorName


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Qwen 3 MoE's config.json. Blocks without experts cannot be stacked with the others."""
    reader = FieldReader("config.json", fields)
    reader.require("hidden_act", "silu")
    reader.require("attention_bias", False)
    reader.require("decoder_sparse_step", 1)
    reader.require("mlp_only_layers", [])
    # What training adds to the loss, and what is returned beside the logits.
    reader.ignore("router_aux_loss_coef", "output_router_logits", "max_window_layers")
    sizes = llama.shared_fields(reader)
    sizes["intermediate_size"] = reader.take("moe_intermediate_size")
    window = reader.take("sliding_window", 4096)
    config = ModelConfig(
        **sizes,
        **llama.rope_fields(reader),
        windows=(window if reader.take("use_sliding_window", False) else None,),
        qk_norm=True,
        num_experts=reader.take("num_experts", reader.take("num_local_experts", 128)),
        experts_per_token=reader.take("num_experts_per_tok", 8),
        normalise_experts=reader.take("norm_topk_prob", False),
        family="qwen3_moe",
    )
    reader.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen 3 MoE model."""
    fields = llama.hf_fields(config, model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM")
    window = config.windows[0]
    return fields | {
        "attention_bias": False,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalise_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
    """Qwen 3 MoE's GGUF metadata."""
    reader = llama.gguf_reader(metadata)
    sizes = llama.gguf_fields(reader, metadata, tensors)
    sizes["intermediate_size"] = reader.take("expert_feed_forward_length")
    config = ModelConfig(
        **sizes,
        qk_norm=True,
        num_experts=reader.take("expert_count"),
        experts_per_token=reader.take("expert_used_count"),
        # Not in the metadata: llama.cpp divides by the sum for this architecture, always.
        normalise_experts=True,
        family="qwen3_moe",
    )
    reader.finish()
    return config


def tensors(config: ModelConfig) -> dict[str, TensorName]:
    """Qwen 3's parameters, with a router and the experts' MLPs in place of the one."""
    names = qwen3.tensors(config)
    names["blocks.router"] = TensorName(
        "model.layers.{layer}.mlp.gate.weight", "blk.{layer}.ffn_gate_inp.weight", in_axes=1
    )
    for name in ("gate", "up", "down"):
        names[f"blocks.{name}"] = TensorName(
            f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}_proj.weight",
            f"blk.{{layer}}.ffn_{name}_exps.weight",
            in_axes=1,
            experts=True,
        )
    return names


QWEN3_MOE = dataclasses.replace(
    qwen3.QWEN3,
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    gguf_architectures=("qwen3moe",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    config_from_gguf=config_from_gguf,
    tensors=tensors,
)
