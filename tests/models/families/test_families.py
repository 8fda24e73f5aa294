"""Each family against the results of Hugging Face transformers on the same tiny checkpoint.

tests/golden/families/make.py (`make golden`) makes the golden files: each document alone, in
float32, with eager attention. Here the documents are packed in rows, and longer than the windows.

Both sides sum the same float32 products in different orders. So logits of up to 15 differ by up to
1.4e-5, states by 8e-6, probabilities by 3.1e-6; the tolerances are two to three times that. Of
forty mutations of the code, the smallest (eps doubled) changes logits by 1.5e-3, most by 1 to 10.
The next smallest are gelu without its tanh approximation and a window longer by one. Linear
attention norms its outputs, small ones too: transformers' two ways of computing it give logits that
differ by up to 9e-5, so ten times the tolerance holds for models that have it.
"""

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from decant.models import open_checkpoint, save_directory
from decant.models.checkpoints.adapters import adapted_matrices
from decant.models.checkpoints.cut import cut_layers
from decant.models.decoder.decoder import Decoder
from decant.models.families import config_from_json, config_to_json
from decant.models.mesh.execution import WITHOUT_MESH
from decant.models.numerics import logits
from decant.models.parameters import parameters_by_path
from tests import paths

GOLDEN = paths.GOLDEN / "families"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
# They differ from another case by a switch or by the names of tensors. `make test-all` runs them.
VARIANTS = {
    "deepseek_v3_halves",
    "glm",
    "glm4_moe_lite",
    "gpt_neox_sequential",
    "llama_linear",
    "qwen3_5_moe",
    "qwen3_moe_unnormalised",
    "tower_gemma4",
    "tower_ministral3",
    "tower_mistral3",
    "tower_kimi_k25",
    "tower_qwen2_5_vl",
    "tower_qwen3_5",
    "youtu",
}
# No rotary positions, and families that version 4 of transformers never wrote so.
NEWER = {"gpt2", "gemma4", "gemma4_moe", "tower_gemma4"}
RUN = [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in CASES]
HYBRIDS = {"qwen3_next", "qwen3_5", "qwen3_5_moe", "tower_qwen3_5"}
# Document 0 fills the first row; 1 and 2 share the second with padding.
ROWS = (((0, 24),), ((1, 9), (2, 12)))


def packed(golden):
    tokens, segments, positions = (np.zeros((2, 24), np.int32) for _ in range(3))
    for row, documents in enumerate(ROWS):
        start = 0
        for segment, (i, length) in enumerate(documents, 1):
            at = np.s_[row, start : start + length]
            tokens[at], segments[at], positions[at] = golden[f"tokens_{i}"], segment, range(length)
            start += length
    return tokens, segments, positions


def documents(array, *, axis):
    """Each document's number and its part of a packed array, whose axis `axis` is time."""
    array = np.asarray(array)
    for row, lengths in enumerate(ROWS):
        start = 0
        for i, length in lengths:
            yield i, np.take(array[row], range(start, start + length), axis=axis - 1)
            start += length


@nnx.jit
def everything(model, tokens, segments, positions):
    layers = range(model.config.num_layers + 1)
    final, hidden = model(tokens, segments, positions, hidden_layers=tuple(layers))
    sources = model.config.key_sources
    maps = (
        {}
        if model.config.stream_copies > 1
        else {
            i: model.attention_maps(
                hidden[i], segments, positions, layer=i, key_states=hidden[sources[i]]
            )
            for i, linear in enumerate(model.config.layers_linear)
            if not linear
        }
    )
    flat = final.reshape(-1, final.shape[-1])
    z = logits(flat, model.unembedding(), softcap=model.config.final_softcap)
    return z.reshape(*tokens.shape, -1), hidden, maps


@cache
def case(name):
    golden = dict(np.load(GOLDEN / name / "golden.npz"))
    model = open_checkpoint(GOLDEN / name).load()
    return golden, model, everything(model, *packed(golden))


def close(name, ours, theirs, *, atol):
    factor = 10 if name in HYBRIDS else 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=factor * atol)


@pytest.mark.parametrize("name", RUN)
def test_logits_are_those_of_transformers(name):
    golden, _, (ours, _, _) = case(name)
    for i, mine in documents(ours, axis=1):
        close(name, mine, golden[f"logits_{i}"], atol=3e-5)
        assert np.abs(mine).max() > 4


@pytest.mark.parametrize("name", RUN)
def test_hidden_states_of_every_layer_are_those_of_transformers(name):
    golden, model, (_, hidden, _) = case(name)
    assert sorted(hidden) == list(range(model.config.num_layers + 1))
    for layer, states in hidden.items():
        for i, mine in documents(states, axis=1):
            close(name, mine, golden[f"hidden_{i}"][layer], atol=2e-5)


@pytest.mark.parametrize("name", RUN)
def test_attention_maps_of_every_block_are_those_of_transformers(name):
    golden, _, (_, _, maps) = case(name)
    for place, of_block in enumerate(maps.values()):
        for row, lengths in enumerate(ROWS):
            # Nothing outside a document's own square, and nothing beyond its windows.
            expected, start = np.zeros((4, 24, 24), np.float32), 0
            for i, length in lengths:
                inside = slice(start, start + length)
                expected[:, inside, inside] = golden[f"maps_{i}"][place]
                start += length
            close(name, of_block[row, :, :start], expected[:, :start], atol=6e-6)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_in_bfloat16_it_is_the_same_model_but_for_rounding(name):
    golden, _, _ = case(name)
    ours = everything(open_checkpoint(GOLDEN / name).load(dtype="bfloat16"), *packed(golden))[0]
    errors = [np.abs(mine - golden[f"logits_{i}"]) for i, mine in documents(ours, axis=1)]
    # The median, because a rounded score may choose another expert. Logits have a spread of 3.
    assert np.median(np.concatenate(errors)) < 0.05


@pytest.mark.parametrize("name", RUN)
def test_an_exported_model_opens_as_the_same_model(name, tmp_path):
    _, model, (expected, _, _) = case(name)
    save_directory(model, tmp_path, {})
    again = open_checkpoint(tmp_path)
    assert again.config == model.config
    golden, _, _ = case(name)
    np.testing.assert_array_equal(everything(again.load(), *packed(golden))[0], expected)


@pytest.mark.parametrize("name", sorted({*CASES} - NEWER))
def test_config_files_of_transformers_4_mean_the_same(name):
    """Version 4 wrote rope_theta and rope_scaling, version 5 writes rope_parameters."""
    whole = json.loads((GOLDEN / name / "config.json").read_text())
    fields = whole.get("text_config", whole)
    rope = fields.pop("rope_parameters")
    if "full_attention" in rope:
        if "gemma3" in name:
            fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if name.startswith("gpt_neox"):
        fields["rotary_pct"] = rope.pop("partial_rotary_factor")
        fields["rotary_emb_base"] = rope.pop("rope_theta")
    else:
        fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert config_from_json(whole) == case(name)[1].config
    # Before layer_types existed, other fields gave the types of blocks.
    if name not in ("granite4", "gemma3n"):
        fields.pop("layer_types", None)
    assert config_from_json(whole) == case(name)[1].config


@pytest.mark.parametrize("name", CASES)
def test_every_field_is_honoured_or_refused(name):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    with pytest.raises(ValueError, match=r"unknown field\(s\) attention_sinks"):
        config_from_json(fields | {"attention_sinks": 4})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types holds 1"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3", {"model_type": "gemma3"}, "text_config is missing"),
        ("llama3", {"rope_parameters": {"rope_type": "xpos"}}, "rope_type = 'xpos'"),
        ("llama3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "expected a 0 or 1 for each of 4 blocks"),
        ("olmo3", {"layer_types": ["attention"] * 4}, "layer_types holds 4"),
        ("olmo3", {"rope_parameters": None, "rope_theta": 1e4}, "rope_theta = 10000.0; trans"),
        ("gemma", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("granite4", {"num_local_experts": 8}, "num_local_experts = 8; only 0"),
        ("granite4", {"layer_types": ["mamba", "attention"]}, "layer_types = .*no Mamba"),
        ("granite4", {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx = True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"n_embd": 30}, "n_embd 30 is no multiple"),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v2", {"kv_lora_rank": None}, "field 'kv_lora_rank' is missing"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"n_group": 3}, "8 experts in 3 groups"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
        ("youtu", {"n_routed_experts": 8}, "n_routed_experts = 8"),
        ("qwen3_5", {"layer_types": ["full_attention"]}, "layer_types is .*for each of"),
        ("qwen3_5", {"layer_types": ["sliding_attention"] * 10}, "layer_types is"),
        ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate = False"),
        ("qwen3_5", {"linear_num_value_heads": 3}, "linear_value_heads is a multiple"),
        ("qwen3_5", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim = 0"),
        ("qwen3_5", {"num_experts": 8}, "num_experts = 8"),
        ("qwen3_next", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] is not supported"),
        ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("gemma3n", {"altup_active_idx": 1}, "altup_active_idx = 1"),
        ("gemma3n", {"altup_correct_scale": False}, "altup_correct_scale = False"),
        ("gemma3n", {"altup_num_inputs": 1}, "altup_num_inputs = 1; expected at least 2"),
        ("gemma3n", {"intermediate_size": [40] * 5 + [48]}, "blocks of several widths"),
        ("gemma3n", {"activation_sparsity_pattern": [1.0] * 6}, "sparsity_pattern = .*below 1"),
        ("gemma3n", {"num_kv_shared_layers": 5}, "block 2 reads keys and values, but none"),
        ("gemma4", {"attention_bias": True}, "attention_bias = True"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        ("gemma4", {"num_kv_shared_layers": 6}, "num_kv_shared_layers = 6; expected .* below 6"),
        ("gemma4", {"num_kv_shared_layers": 5}, "block 2 reads keys and values, but none"),
        ("gemma4", {"vocab_size_per_layer_input": 64}, "vocab_size_per_layer_input = 64"),
        ("gemma4", {"per_layer_config": {"1": {"head_dim": 16}}}, "per_layer_config"),
        ("gemma4", {"layer_types": ["sliding_attention"] * 6}, "ends with sliding_attention"),
        ("gemma4_moe", {"num_experts": None}, "field .num_experts. is missing"),
    ],
)
def test_a_model_that_we_cannot_run_is_refused_by_field(name, change, message):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        config_from_json(fields | change)


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "glm4_moe_lite"])
def test_layers_that_guess_further_tokens_are_left_out(name, tmp_path):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    extra = np.zeros((32, 64), np.float32)
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    save_file(tensors | {"model.layers.3.eh_proj.weight": extra}, folder / "model.safetensors")
    open_checkpoint(folder).load()
    save_file(tensors | {"model.layers.4.eh_proj.weight": extra}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"not expected: model.layers.4.eh_proj.weight"):
        open_checkpoint(folder).load()


def test_layers_beside_linear_attention_that_guess_further_tokens_are_left_out(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen3_next", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    extra = {"mtp.layers.0.self_attn.k_proj.weight": np.zeros((32, 32), np.float32)}
    save_file(tensors | extra, folder / "model.safetensors")
    open_checkpoint(folder).load()


def test_experts_in_one_tensor_a_block_are_the_same_experts(tmp_path):
    """Qwen3.5's files have them so; transformers writes a tensor for each expert's matrix."""
    folder = Path(shutil.copytree(GOLDEN / "qwen3_5_moe", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        at = f"model.layers.{layer}.mlp.experts"
        gates, ups, downs = (
            np.stack([tensors.pop(f"{at}.{e}.{name}_proj.weight") for e in range(6)])
            for name in ("gate", "up", "down")
        )
        tensors[f"{at}.gate_up_proj"] = np.concatenate([gates, ups], axis=1)
        tensors[f"{at}.down_proj"] = downs
    save_file(tensors, folder / "model.safetensors")
    expected = parameters_by_path(open_checkpoint(GOLDEN / "qwen3_5_moe").load())
    for path, ours in parameters_by_path(open_checkpoint(folder).load()).items():
        np.testing.assert_array_equal(ours[...], expected[path][...])


def test_blocks_of_linear_attention_have_no_maps_and_no_adapters():
    model = open_checkpoint(GOLDEN / "qwen3_next").abstract()
    row = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match=r"block 1 has linear attention.* of blocks 3 exist"):
        model.attention_maps(jnp.zeros((1, 4, 32)), row, row, layer=1)
    with pytest.raises(ValueError, match=r"student.adapter: this model has blocks of linear"):
        adapted_matrices(model, ("q_proj",))


def test_blocks_without_experts_come_first():
    config = case("glm4_moe")[1].config
    assert config.with_layers((1, 2)).dense_layers == 0
    with pytest.raises(ValueError, match=r"layers \[1, 0\]: the first 1 blocks have no experts"):
        config.with_layers((1, 0))
    with pytest.raises(ValueError, match=r"dense_layers is 1 of 1 blocks"):
        config.with_layers((0,))


def test_deepseeks_two_scales_of_yarn_mean_what_they_do_in_transformers():
    """Which of them are there decides the factor of rotations, the second that of scores."""
    fields = json.loads((GOLDEN / "deepseek_v3" / "config.json").read_text())
    rope = {n: v for n, v in fields["rope_parameters"].items() if "mscale" not in n}
    usual, less = (1 + 0.1 * m * np.log(4) for m in (1, 0.5))

    def scales(**both):
        config = config_from_json(fields | {"rope_parameters": rope | both})
        again = config_from_json(config_to_json(config))
        assert again == config
        plain = config.score_scale / config.head_dim**-0.5
        return config.rope_scaling.attention_factor, plain

    np.testing.assert_allclose(scales(), (usual, 1))
    np.testing.assert_allclose(scales(mscale=1.0), (usual, 1))
    np.testing.assert_allclose(scales(mscale_all_dim=0.5), (usual, less**2))
    np.testing.assert_allclose(scales(mscale=1.0, mscale_all_dim=0.5), (usual / less, less**2))
    np.testing.assert_allclose(scales(mscale=0.5, mscale_all_dim=0.5), (1, less**2))


def test_an_exports_two_scales_of_yarn_say_its_attention_factor_too():
    """For programs that read those two only."""
    fields = config_to_json(case("deepseek_v2")[1].config)["rope_scaling"]
    assert fields["mscale_all_dim"] == 0.6
    np.testing.assert_allclose(fields["mscale"], 0.9)


def test_the_weights_of_narrow_vectors_fit_together_or_are_refused():
    config = case("deepseek_v3")[1].config
    for change in ({"num_kv_heads": 2}, {"rotary_dim": None}, {"qk_norm": True}):
        with pytest.raises(ValueError, match="latent_dim is 20; expected as many key as query"):
            dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="query_latent_dim needs latent_dim"):
        dataclasses.replace(config, latent_dim=0)


def test_a_cap_that_is_null_is_off_and_one_that_is_absent_is_the_familys():
    fields = json.loads((GOLDEN / "gemma2" / "config.json").read_text())
    assert config_from_json(fields | {"final_logit_softcapping": None}).final_softcap is None
    del fields["final_logit_softcapping"], fields["attn_logit_softcapping"]
    config = config_from_json(fields)
    assert (config.final_softcap, config.attention_softcap) == (30.0, 50.0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"windows": (6,)}, r"family 'llama' cannot say windows = \(6,\)"),
        ("llama", {"qkv_bias": True}, r"cannot say qkv_bias = True \(but False\)"),
        ("mistral", {"windows": (6, None)}, r"cannot say windows = \(6, None\) \(but \(6,\)\)"),
        ("qwen2", {"windows": (6, 7, None)}, r"cannot say windows = \(6, 7, None\)"),
        ("qwen3", {"final_softcap": 3.0}, r"cannot say final_softcap = 3.0"),
        ("smollm3", {"qk_norm": True}, "cannot say qk_norm"),
        ("olmo2", {"pre_norms": True}, "cannot say pre_norms"),
        ("granite4", {"mlp_bias": True}, "cannot say mlp_bias"),
        ("gpt2", {"activation": "silu"}, "cannot say activation"),
        ("gpt_neox", {"learned_positions": True}, "cannot say learned_positions"),
        ("gemma2", {"norm_adds_one": False}, r"cannot say norm_adds_one"),
        ("gemma2", {"query_scalar": 6.5}, r"cannot say query_scalar = 6.5 \(but 6.0\)"),
        ("llama", {"value_dim": 12}, "cannot say value_dim = 12"),
        ("llama", {"rotary_neighbours": True}, "cannot say rotary_neighbours"),
        ("deepseek_v2", {"rotary_neighbours": False}, "cannot say rotary_neighbours"),
        ("deepseek_v3", {"group_votes": 1}, "cannot say group_votes = 1"),
        ("qwen3_5", {"attention_gate": False}, "cannot say attention_gate"),
        ("llama", {"attention_gate": True}, "cannot say attention_gate = True"),
        ("gemma4", {"value_norm": False}, "cannot say value_norm"),
        ("llama", {"full_kv_heads": 1}, "cannot say full_kv_heads = 1"),
        ("llama", {"laurel_rank": 4}, "cannot say laurel_rank = 4"),
        ("gemma3n", {"final_softcap": None}, "cannot say final_softcap = None"),
        ("gemma4", {"stream_copies": 2}, "cannot say stream_copies = 2"),
        ("gemma4", {"gate_sparsity": (0.5,)}, "cannot say gate_sparsity"),
        ("gemma4", {"layer_input_rows": 70}, "cannot say layer_input_rows = 70"),
        ("gemma3", {"layer_input_dim": 8}, "cannot say layer_input_dim = 8"),
    ],
)
def test_a_config_that_its_familys_files_cannot_express_is_not_saved(name, change, message):
    config = dataclasses.replace(case(name)[1].config, **change)
    with pytest.raises(ValueError, match=message):
        config_to_json(config)


def test_gpt_2_without_the_prefix_of_its_head_is_the_same_model(tmp_path):
    tensors = load_file(GOLDEN / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    # The masks that old files hold.
    bare["h.0.attn.bias"] = np.tri(48, dtype=np.float32)[None, None]
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / "gpt2" / "config.json").read_bytes())
    expected = parameters_by_path(open_checkpoint(GOLDEN / "gpt2").load())
    for path, ours in parameters_by_path(open_checkpoint(tmp_path).load()).items():
        np.testing.assert_array_equal(ours[...], expected[path][...])


def test_rows_longer_than_the_learned_positions_are_refused():
    model = case("gpt2")[1]
    row = np.zeros((1, 49), np.int32)
    with pytest.raises(ValueError, match="rows of 49 tokens, but the model has 48 learned"):
        model(row, row, row)


@pytest.mark.parametrize(
    ("name", "layers", "windows"),
    [
        ("gemma3", (0, 5, 6), (6, None, 6)),
        ("gpt_oss", (1, 2), (None, 6)),
        ("smollm3", (2, 3), (None, 6)),
        ("glm4_moe", (0, 2), (None, None)),
        ("glm4_moe", (1, 2), (None, None)),
        ("deepseek_v3", (0, 2), (None, None)),
        ("gemma3", (5,), (None,)),
        ("gemma2", (1, 2), (None, 6)),
        ("qwen2", (0, 1), (None, 6)),
        ("mistral", (0, 2), (6, 6)),
        ("qwen3_moe", (0, 2), (None, None)),
        ("qwen3_5", (1, 2, 7, 9, 3), (None,) * 5),
    ],
)
def test_a_cut_student_keeps_each_blocks_window_and_rotation(name, layers, windows, tmp_path):
    golden, teacher, (_, states, maps) = case(name)
    student = cut_layers(teacher, layers)
    assert student.config.layer_windows == windows
    _, segments, positions = packed(golden)
    for ours, theirs in enumerate(layers):
        if teacher.config.layers_linear[theirs]:
            continue  # it has no map
        # The teacher's states into the student's copy of the block.
        again = student.attention_maps(states[theirs], segments, positions, layer=ours)
        np.testing.assert_allclose(again, maps[theirs], atol=1e-6)
    save_directory(student, tmp_path, {})
    assert open_checkpoint(tmp_path).config == student.config


def test_a_cut_gemma_4_keeps_the_blocks_own_inputs_and_reads_the_last_keys_kept(tmp_path):
    _, teacher, _ = case("gemma4")
    assert teacher.config.key_sources == (0, 1, 2, 1, 1, 2)
    student = cut_layers(teacher, (0, 2, 4, 5))
    assert student.config.key_sources == (0, 1, 0, 1)
    assert student.config.layer_windows == (6, None, 6, None)
    for ours, theirs in enumerate((0, 2, 4, 5)):
        for name, axis in (("layer_embedding", 1), ("layer_projection", 1)):
            mine, whole = (getattr(m, name)[...] for m in (student, teacher))
            np.testing.assert_array_equal(mine.take(ours, axis), whole.take(theirs, axis))
    again = student.window_reading_blocks.query[...][0]
    np.testing.assert_array_equal(again, teacher.window_reading_blocks.query[...][1])
    save_directory(student, tmp_path, {})
    assert open_checkpoint(tmp_path).config == student.config


def test_a_cut_gemma_4_needs_the_keys_that_its_blocks_read():
    config = case("gemma4")[1].config
    with pytest.raises(ValueError, match="block 2 reads keys and values, but none of the first 2"):
        config.with_layers((0, 1, 5))
    with pytest.raises(ValueError, match=r"layers \[3, 5\]: the last 3 blocks read keys"):
        config.with_layers((3, 5))
    # Transformers would give the last block full attention.
    with pytest.raises(ValueError, match="ends with sliding_attention"):
        config_to_json(config.with_layers((0, 2, 4)))


def test_a_cut_gemma_3n_keeps_the_copies_and_which_gates_are_sparse(tmp_path):
    _, teacher, _ = case("gemma3n")
    for layers, sparsity in (((0, 2, 4, 5), (0.6, 0.8, 0.5, 0.7)), ((1, 2), (0.0, 0.8))):
        student = cut_layers(teacher, layers)
        assert student.config.layers_sparsity == sparsity
        assert student.config.reading_layers == (2 if 4 in layers else 0)
        for name in ("copy_projection", "copy_return"):
            mine, whole = (getattr(m, name)[...] for m in (student, teacher))
            np.testing.assert_array_equal(mine, whole)
        if 4 not in layers:  # two kinds of the teacher's blocks are one of the student's
            np.testing.assert_array_equal(
                student.blocks.query[...][0], teacher.window_blocks.query[...][1]
            )
        save_directory(student, tmp_path / str(len(layers)), {})
        assert open_checkpoint(tmp_path / str(len(layers))).config == student.config


def test_ids_without_inputs_of_blocks_take_those_of_the_first():
    # As transformers' whole model does; its text model takes no such ids.
    config = dataclasses.replace(case("gemma3n")[1].config, layer_input_rows=60)
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert model.layer_embedding[...].shape == (60, 6, 8)
    states, tokens = jnp.ones((1, 4, 32)), jnp.asarray([[0, 59, 60, 79]])
    inputs = np.asarray(model._layer_inputs(tokens, states, WITHOUT_MESH))
    for token in (2, 3):
        np.testing.assert_array_equal(inputs[:, :, token], inputs[:, :, 0])
    assert np.abs(inputs[:, :, 1] - inputs[:, :, 0]).max() > 1e-3


def test_attention_of_copies_has_no_maps():
    golden, model, (_, hidden, _) = case("gemma3n")
    _, segments, positions = packed(golden)
    assert model.config.blocks_with_maps == ()
    with pytest.raises(ValueError, match="block 1 reads copies of the residual stream"):
        model.attention_maps(hidden[1], segments, positions, layer=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_sparsity": (1.0,)}, r"gate_sparsity is \(1.0,\); expected"),
        ({"num_experts": 4, "experts_per_token": 2}, "needs a gated MLP, and no experts"),
        ({"stream_copies": 0}, "stream_copies is 0; expected a whole number from 1"),
    ],
)
def test_sparse_gates_and_copies_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(case("gemma3n")[1].config, **change)


def test_keys_and_values_that_are_not_used_may_stay_in_a_file(tmp_path):
    tensors = load_file(GOLDEN / "gemma4" / "model.safetensors")
    extra = {"model.layers.3.self_attn.k_proj.weight": np.zeros((16, 32), np.float32)}
    folder = Path(shutil.copytree(GOLDEN / "gemma4", tmp_path / "model"))
    save_file(tensors | extra, folder / "model.safetensors")
    open_checkpoint(folder).load()
    own = "model.layers.1.self_attn.k_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != own}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing: {own}"):
        open_checkpoint(folder).load()


def test_maps_of_blocks_that_read_keys_need_the_input_of_those_that_make_them():
    golden, model, (_, hidden, _) = case("gemma4")
    _, segments, positions = packed(golden)
    assert model.config.blocks_with_maps == (0, 1, 2)
    with pytest.raises(ValueError, match="block 3 reads the keys of block 1"):
        model.attention_maps(hidden[3], segments, positions, layer=3)
