"""Fields of a config that cannot change the function: by their name, or by a neutral value."""

from __future__ import annotations

from typing import Any

# Where the model comes from and who made it.
_ORIGIN = (
    *("_commit_hash", "_name_or_path", "name_or_path", "model_name", "model_type"),
    *("architectures", "auto_map", "custom_pipelines", "is_llama_config", "transformers_version"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "finetuning_task"),
)
# How the same function is stored, computed or returned.
_EXECUTION = (
    *("dtype", "torch_dtype", "use_bfloat16", "torchscript", "chunk_size_feed_forward"),
    *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("attn_implementation", "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attn"),
    *("use_flash_attention_2", "_experts_implementation", "_experts_implementation_internal"),
    *("experts_implementation", "pretraining_tp", "use_cache", "cache_implementation"),
    *("keys_to_ignore_at_inference", "return_dict", "use_return_dict", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "is_decoder"),
)
# What only training uses.
_TRAINING = (
    *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout"),
    *("dropout", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop"),
    *("gradient_checkpointing", "use_gradient_checkpointing", "initializer_range", "loss_type"),
    *("aux_loss_alpha", "router_aux_loss_coef", "router_z_loss_coef", "tf_legacy_loss"),
)
# Heads of classifiers: their tensors would be unknown, and so refused.
_CLASSIFIERS = ("id2label", "label2id", "num_labels", "problem_type", "task_specific_params")
# Tokens and lengths, which the tokenizer's files and max_position_embeddings decide.
_TOKENS = (
    *("bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id"),
    *("pad_token_id", "sep_token_id", "unk_token_id", "prefix", "tokenizer_class"),
    *("tokenizer_model_max_length", "tokenizer_padding_side", "model_max_length"),
    *("max_seq_len", "max_seq_length", "max_sequence_length"),
)
# How text is drawn from the model's probabilities: the fields of transformers' GenerationConfig.
_SAMPLING = (
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("bad_words_ids", "begin_suppress_tokens", "cache_config", "compile_config", "constraints"),
    *("disable_compile", "diversity_penalty", "do_sample", "dola_layers", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff"),
    *("eta_cutoff", "exponential_decay_length_penalty", "force_words_ids"),
    *("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "generation_config"),
    *("guidance_scale", "is_assistant", "length_penalty", "low_memory", "max_length"),
    *("max_matching_ngram_size", "max_new_tokens", "max_time", "min_length", "min_new_tokens"),
    *("min_p", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_logits", "output_scores"),
    *("penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values"),
    *("renormalize_logits", "repetition_penalty", "return_dict_in_generate", "sequence_bias"),
    *("stop_strings", "suppress_tokens", "target_lookbehind", "temperature", "token_healing"),
    *("top_h", "top_k", "top_p", "typical_p", "watermarking_config"),
)
NEVER_CHANGE = frozenset((*_ORIGIN, *_EXECUTION, *_TRAINING, *_CLASSIFIERS, *_TOKENS, *_SAMPLING))
"""Names of fields that never change the function, whatever their values."""

# A multiplier of this kind is off at 1, any other number at 0.
_MULTIPLIER = ("factor", "multiplier", "pct", "ratio", "scale", "scaling")
# Every family here turns queries and keys, looks back only, scales its scores and adds to a
# residual stream. No tensor shows it, so a field that denies it must not pass as "switched off".
_ALWAYS = ("causal", "position", "residual", "rope", "rotary")
# A scale of the scores takes the place of 1/√head_dim, so 1 is not neutral.
_SCORES = ("attention", "attn", "query", "softmax")


def is_harmless(name: str, value: Any) -> bool:
    """Whether a field that no family reads leaves the function as it is.

    It does if its name is in NEVER_CHANGE, or its value says that its feature is off. A feature
    that has tensors is found by those: a checkpoint must have exactly the tensors that its config
    calls for.
    """
    if name in NEVER_CHANGE or value is None or value in ("", [], {}):
        return True
    if not isinstance(value, (bool, int, float)):
        return False
    if any(word in name for word in _MULTIPLIER):
        scores = any(word in name for word in _SCORES) and "factor" not in name
        return value == 1 and not isinstance(value, bool) and not scores
    return value == 0 and not any(word in name for word in _ALWAYS)
