"""The config.json published with a model of each family, read and written back."""

import pytest

from decant.models.families import config_from_json, config_to_json
from decant.models.rotary import Llama3Scaling

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}


def sizes(width, mlp, layers, heads, kv_heads, vocabulary, longest, eps):
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": longest,
        "rms_norm_eps": eps,
    }


LLAMA_32_1B = {
    **sizes(2048, 8192, 16, 32, 8, 128256, 131072, 1e-5),
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
MISTRAL_7B = {
    **sizes(4096, 14336, 32, 32, 8, 32000, 32768, 1e-5),
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "model_type": "mistral",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
QWEN25_7B = {
    **sizes(3584, 18944, 28, 28, 4, 152064, 131072, 1e-6),
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "max_window_layers": 28,
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3_30B_A3B = {
    **sizes(2048, 6144, 48, 32, 4, 151936, 40960, 1e-6),
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
GEMMA2_2B = {
    **sizes(2304, 9216, 26, 8, 4, 256000, 8192, 1e-6),
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
GEMMA3_1B = {
    **sizes(1152, 6912, 26, 4, 1, 262144, 32768, 1e-6),
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma3_text",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
GEMMA = {
    "tie_embeddings": True,
    "norm_adds_one": True,
    "post_norms": True,
    "scale_embedding": True,
    "activation": "gelu_tanh",
    "query_scalar": 256.0,
}


GPT_OSS_20B = {
    **sizes(2880, 2880, 24, 64, 8, 201088, 131072, 1e-5),
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "model_type": "gpt_oss",
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "output_router_logits": False,
    "quantization_config": {"quant_method": "mxfp4"},
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}


GLM_45_AIR = {
    **sizes(4096, 10944, 46, 96, 8, 151552, 131072, 1e-5),
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            LLAMA_32_1B,
            {
                "rope_scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192),
                "windows": (None,),
                "tie_embeddings": True,
            },
        ),
        (MISTRAL_7B, {"windows": (4096,), "head_dim": 128, "rope_scaling": None}),
        (QWEN25_7B, {"windows": (None,), "qkv_bias": True, "head_dim": 128}),
        (
            QWEN3_30B_A3B,
            {
                "windows": (None,),
                "qk_norm": True,
                "intermediate_size": 768,
                "num_experts": 128,
                "experts_per_token": 8,
                "normalise_experts": True,
            },
        ),
        (
            GPT_OSS_20B,
            {
                "windows": (128, None),
                "attention_sinks": True,
                "num_experts": 32,
                "experts_per_token": 4,
                "activation": "clamped_swish",
                "rope_theta": 150_000.0,
                "output_bias": True,
            },
        ),
        (
            GLM_45_AIR,
            {
                "rotary_dim": 64,
                "dense_layers": 1,
                "dense_intermediate_size": 10944,
                "intermediate_size": 1408,
                "shared_intermediate_size": 1408,
                "num_experts": 128,
                "router": "sigmoid",
                "output_bias": False,
            },
        ),
        (
            GEMMA2_2B,
            GEMMA | {"windows": (4096, None), "attention_softcap": 50.0, "final_softcap": 30.0},
        ),
        (
            GEMMA3_1B,
            GEMMA
            | {
                "windows": (*[512] * 5, None),
                "rope_theta": 1e6,
                "window_rope_theta": 1e4,
                "final_softcap": None,
                "qk_norm": True,
            },
        ),
    ],
    ids=lambda value: value.get("model_type", ""),
)
def test_a_published_config_is_read_and_written_back(fields, expected):
    config = config_from_json(COMMON | fields)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config_from_json(config_to_json(config)) == config
