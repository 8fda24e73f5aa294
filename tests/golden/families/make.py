"""Makes each model family's golden files with Hugging Face transformers.

Run `make golden`, or `python make.py [CASE …]` with an interpreter that has the reference extra.

A case is a tiny checkpoint and golden.npz. `save_pretrained` writes the checkpoint, in bfloat16, so
that it is small and both sides read the same values. golden.npz has, for each document i run
*alone* in float32 with eager attention: `tokens_i` [T], `logits_i` [T, V],
`hidden_i` [L + 1, T, D], `maps_i` [L, H, T, T] (only of blocks that have maps).

Documents are longer than the windows. Weights are large, norms and biases far from their initial
values, and caps low, so that a missing step changes results visibly.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    Kimi_K25Config,
    LlamaConfig,
    Ministral3Config,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolLM3Config,
    YoutuConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).parent
LENGTHS = (24, 9, 12)

SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
# With 64 positions, the eight frequencies lie below, between and above the two limits.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
# Eight frequencies: two below, three on and three above a ramp whose ends are no whole numbers.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
# Rows of 24 tokens are long for both.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0, 5.0, 8.0],
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
UPPER = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Positions beyond 8 turn differently and have larger queries.
MINISTRAL = YARN | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
MROPE = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 6}

# OLMo has no head_dim of its own.
OLMO = {name: size for name, size in SIZES.items() if name != "head_dim"}
# MXFP4 has blocks of 32. Documents are longer than the window and YaRN's original length.
GPT_OSS = GptOssConfig(
    **(SIZES | {"num_hidden_layers": 3, "intermediate_size": 32, "head_dim": 16}),
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=6,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
)
LLAMA_ONLY = ("head_dim", "num_key_value_heads", "rms_norm_eps")
NEOX = {name: size for name, size in SIZES.items() if name not in LLAMA_ONLY}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.5,
}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}

CASES = {
    "llama": LlamaConfig(**SIZES, rope_parameters=PLAIN),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama_linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama_longrope": LlamaConfig(**SIZES, rope_parameters=LONGROPE),
    "llama_dynamic": LlamaConfig(
        **(SIZES | {"max_position_embeddings": 16}), rope_parameters=DYNAMIC
    ),
    "mistral": MistralConfig(**SIZES, rope_parameters=PLAIN, sliding_window=6),
    "qwen2": Qwen2Config(
        **(SIZES | {"head_dim": 8}), **UPPER, rope_parameters=PLAIN, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(**SIZES, **UPPER, rope_parameters=PLAIN),
    "qwen3_yarn": Qwen3Config(**SIZES, **UPPER, rope_parameters=YARN),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, rope_parameters=PLAIN, norm_topk_prob=True),
    "qwen3_moe_unnormalised": Qwen3MoeConfig(
        **(SIZES | {"num_hidden_layers": 2}),
        **EXPERTS,
        rope_parameters=PLAIN,
        use_sliding_window=True,
        sliding_window=6,
        norm_topk_prob=False,
    ),
    "gemma2": Gemma2Config(
        **SIZES,
        **GEMMA,
        rope_parameters=PLAIN,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=12.0,
    ),
    # One block more than the period of five blocks with a window and one without.
    "gemma3": Gemma3TextConfig(
        **(SIZES | {"num_hidden_layers": 7}),
        **GEMMA,
        rope_parameters={
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "gemma": GemmaConfig(**SIZES, rope_parameters=PLAIN),
    # Four blocks: the last one does not rotate.
    "smollm3": SmolLM3Config(
        **(SIZES | {"num_hidden_layers": 4}),
        rope_parameters=PLAIN,
        attention_bias=True,
        mlp_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        tie_word_embeddings=False,
        **NO_TOKENS,
    ),
    "mixtral": MixtralConfig(
        **(SIZES | {"num_hidden_layers": 2, "intermediate_size": 24}),
        rope_parameters=PLAIN,
        num_local_experts=4,
        sliding_window=6,
    ),
    "olmo2": Olmo2Config(**OLMO, rope_parameters=PLAIN, attention_bias=True, **NO_TOKENS),
    # Four blocks: the last one has no window.
    "olmo3": Olmo3Config(
        **(OLMO | {"num_hidden_layers": 4}),
        sliding_window=6,
        rope_parameters={
            "full_attention": LINEAR | {"rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        **NO_TOKENS,
    ),
    # Six of a head's eight coordinates are turned; rows are longer than 16 positions.
    "phi3": Phi3Config(
        **(SIZES | {"head_dim": 8}),
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.0, 1.5, 3.0],
        },
        original_max_position_embeddings=16,
        sliding_window=6,
        **NO_TOKENS,
    ),
    "granite": GraniteConfig(
        **SIZES, **GRANITE, rope_parameters=PLAIN, attention_bias=True, mlp_bias=True, **NO_TOKENS
    ),
    "granite4": GraniteMoeHybridConfig(
        **(SIZES | {"num_hidden_layers": 2}),
        **GRANITE,
        rope_parameters=PLAIN,
        shared_intermediate_size=40,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["full_attention"] * 2,
        position_embedding_type="rope",
        mamba_n_heads=1,
        tie_word_embeddings=True,
        **NO_TOKENS,
    ),
    "gpt2": GPT2Config(
        **{"vocab_size": 80, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48},
        n_inner=40,
        **NO_TOKENS,
    ),
    # Pythia's; four of a head's eight coordinates are turned.
    "gpt_neox": GPTNeoXConfig(**NEOX, rotary_pct=0.5, rotary_emb_base=500, **NO_TOKENS),
    "gpt_neox_sequential": GPTNeoXConfig(
        **(NEOX | {"num_hidden_layers": 2}),
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_new",
        rope_parameters=PLAIN | {"partial_rotary_factor": 1.0},
        **NO_TOKENS,
    ),
    "ministral3": Ministral3Config(**SIZES, rope_parameters=MINISTRAL),
    # Models of images and text, of which only the text is run.
    "tower_gemma3": Gemma3Config(
        text_config=SIZES
        | GEMMA
        | {
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=79,
    ),
    "tower_mistral3": Mistral3Config(
        text_config=SIZES | {"model_type": "mistral", "rope_parameters": PLAIN},
        vision_config=VISION | {"model_type": "pixtral"},
        image_token_index=79,
        tie_word_embeddings=False,
    ),
    "tower_ministral3": Mistral3Config(
        text_config=SIZES
        | {
            "model_type": "ministral3",
            "num_hidden_layers": 2,
            "rope_parameters": MINISTRAL,
            "tie_word_embeddings": True,
        },
        vision_config=VISION | {"model_type": "pixtral"},
        image_token_index=79,
        tie_word_embeddings=True,
    ),
    "tower_qwen3_vl": Qwen3VLConfig(
        text_config=SIZES | {"rope_parameters": PLAIN | MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **{f"{name}_token_id": 79 for name in ("image", "video", "vision_start", "vision_end")},
    ),
}
CASES |= {
    "tower_qwen2_5_vl": Qwen2_5_VLConfig(
        text_config={name: size for name, size in SIZES.items() if name != "head_dim"}
        | {"num_hidden_layers": 2, "rope_parameters": PLAIN | {"mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
        },
        **{f"{name}_token_id": 79 for name in ("image", "video", "vision_start", "vision_end")},
    )
}
# One block without experts; a token chooses two of four groups, then two experts.
GLM4_MOE = Glm4MoeConfig(
    **SIZES,
    moe_intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    attention_bias=True,
    use_qk_norm=True,
    rope_parameters=PLAIN | {"partial_rotary_factor": 0.5},
)
CASES |= {"glm4_moe": GLM4_MOE}
# Heads of 8 coordinates that stay, 8 that turn, and values of another width.
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
}
del LATENT["head_dim"]
SPARSE = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.25}
CASES |= {
    "deepseek_v2": DeepseekV2Config(
        **(LATENT | {"num_hidden_layers": 2}),
        **SPARSE,
        **GROUPS,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        rope_parameters=YARN | {"mscale": 0.9, "mscale_all_dim": 0.6},
    ),
    "deepseek_v3": DeepseekV3Config(
        **LATENT, **SPARSE, **GROUPS, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    ),
    "deepseek_v3_halves": DeepseekV3Config(
        **(LATENT | {"num_hidden_layers": 2, "q_lora_rank": None}),
        **SPARSE,
        **{"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        rope_parameters=PLAIN,
        rope_interleave=False,
    ),
    "glm4_moe_lite": Glm4MoeLiteConfig(
        **(LATENT | {"v_head_dim": 20}),
        **{name: size for name, size in SPARSE.items() if name != "first_k_dense_replace"},
        mlp_layer_types=["dense", "dense", "sparse"],
        rope_parameters=PLAIN,
    ),
    "youtu": YoutuConfig(**LATENT, rope_parameters=PLAIN, **NO_TOKENS),
    "glm": GlmConfig(
        **(SIZES | {"num_hidden_layers": 2}),
        rope_parameters=PLAIN | {"partial_rotary_factor": 0.5},
        **NO_TOKENS,
    ),
    "glm4": Glm4Config(
        **SIZES,
        attention_bias=False,
        rope_parameters=PLAIN | {"partial_rotary_factor": 0.5},
        **NO_TOKENS,
    ),
}
CASES |= {
    "tower_qwen3_vl_moe": Qwen3VLMoeConfig(
        text_config=SIZES
        | EXPERTS
        | {"num_hidden_layers": 2, "rope_parameters": PLAIN | MROPE, "tie_word_embeddings": False},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
        **{f"{name}_token_id": 79 for name in ("image", "video", "vision_start", "vision_end")},
    ),
    "tower_kimi_k25": Kimi_K25Config(
        text_config=LATENT
        | SPARSE
        | {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 2,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": PLAIN,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        projection_hidden_size=16,
        tie_word_embeddings=False,
        **{f"{name}_token_id": 79 for name in ("image", "video", "vision_start", "vision_end")},
    ),
}
# Two value heads share a query and a key. Periods of four blocks, and blocks that fill none. Heads'
# outputs are normed where they are small, too: a larger eps keeps rounding errors small.
HYBRID = SIZES | {"rms_norm_eps": 1e-2}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 20}
CASES |= {
    "qwen3_next": Qwen3NextConfig(
        **(HYBRID | {"num_hidden_layers": 5}), **SHARED, **LINEAR_ATTENTION, rope_parameters=PLAIN
    ),
    "qwen3_5": Qwen3_5TextConfig(
        **(HYBRID | {"num_hidden_layers": 10}),
        **LINEAR_ATTENTION,
        rope_parameters=PLAIN | {"mrope_section": [1, 1, 0]},
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(
        **{n: s for n, s in HYBRID.items() if n != "intermediate_size"} | {"num_hidden_layers": 4},
        **SHARED,
        **LINEAR_ATTENTION,
        rope_parameters=PLAIN | {"mrope_section": [1, 1, 0]},
    ),
    "tower_qwen3_5": Qwen3_5Config(
        text_config=HYBRID
        | LINEAR_ATTENTION
        | {"num_hidden_layers": 4, "rope_parameters": PLAIN | {"mrope_section": [1, 1, 0]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        **{f"{name}_token_id": 79 for name in ("image", "video", "vision_start", "vision_end")},
    ),
}
# Heads of two sizes; two kinds of blocks that make keys and values, and two that read them.
GEMMA4 = SIZES | {
    "num_hidden_layers": 6,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 80,
    "hidden_size_per_layer_input": 8,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.5,
            "rope_theta": 500.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    "final_logit_softcapping": 12.0,
}
SHARED_KEYS = {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}
VALUES_ARE_KEYS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
CASES |= {
    "gemma4": Gemma4TextConfig(**GEMMA4, **SHARED_KEYS),
    "gemma4_moe": Gemma4TextConfig(
        **(GEMMA4 | {"num_hidden_layers": 4, "hidden_size_per_layer_input": 0})
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        **VALUES_ARE_KEYS,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "tower_gemma4": Gemma4Config(
        text_config=GEMMA4
        | VALUES_ARE_KEYS
        | {"num_hidden_layers": 3, "num_kv_shared_layers": 1}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        vision_config=VISION | {"num_key_value_heads": 2, "position_embedding_size": 16},
        **{f"{name}_token_id": 79 for name in ("image", "video", "audio", "boi", "boa", "eoi")},
        eoa_token_index=79,
    ),
}
# Some blocks of each kind have sparse gates. All ids are in the table of the blocks' own inputs,
# which is as long as another vocabulary.
CASES["gemma3n"] = Gemma3nTextConfig(
    **{n: s for n, s in GEMMA4.items() if n not in ("global_head_dim", "rope_parameters")}
    | {"vocab_size_per_layer_input": 96},
    num_kv_shared_layers=3,
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    activation_sparsity_pattern=[0.6, 0.0, 0.8, 0.0, 0.5, 0.7],
    altup_num_inputs=3,
    laurel_rank=4,
)
ROUTED = (
    *("gpt_oss", "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3"),
    *("qwen3_vl_moe", "kimi_k25", "qwen3_next", "qwen3_5_moe_text"),
)
"""Model types whose experts' matrices lie in one parameter."""
CASES |= {"gpt_oss": GPT_OSS, "gpt_oss_mxfp4": GPT_OSS}
TABLES = ("embed", "lm_head", "wte", "wpe")
"""Parts of the names of embeddings and heads."""
SHARDED = "mistral"
MXFP4 = "gpt_oss_mxfp4"
AS_PUBLISHED = {
    # Transformers saves a new model's experts as [expert, output, input].
    "tower_qwen3_vl_moe": lambda name, array: (
        (name, array.mT.contiguous()) if ".experts." in name else (name, array)
    ),
    # Transformers 5.17 takes the text's layers for blocks of the part for images.
    "tower_kimi_k25": lambda name, array: (
        name.replace("language_model.model.blocks.", "language_model.model.layers."),
        array,
    ),
}
"""Cases whose published files spell tensors otherwise than `save_pretrained`: (name, tensor) → the
same as published. `from_pretrained` reads both."""
LARGEST_ID = {name: 79 if name.startswith("tower") else 80 for name in CASES}
"""Token 79 stands for an image there."""


def main() -> None:
    torch.set_grad_enabled(False)
    for name in sys.argv[1:] or CASES:
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        save_checkpoint(CASES[name], directory, shard_size="20KB" if name == SHARDED else "1GB")
        if name in AS_PUBLISHED:
            respell(directory, AS_PUBLISHED[name])
        model = auto_class(CASES[name]).from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        if name == MXFP4:
            store_experts_in_mxfp4(directory, model)
        golden = {}
        draw = np.random.default_rng(0)
        for i, length in enumerate(LENGTHS):
            tokens = draw.integers(0, LARGEST_ID[name], length)
            golden |= {
                f"{key}_{i}": array for key, array in run_alone(model.eval(), tokens).items()
            }
        np.savez_compressed(directory / "golden.npz", **golden)
        size = sum(file.stat().st_size for file in directory.iterdir())
        largest = max(np.abs(golden[f"logits_{i}"]).max() for i in range(len(LENGTHS)))
        print(f"{name}: {size / 1024:.0f} KiB, largest logit {largest:.1f}")


def auto_class(config):
    """The class that makes and loads models of this config."""
    return AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM


def save_checkpoint(config, directory: Path, *, shard_size: str) -> None:
    """Save a random model of this shape in files of at most `shard_size`."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if "norm" in name or ".ln_" in name:
            # Gemma and hybrid Qwens multiply by 1 + weight, but for one norm.
            around = any(kind in config.model_type for kind in ("gemma", "qwen3_next", "qwen3_5"))
            around = around and not any(k in config.model_type for k in ("gemma3n", "gemma4"))
            parameter.copy_(0.3 * noise + (0 if around and "linear_attn" not in name else 1))
        elif name.endswith("A_log"):
            parameter.copy_(noise - 1.5)
        elif name.endswith("modality_router.weight"):
            parameter.copy_(noise)  # it reads states divided by their width
        elif name.endswith(("router.scale", "per_expert_scale", "correct_output_scale")):
            parameter.copy_(0.3 * noise + 1)
        elif name.endswith("sinks"):
            parameter.copy_(noise)
        elif config.model_type in ROUTED and name.endswith("gate_up_proj"):
            parameter.copy_(noise * 0.6)  # some gates reach gpt-oss's limit of 7
        elif config.model_type in ROUTED and "down_proj" in name:
            parameter.copy_(noise * 0.05)
        elif name.endswith("bias") or any(part in name for part in TABLES):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * 1.2 * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape))
        if name.endswith("layer_scalar"):
            buffer.copy_(0.9 + 0.2 * torch.rand(buffer.shape))
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)


def respell(directory: Path, published) -> None:
    """Write a saved model's tensors as `published` says."""
    weights = directory / "model.safetensors"
    tensors = dict(published(name, array) for name, array in load_file(weights).items())
    save_file(tensors, weights, metadata={"format": "pt"})


def store_experts_in_mxfp4(directory: Path, model) -> None:
    """Replace the experts' matrices by random blocks and exponents, in the files and in the model.

    Transformers dequantises them. (Loading such files with it needs more packages.)
    """
    weights, draw = directory / "model.safetensors", np.random.default_rng(0)
    tensors = load_file(weights)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = draw.integers(0, 256, (*shape, 16)).astype(np.uint8)
        tensors[f"{name}_blocks"] = torch.from_numpy(blocks)
        first = 122 if "gate_up" in name else 119
        scales = draw.integers(first, first + 4, shape).astype(np.uint8)
        tensors[f"{name}_scales"] = torch.from_numpy(scales)
        plain = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        model.get_parameter(name).copy_(plain)
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
            *("model.embed_tokens", "lm_head"),
        ],
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def run_alone(model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, hidden states and attention maps of one document in a row of max(LENGTHS) tokens.

    Some scalings of rotary positions depend on the row's length.
    """
    row, length = np.pad(tokens, (0, max(LENGTHS) - len(tokens))), len(tokens)
    rope = getattr(model.config.get_text_config(), "rope_parameters", {})
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        row = tokens  # as the files were made before there were such scalings
    out = model(torch.from_numpy(row)[None], output_hidden_states=True, output_attentions=True)
    states = out.hidden_states
    if states[0].ndim == 4:  # Gemma 3n: of copies, the first; and no final norm at the end
        final = model.model(torch.from_numpy(row)[None]).last_hidden_state
        states = (*(copies[0] for copies in states[:-1]), final)
    return {
        "tokens": tokens.astype(np.int32),
        "logits": out.logits[0, :length].numpy(),
        "hidden": torch.stack(states)[:, 0, :length].numpy(),
        "maps": torch.stack(out.attentions)[:, 0, :, :length, :length].numpy(),
    }


if __name__ == "__main__":
    main()
