"""What people's config.json files hold: harmless fields are read over, others refused by name.

Sizes are small and invented; the fields are those of published checkpoints, of fine-tuning tools,
and of what transformers 4 and 5 save (its config classes' defaults, diffs and full dumps).
"""

import dataclasses

import pytest

from decant.models import ModelConfig
from decant.models.families import config_from_json
from decant.models.rotary import LinearScaling, Llama3Scaling

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
LLAMA = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=2048,
)
MISTRAL = dataclasses.replace(LLAMA, family="mistral", windows=(4096,))
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, head_dim=128)
MOE = dataclasses.replace(
    *(LLAMA,),
    family="qwen3_moe",
    qk_norm=True,
    intermediate_size=24,
    num_experts=8,
    experts_per_token=2,
    normalise_experts=True,
)
GEMMA2 = dataclasses.replace(
    LLAMA,
    family="gemma2",
    head_dim=256,
    tie_embeddings=True,
    windows=(4096, None, 4096, None),
    post_norms=True,
    norm_adds_one=True,
    scale_embedding=True,
    activation="gelu_tanh",
    query_scalar=256.0,
    attention_softcap=50.0,
    final_softcap=30.0,
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    family="gemma3",
    windows=(4096,),
    attention_softcap=None,
    final_softcap=None,
    qk_norm=True,
    rope_theta=1e6,
    window_rope_theta=1e4,
)
EXPECTED = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": MOE,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
SPARSE = {
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# What every config says that transformers 4 has saved.
SAVED_4 = {
    "architectures": ["SomeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": True,
}
# The rest of a full dump by transformers 4 (`to_dict`).
DUMPED_4 = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
SAVED_5 = {
    "architectures": ["SomeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "transformers_version": "5.17.0",
    "use_cache": True,
}
UNSLOTH = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "unsloth/some-model",
    "model_name": "unsloth/some-model",
    "pad_token_id": 128004,
    "unsloth_fixed": True,
    "unsloth_version": "2024.12.4",
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 1024,
    "rope_type": "llama3",
}
FULL, SLIDING = "full_attention", "sliding_attention"

# Every family with what all of them are found with.
EVERYWHERE = {
    "saved by transformers 4": SAVED_4,
    "dumped by transformers 4": SAVED_4 | DUMPED_4,
    "fine-tuned with unsloth": SAVED_4 | UNSLOTH,
    "neutral": {
        "auto_map": {"AutoModelForCausalLM": "modeling_other.Model"},
        "mlp_bias": False,
        "attention_bias": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "compression_config": {},
        "logit_scale": 1.0,
        "residual_multiplier": 1,
        "embedding_multiplier": 1.0,
        "num_nextn_predict_layers": 0,
        "rope_interleaved": False,
        "use_mrope": False,
        "use_bidirectional_attention": None,
        "is_causal": True,
        "sep_token_id": None,
        "per_layer_config": {},
    },
    "sampling leftovers": {"temperature": 0.6, "top_p": 0.9, "max_length": 4096, "do_sample": True},
}
ACCEPTED = [
    (
        *("Llama with biases", "llama"),
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    ),
    # (where it is found, model_type, fields, what differs from the family's config above)
    ("Llama 1", "llama", {"max_sequence_length": 2048, "pad_token_id": 0}, {}),
    ("Llama 2", "llama", {"pretraining_tp": 1, "rope_scaling": None}, {}),
    (
        *("Llama 3.1", "llama"),
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
        {"rope_theta": 5e5, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 1024)},
    ),
    (
        *("Llama 3.2 1B", "llama"),
        {"head_dim": 32, "tie_word_embeddings": True, "rope_theta": 500000},
        {"head_dim": 32, "tie_embeddings": True, "rope_theta": 5e5},
    ),
    ("Llama without grouped heads", "llama", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
    ("Llama with a null head_dim", "llama", {"head_dim": None}, {}),
    (
        *("DeepSeek-Coder", "llama"),
        {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
        {"rope_theta": 1e5, "rope_scaling": LinearScaling(4.0)},
    ),
    (
        *("SmolLM2", "llama"),
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        {},
    ),
    (
        "LongLoRA",
        "llama",
        {"rope_scaling": {"factor": 1.0, "type": "linear"}},
        {"rope_scaling": LinearScaling(1.0)},
    ),
    ("TinyLlama", "llama", {"pretraining_tp": 1, "rope_theta": 10000.0, "mlp_bias": False}, {}),
    (
        *("Llama by transformers 5", "llama"),
        SAVED_5 | {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}, "mlp_bias": False},
        {"rope_theta": 5e5, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 1024)},
    ),
    (
        *("transformers 5 with the old spelling left over", "llama"),
        {
            "rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE},
            "rope_scaling": LLAMA3_ROPE,
            "rope_theta": 5e5,
        },
        {"rope_theta": 5e5, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 1024)},
    ),
    (
        *("rope_parameters with neutral fields", "llama"),
        {
            "rope_parameters": {
                "rope_theta": 500.0,
                "rope_type": "default",
                "attention_factor": None,
                "original_max_position_embeddings": 2048,
                "partial_rotary_factor": 1.0,
            }
        },
        {"rope_theta": 500.0},
    ),
    ("llamafied Qwen", "llama", {"sliding_window": 4096, "use_sliding_window": False}, {}),
    ("Llama in full", "llama", {"use_sliding_window": False, "sliding_window": None}, {}),
    ("axolotl", "llama", {"_flash_attn_2_enabled": True, "gradient_checkpointing": True}, {}),
    ("attn_implementation kept", "llama", {"attn_implementation": "flash_attention_2"}, {}),
    ("a classifier's labels", "llama", {"id2label": {"0": "a"}, "num_labels": 1}, {}),
    ("Mistral 7B", "mistral", {"sliding_window": 4096}, {}),
    ("Mistral 7B v0.3", "mistral", {"sliding_window": None}, {"windows": (None,)}),
    ("Mistral without the field", "mistral", {}, {}),
    (
        *("Mistral Nemo", "mistral"),
        {"head_dim": 32, "sliding_window": None, "rope_theta": 1000000.0},
        {"head_dim": 32, "windows": (None,), "rope_theta": 1e6},
    ),
    (
        *("Mistral by transformers 5", "mistral"),
        SAVED_5 | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "head_dim": 16},
        {"rope_theta": 1e6},
    ),
    ("Mistral that says its window twice", "mistral", {"use_sliding_window": True}, {}),
    (
        *("Mistral that says twice that it has none", "mistral"),
        {"sliding_window": None, "use_sliding_window": False},
        {"windows": (None,)},
    ),
    (
        *("Qwen 1.5", "qwen2"),
        {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False},
        {},
    ),
    (
        *("Qwen 2.5", "qwen2"),
        {
            "max_window_layers": 28,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        {"rope_theta": 1e6},
    ),
    ("Qwen 2.5 of 4.53", "qwen2", {"layer_types": [FULL] * 4, "sliding_window": None}, {}),
    (
        *("Qwen 2 with windows", "qwen2"),
        {"max_window_layers": 2, "sliding_window": 64, "use_sliding_window": True},
        {"windows": (None, None, 64, 64)},
    ),
    ("Qwen 2 that says it has biases", "qwen2", {"qkv_bias": True}, {}),
    (
        *("Qwen 2 by transformers 5", "qwen2"),
        SAVED_5
        | {
            "layer_types": [FULL] * 4,
            "max_window_layers": 28,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"rope_theta": 1e6},
    ),
    (
        *("Qwen 3", "qwen3"),
        {
            "head_dim": 128,
            "max_window_layers": 36,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"rope_theta": 1e6},
    ),
    ("Qwen 3 that says so", "qwen3", {"use_qk_norm": True, "qkv_bias": False}, {}),
    (
        *("Qwen3-30B-A3B", "qwen3_moe"),
        {
            "decoder_sparse_step": 1,
            "head_dim": 16,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {},
    ),
    (
        *("Qwen3-Coder-30B-A3B", "qwen3_moe"),
        {
            "head_dim": 16,
            "max_window_layers": 28,
            "qkv_bias": False,
            "rope_scaling": None,
            "rope_theta": 10000000,
            "shared_expert_intermediate_size": 0,
            "use_qk_norm": True,
        },
        {"rope_theta": 1e7},
    ),
    (
        *("Qwen 3 MoE by transformers 5", "qwen3_moe"),
        SAVED_5
        | {
            "head_dim": 16,
            "num_local_experts": 8,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
        {"rope_theta": 1e6},
    ),
    (
        *("Gemma 2", "gemma2"),
        {
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
        },
        {},
    ),
    (
        *("Gemma 2 27B", "gemma2"),
        {"head_dim": 128, "query_pre_attn_scalar": 144},
        {"head_dim": 128, "query_scalar": 144.0},
    ),
    (
        *("Gemma 2 without caps", "gemma2"),
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attention_softcap": None, "final_softcap": None},
    ),
    (
        *("Gemma 2 by transformers 5", "gemma2"),
        SAVED_5
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "use_bidirectional_attention": None,
        },
        {},
    ),
    (
        *("Gemma 3 1B", "gemma3_text"),
        {
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        {"windows": (512,)},
    ),
    (
        *("Gemma 3 of 4.5x", "gemma3_text"),
        {"_sliding_window_pattern": 2, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 512},
        {"windows": (512, None)},
    ),
    (
        *("Gemma 3 by transformers 5", "gemma3_text"),
        SAVED_5
        | {
            "_sliding_window_pattern": 6,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "rope_parameters": {
                FULL: {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
                SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "use_bidirectional_attention": False,
        },
        {"windows": (4096, 4096, 4096, None), "rope_scaling": LinearScaling(8.0)},
    ),
]
CASES = [
    *(
        (f"{name}, {model_type}", model_type, fields, {})
        for name, fields in EVERYWHERE.items()
        for model_type in EXPECTED
    ),
    *ACCEPTED,
]


def config(model_type, fields):
    sizes = SIZES | (SPARSE if model_type == "qwen3_moe" else {})
    return sizes | {"model_type": model_type} | fields


@pytest.mark.parametrize(
    ("model_type", "fields", "changes"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_config_that_people_have_is_read(model_type, fields, changes):
    expected = dataclasses.replace(EXPECTED[model_type], **changes)
    assert config_from_json(config(model_type, fields)) == expected


@pytest.mark.parametrize("model_type", EXPECTED)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_multiplier", 1.0),  # Granite: in place of 1/√head_dim
        ("attention_sinks", 4),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("embedding_multiplier", 12.0),
        ("is_causal", False),
        ("logit_scale", 0.0625),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("num_nextn_predict_layers", 1),
        ("partial_rotary_factor", 0.5),
        ("partial_rotary_factor", 0),
        ("per_layer_config", {"0": {"sliding_window": 4}}),
        ("residual_multiplier", 0.22),
        ("rope_interleaved", True),
        ("shared_expert_intermediate_size", 512),
        ("use_bidirectional_attention", True),
        ("use_mrope", True),
        ("use_residual", False),
        ("use_rope", False),
    ],
)
def test_a_field_that_may_change_the_function_is_refused_by_name_and_value(model_type, name, value):
    with pytest.raises(ValueError, match=f"{name} = ") as caught:
        config_from_json(config(model_type, {name: value}))
    assert repr(value)[:50] in str(caught.value)


@pytest.mark.parametrize("model_type", sorted(EXPECTED.keys() - {"llama"}))
@pytest.mark.parametrize("name", ["mlp_bias", "attention_bias"])
def test_biases_that_a_family_has_not_are_refused(model_type, name):
    with pytest.raises(ValueError, match=f"{name} = True"):
        config_from_json(config(model_type, {name: True}))


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mistral", {"use_sliding_window": False}, "use_sliding_window = False"),
        ("gemma2", {"use_sliding_window": False}, "use_sliding_window = False"),
        ("mistral", {"layer_types": [FULL, SLIDING] * 2}, r"layer_types = \["),
        ("llama", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm = True"),
        ("qwen3", {"use_qk_norm": False}, "use_qk_norm = False"),
        ("llama", {"qkv_bias": True}, "qkv_bias = True"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("qwen2", {"layer_types": [SLIDING] * 4}, "no sliding_window"),
        ("gemma3", {"text_config": {}}, "text_config is missing"),
        ("gemma3_text", {"text_config": {"hidden_size": 64}}, "text_config = "),
        ("llama", {"rope_scaling": {"rope_type": "xpos", "factor": 4.0}}, "rope_type = 'xpos'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "alpha": 4.0}}, "'factor' is missing"),
        ("llama", {"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "factor = 4.0"),
        (
            *("llama",),
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_scaling and rope_parameters differ",
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
            "high_freq_factor = 4.0; expected more",
        ),
        ("mamba", {}, "model_type is 'mamba'"),
        (["llama"], {}, r"model_type is \['llama'\]"),
        (None, {}, "model_type is None"),
    ],
)
def test_what_contradicts_the_family_is_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(SIZES | {"model_type": model_type} | fields)


@pytest.mark.parametrize("model_type", EXPECTED)
def test_how_the_weights_are_stored_does_not_change_the_config(model_type):
    """SafetensorsFiles reads it, or refuses it: see tests/models/prequantised."""
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    plain = config_from_json(config(model_type, {}))
    assert config_from_json(config(model_type, {"quantization_config": stored})) == plain


NOT_SIZES = (0, -1, 1.5, 2.0, True, "64", [64], {}, 10**9 * 10**9, float("nan"))


@pytest.mark.parametrize("value", NOT_SIZES, ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "sliding_window"),
    ],
)
def test_a_size_that_is_none_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name} = .*; expected a whole number from 1 to"):
        config_from_json(config("qwen3_moe", {name: value}))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *(("gemma2", name) for name in ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar")),
        *(("gemma2", name) for name in ("attn_logit_softcapping", "final_logit_softcapping")),
        ("gemma3_text", "rope_local_base_freq"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [0, -1.0, True, "1", [], float("nan"), float("inf"), 1e300, 10**400],
    ids=lambda v: str(v)[:9],
)
def test_a_number_that_is_none_is_refused_by_name(model_type, name, value):
    with pytest.raises(ValueError, match=rf"{name} = .*; expected a number from"):
        config_from_json(config(model_type, {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("tie_word_embeddings", v) for v in (0, 1, "false", [], {})),
        *(("use_sliding_window", v) for v in (0, "no", [])),
        ("layer_types", "full_attention"),
        ("layer_types", {}),
        ("layer_types", [["full_attention"]] * 4),
        ("layer_types", [None] * 4),
        ("max_window_layers", "28"),
        ("rope_scaling", [4]),
        ("rope_parameters", "llama3"),
        ("hidden_act", ["silu"]),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        config_from_json(config("qwen2", {name: value}))


def test_a_billion_layers_are_refused_before_anything_is_made_for_each():
    for model_type in EXPECTED:
        with pytest.raises(ValueError, match="num_hidden_layers = 1000000000; expected"):
            config_from_json(config(model_type, {"num_hidden_layers": 10**9}))


def test_heads_that_do_not_divide_the_width_need_a_head_dim():
    with pytest.raises(ValueError, match="num_attention_heads = 6; hidden_size 64 is no multiple"):
        config_from_json(config("llama", {"num_attention_heads": 6}))
    assert (
        config_from_json(config("llama", {"num_attention_heads": 6, "head_dim": 8})).num_heads == 6
    )
