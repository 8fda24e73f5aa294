"""Published config.json of dense models, Mixtral and research models: read and written back."""

import pytest

from decant.models.families import config_from_json, config_to_json
from decant.models.rotary import LongRopeScaling, YarnScaling
from tests.models.families.test_published_configs import COMMON, sizes

SMOLLM3_3B = {
    **sizes(2048, 11008, 36, 16, 4, 128256, 65536, 1e-6),
    "attention_bias": False,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
MIXTRAL_8X7B = {
    **sizes(4096, 14336, 32, 32, 8, 32000, 32768, 1e-5),
    "hidden_act": "silu",
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
GEMMA_2B = {
    **sizes(2048, 16384, 18, 8, 1, 256000, 8192, 1e-6),
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "model_type": "gemma",
    "pad_token_id": 0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}
OLMO2_7B = {
    **sizes(4096, 11008, 32, 32, 32, 100352, 4096, 1e-6),
    "attention_bias": False,
    "hidden_act": "silu",
    "model_type": "olmo2",
    "pad_token_id": 100277,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
}
OLMO3_7B = {
    **sizes(4096, 11008, 32, 32, 32, 100278, 65536, 1e-6),
    "attention_bias": False,
    "hidden_act": "silu",
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
    "model_type": "olmo3",
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
PHI_4 = {
    **sizes(5120, 17920, 40, 40, 10, 100352, 16384, 1e-5),
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "model_type": "phi3",
    "original_max_position_embeddings": 16384,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
PHI_4_MINI = {
    **sizes(3072, 8192, 32, 24, 8, 200064, 131072, 1e-5),
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    # The real factors differ; there are as many.
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
GRANITE = {
    "attention_bias": False,
    "hidden_act": "silu",
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
}
GRANITE_33_8B = {
    **sizes(4096, 12800, 40, 32, 8, 49159, 131072, 1e-5),
    **GRANITE,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "logits_scaling": 16.0,
    "mlp_bias": False,
    "model_type": "granite",
}
GRANITE_4_MICRO = {
    **sizes(2560, 8192, 40, 40, 8, 100352, 131072, 1e-5),
    **GRANITE,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "init_method": "mup",
    "layer_types": ["attention"] * 40,
    "logits_scaling": 10,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
    "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "output_router_logits": False,
    "position_embedding_type": "rope",
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 8192,
}
GPT2 = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
PYTHIA_160M = {
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
YARN = YarnScaling(8.0, 8192, 32.0, 1.0, True, 1.2079441541679836)
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (SMOLLM3_3B, {"rotary_layers": (True, True, True, False), "rope_theta": 5e6}),
        (
            MIXTRAL_8X7B,
            {"num_experts": 8, "experts_per_token": 2, "normalise_experts": True, "head_dim": 128},
        ),
        (GEMMA_2B, {"norm_adds_one": True, "scale_embedding": True, "num_kv_heads": 1}),
        (OLMO2_7B, {"pre_norms": False, "post_norms": True, "qk_norm_whole": True}),
        (OLMO3_7B, {"windows": (*[4096] * 3, None), "rope_scaling": YARN, "pre_norms": False}),
        (PHI_4, {"windows": (None,), "rope_scaling": None, "rotary_dim": None}),
        (PHI_4_MINI, {"windows": (262144,), "rotary_dim": 96, "tie_embeddings": True}),
        (GRANITE_33_8B, {"score_multiplier": 2**-7, "logit_divisor": 16.0}),
        (GRANITE_4_MICRO, {"score_multiplier": 2**-6, "logit_divisor": 10.0, "head_dim": 64}),
        (GPT2, BIASES | {"learned_positions": True, "rotary_layers": (False,), "norm": "layer"}),
        (PYTHIA_160M, BIASES | {"parallel_blocks": True, "rotary_dim": 16, "gated_mlp": False}),
    ],
    ids=lambda value: value.get("model_type", ""),
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
