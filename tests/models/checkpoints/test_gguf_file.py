"""GGUF files: quantisations by their published layout, and each architecture's files."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from decant.models import open_checkpoint, save_directory
from decant.models.checkpoints.gguf_file import GgufFile
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.families import config_from_gguf
from decant.models.numerics import logits
from decant.models.parameters import parameters_by_path
from decant.models.rotary import LinearScaling, Llama3Scaling, YarnScaling
from tests import paths
from tests.making.models import CONFIG, final_states, random_decoder

GOLDEN = paths.GOLDEN / "families"


def half(block, at):
    return float(np.frombuffer(block, np.float16, 1, at)[0])


def q4_k(block):
    """256 weights in 144 bytes: two half floats, eight 6-bit scales and minima, 4-bit codes.

    Weight i of group g is scale · s_g · code − minimum · m_g.
    """
    scale, minimum, packed, codes = half(block, 0), half(block, 2), block[4:16], block[16:]
    weights = []
    for group in range(8):
        s, m = scales_and_minima(packed, group)
        # Two groups share 32 bytes: the first has the low halves, the second the high ones.
        shared = codes[32 * (group // 2) : 32 * (group // 2) + 32]
        for byte in shared:
            code = byte >> 4 if group % 2 else byte & 15
            weights.append(scale * s * code - minimum * m)
    return weights


def q6_k(block):
    """256 weights in 210 bytes: low 4 bits, high 2 bits, 16 signed 8-bit scales, a half float."""
    low, high = block[:128], block[128:192]
    scales, scale = np.frombuffer(block, np.int8, 16, 192), half(block, 208)
    weights = []
    for i in range(256):
        side, within = divmod(i, 128)  # each half of the block has its own bytes
        quarter, column = divmod(within, 32)
        byte = low[64 * side + 32 * (quarter % 2) + column]
        four = byte >> 4 if quarter >= 2 else byte & 15
        two = high[32 * side + column] >> 2 * quarter & 3
        weights.append(scale * int(scales[i // 16]) * ((four | two << 4) - 32))
    return weights


def scales_and_minima(packed, group):
    """The 6-bit scale and minimum of one of eight groups, out of 12 bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    low = packed[group + 4]
    return (
        (low & 15) | (packed[group - 4] >> 6) << 4,
        (low >> 4) | (packed[group] >> 6) << 4,
    )


def q5(block, at):
    """32 codes of 5 bits: fifth bits in four bytes at `at`, then low bits in 16 bytes."""
    fifth, codes = int.from_bytes(block[at : at + 4], "little"), block[at + 4 :]
    low = [byte & 15 for byte in codes] + [byte >> 4 for byte in codes]
    return [four | (fifth >> i & 1) << 4 for i, four in enumerate(low)]


def q5_0(block):
    """32 weights in 22 bytes: a half float, 5-bit codes around 16."""
    return [half(block, 0) * (code - 16) for code in q5(block, 2)]


def q5_1(block):
    """32 weights in 24 bytes: scale and minimum as half floats, 5-bit codes."""
    return [half(block, 0) * code + half(block, 2) for code in q5(block, 4)]


def q5_k(block):
    """256 weights in 176 bytes: as Q4_K, with a fifth bit of each code in 32 bytes before them.

    Bit g of byte i is the fifth bit of weight i of group g.
    """
    scale, minimum, packed = half(block, 0), half(block, 2), block[4:16]
    fifth, codes = block[16:48], block[48:]
    weights = []
    for group in range(8):
        s, m = scales_and_minima(packed, group)
        for i in range(32):
            byte = codes[32 * (group // 2) + i]
            code = (byte >> 4 if group % 2 else byte & 15) | (fifth[i] >> group & 1) << 4
            weights.append(scale * s * code - minimum * m)
    return weights


def q2_k(block):
    """256 weights in 84 bytes: 16 bytes of 4-bit scales and minima, 2-bit codes, two half floats.

    Four codes of one byte are 32 weights apart.
    """
    groups, codes, scale, minimum = block[:16], block[16:80], half(block, 80), half(block, 82)
    weights = []
    for i in range(256):
        side, within = divmod(i, 128)
        quarter, column = divmod(within, 32)
        code = codes[32 * side + column] >> 2 * quarter & 3
        group = groups[i // 16]
        weights.append(scale * (group & 15) * code - minimum * (group >> 4))
    return weights


def q3_k(block):
    """256 weights in 110 bytes: third bits, low 2 bits, 16 6-bit scales around 32, a half float.

    A code without its third bit is 4 less.
    """
    third, codes, packed, scale = block[:32], block[32:96], block[96:108], half(block, 108)
    weights = []
    for i in range(256):
        side, within = divmod(i, 128)
        quarter, column = divmod(within, 32)
        group = i // 16
        low = packed[group] & 15 if group < 8 else packed[group - 8] >> 4
        s = (low | (packed[8 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32
        code = codes[32 * side + column] >> 2 * quarter & 3
        code -= 0 if third[column] >> (4 * side + quarter) & 1 else 4
        weights.append(scale * s * code)
    return weights


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def halves_of(codes, table):
    """The table's values at the low halves of all bytes, then at their high halves."""
    return [table[byte & 15] for byte in codes] + [table[byte >> 4] for byte in codes]


def iq4_nl(block):
    """32 weights in 18 bytes: a half float, 4-bit numbers of entries of a table."""
    return [half(block, 0) * value for value in halves_of(block[2:], IQ4)]


def iq4_xs(block):
    """256 weights in 136 bytes: a half float, eight 6-bit scales around 32, 4-bit codes."""
    high, low, codes = int.from_bytes(block[2:4], "little"), block[4:8], block[8:]
    weights = []
    for group in range(8):
        s = (low[group // 2] >> 4 * (group % 2) & 15) | (high >> 2 * group & 3) << 4
        values = halves_of(codes[16 * group : 16 * group + 16], IQ4)
        weights += [half(block, 0) * (s - 32) * value for value in values]
    return weights


def mxfp4(block):
    """32 weights in 17 bytes: a power of two, biased by 127, and 4-bit floats (E2M1)."""
    return [2.0 ** (block[0] - 127) * value for value in halves_of(block[1:], FP4)]


@pytest.mark.parametrize(
    ("kind", "size", "halves", "layout"),
    [
        (Kind.Q4_K, 144, (0, 2), q4_k),
        (Kind.Q6_K, 210, (208,), q6_k),
        (Kind.Q5_0, 22, (0,), q5_0),
        (Kind.Q5_1, 24, (0, 2), q5_1),
        (Kind.Q5_K, 176, (0, 2), q5_k),
        (Kind.Q2_K, 84, (80, 82), q2_k),
        (Kind.Q3_K, 110, (108,), q3_k),
        (Kind.IQ4_NL, 18, (0,), iq4_nl),
        (Kind.IQ4_XS, 136, (0,), iq4_xs),
        (Kind.MXFP4, 17, (), mxfp4),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else "",
)
def test_a_quantisation_is_read_as_its_layout_says(tmp_path, kind, size, halves, layout):
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2, size)).astype(np.uint8)
    for at in halves:
        scales = np.random.default_rng(at).uniform(-0.1, 0.1, (3, 2)).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind is Kind.MXFP4:
        blocks[..., 0] = blocks[..., 0] % 16 + 115
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("weight", blocks.reshape(3, 2 * size), raw_dtype=kind)
    write_out(writer)
    read = GgufFile(tmp_path / "model.gguf").read("weight")
    expected = [[w for block in row for w in layout(block.tobytes())] for row in blocks]
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_read_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 0x7F00, (3, 32)).astype(np.uint16)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("weight", bits.view(np.uint8), raw_dtype=Kind.BF16)
    write_out(writer)
    read = GgufFile(tmp_path / "model.gguf").read("weight")
    np.testing.assert_array_equal(read.view(np.uint32), bits.astype(np.uint32) << 16)


def test_a_quantisation_that_we_cannot_read_is_refused_by_name(tmp_path):
    blocks = np.zeros((3, 66), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("weight", blocks, raw_dtype=Kind.IQ2_XXS)
    write_out(writer)
    with pytest.raises(ValueError, match=r"is quantised as IQ2_XXS; only F32, .*Q5_K"):
        GgufFile(tmp_path / "model.gguf").read("weight")


def write_out(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
OLMO = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMA = OLMO | {"pre_feedforward_layernorm": "ffn_norm"}
EXPERTS = {"w1": "gate", "w3": "up", "w2": "down"}


def converted(directory, path, *, architecture, extra=None, interleave=False, more=None):
    """A Hugging Face directory as llama.cpp's converter writes it, in float32."""
    fields = json.loads((directory / "config.json").read_text())
    files = SafetensorsFiles(directory)
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    head_dim = fields.get("head_dim", fields["hidden_size"] // heads)
    gemma = architecture.startswith("gemma")
    renamed = {"olmo2": OLMO, "gemma2": GEMMA, "gemma3": GEMMA}
    names = NAMES | renamed.get(architecture, {})
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    rope = fields.get("rope_parameters") or fields
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    if architecture == "granite":
        writer.add_attention_scale(fields["attention_multiplier"])
        writer.add_embedding_scale(fields["embedding_multiplier"])
        writer.add_residual_scale(fields["residual_multiplier"])
        writer.add_logit_scale(fields["logits_scaling"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(fields["vocab_size"])
    for name, value in (more or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{name}", value)
    if "num_experts_per_tok" in fields:
        writer.add_expert_count(fields.get("num_experts") or fields["num_local_experts"])
        writer.add_expert_used_count(fields["num_experts_per_tok"])
        if "moe_intermediate_size" in fields:
            writer.add_expert_feed_forward_length(fields["moe_intermediate_size"])
    experts = {}
    for name in files.shapes:
        array = np.asarray(files.read(name), np.float32)
        stem, _, kind = name.rpartition(".")
        if gemma and stem.endswith("norm"):
            array = array + 1
        if ".experts." in stem:
            _, _, layer, _, _, expert, part = stem.split(".")
            part = EXPERTS.get(part, part.split("_")[0])
            merged = experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", {})
            merged[int(expert)] = array
            continue
        if interleave and ("q_proj" in stem or "k_proj" in stem):
            apart = (heads if "q_proj" in stem else kv_heads, 2, head_dim // 2, -1)
            array = array.reshape(apart).swapaxes(1, 2).reshape(array.shape)
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{names[part]}.{kind}", array)
        else:
            writer.add_tensor(f"{NAMES[stem]}.{kind}", array)
    for name, by_number in experts.items():
        writer.add_tensor(name, np.stack([by_number[i] for i in range(len(by_number))]))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    write_out(writer)
    return path


def logits_of(model):
    tokens = np.arange(20, dtype=np.int32)[None] * 7 % model.config.vocab_size
    hidden, _ = model(tokens, np.ones_like(tokens), np.arange(20, dtype=np.int32)[None])
    return logits(hidden[0], model.unembedding(), softcap=None)


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        *(("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("qwen3_moe", "qwen3moe")),
        *(("smollm3", "smollm3"), ("olmo2", "olmo2"), ("mixtral", "llama")),
        ("granite", "granite"),
    ],
)
def test_an_architecture_is_read_as_the_checkpoint_it_was_made_from(tmp_path, case, architecture):
    original = open_checkpoint(GOLDEN / case).load()
    # The converter writes windows of OLMo only.
    original.config = dataclasses.replace(original.config, windows=(None,))
    original.blocks.config = original.config
    interleave = architecture in ("llama", "smollm3", "granite")
    path = converted(
        GOLDEN / case, tmp_path / "model.gguf", architecture=architecture, interleave=interleave
    )
    model = open_checkpoint(path).load()
    names = ("norm_eps", "residual_multiplier", "score_multiplier")  # float32 in GGUF
    rounded = {name: getattr(model.config, name) for name in names}
    assert model.config == dataclasses.replace(original.config, **rounded)
    for name, value in rounded.items():
        assert value is None or value == pytest.approx(getattr(original.config, name))
    np.testing.assert_allclose(logits_of(model), logits_of(original), rtol=1e-5, atol=1e-5)


GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def test_gpt_2_is_read_as_the_checkpoint_it_was_made_from(tmp_path):
    files = SafetensorsFiles(GOLDEN / "gpt2")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_context_length(48)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(80)
    for name in files.shapes:
        array = np.asarray(files.read(name), np.float32)
        stem, _, kind = name.rpartition(".")
        layer, stem = stem.split(".", 3)[2:] if ".h." in stem else (None, stem)
        if kind == "weight" and ".c_" in f".{stem}":
            array = np.ascontiguousarray(array.T)
        writer.add_tensor(f"{f'blk.{layer}.' if layer else ''}{GPT2[stem]}.{kind}", array)
    write_out(writer)
    model = open_checkpoint(tmp_path / "model.gguf").load()
    original = parameters_by_path(open_checkpoint(GOLDEN / "gpt2").load())
    for path, ours in parameters_by_path(model).items():
        np.testing.assert_array_equal(ours[...], original[path][...])
    expected = files.config
    assert model.config == dataclasses.replace(expected, norm_eps=model.config.norm_eps)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3"])
def test_gemmas_files_hold_one_more_than_each_norms_weight(tmp_path, architecture):
    original = open_checkpoint(GOLDEN / architecture).load()
    c = original.config
    more = {"gemma2": gemma2_fields, "gemma3": gemma3_fields}.get(architecture, lambda _: {})(c)
    path = converted(
        GOLDEN / architecture, tmp_path / "model.gguf", architecture=architecture, more=more
    )
    model = open_checkpoint(path).load()
    # llama.cpp knows the scale of the scores and the windows' pattern of published sizes only.
    known = {} if architecture == "gemma" else {"query_scalar": float(c.head_dim)}
    if architecture == "gemma3":
        known["windows"] = (*[c.windows[0]] * 5, None)
    expected = dataclasses.replace(c, norm_eps=model.config.norm_eps, **known)
    assert model.config == expected
    original.config = original.blocks.config = expected
    ours, theirs = logits_of(model), logits_of(original)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def gemma2_fields(config):
    return {
        "attn_logit_softcapping": float(config.attention_softcap),
        "final_logit_softcapping": float(config.final_softcap),
        "attention.sliding_window": config.windows[0],
    }


def gemma3_fields(config):
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    local = {"rope.freq_base_swa": float(config.window_rope_theta)}
    return {"attention.sliding_window": config.windows[0]} | scaling | local


def test_a_file_of_olmos_architecture_that_has_windows_is_olmo_3():
    metadata = {"tokens": 80} | {
        f"olmo2.{name}": value
        for name, value in {
            "attention.head_count": 4,
            "embedding_length": 32,
            "feed_forward_length": 40,
            "block_count": 4,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "context_length": 128,
            "rope.freq_base": 5e5,
            "attention.sliding_window": 6,
        }.items()
    }
    metadata["general.architecture"] = "olmo2"
    config = config_from_gguf(metadata, ["output.weight"])
    assert (config.family, config.layer_windows) == ("olmo3", (6, 6, 6, None))
    metadata["olmo2.attention.sliding_window_pattern"] = [True, False, True, False]
    assert config_from_gguf(metadata, ["output.weight"]).windows == (6, None)
    metadata["olmo2.attention.sliding_window_pattern"] = [True]
    with pytest.raises(ValueError, match="expected true or false for each block"):
        config_from_gguf(metadata, ["output.weight"])


def scaled(**fields):
    metadata = {
        "attention.head_count": 4,
        "embedding_length": 32,
        "feed_forward_length": 40,
        "block_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 512,
        **{f"rope.scaling.{name}": value for name, value in fields.items()},
    }
    known = {"general.architecture": "qwen3", "tokens": 80}
    return config_from_gguf(known | {f"qwen3.{n}": v for n, v in metadata.items()}, [])


def test_a_stated_scaling_is_read():
    assert scaled(type="none").rope_scaling is None
    assert scaled(type="linear", factor=8.0).rope_scaling == LinearScaling(8.0)
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    plain = scaled(**yarn, finetuned=True).rope_scaling
    # YaRN's temperature for a factor of 4: 0.1 · ln 4 + 1.
    assert plain.attention_factor == pytest.approx(1.1386294361)
    assert dataclasses.replace(plain, attention_factor=1.0) == YarnScaling(4.0, 128)
    other = scaled(**yarn, yarn_beta_fast=16.0, attn_factor=2.0).rope_scaling
    assert other.attention_factor == pytest.approx(2 * 1.1386294361)
    assert other.beta_fast == 16.0
    with pytest.raises(ValueError, match=r"rope.scaling.type = 'longrope' is not supported"):
        scaled(type="longrope")
    with pytest.raises(ValueError, match=r"'rope.scaling.factor' is missing"):
        scaled(type="linear")


def test_llama_3s_scaling_is_recovered_from_the_divisors_of_frequencies(tmp_path):
    scaling = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(CONFIG, rope_theta=500_000.0, rope_scaling=scaling)
    save_directory(random_decoder(config), tmp_path / "hf", {})
    original = open_checkpoint(tmp_path / "hf").load()
    # Wavelengths of 6, 167, 4443 and 118,143 positions: up to 8192 / 4 kept, from 8192 divided.
    ratio = 8192 * 500_000**-0.5 / (2 * np.pi)
    kept = (ratio - 1) / (4 - 1)
    divisors = np.array([1, 1, 1 / ((1 - kept) / 32 + kept), 32], np.float32)
    path = converted(
        tmp_path / "hf",
        tmp_path / "model.gguf",
        architecture="llama",
        extra={"rope_freqs.weight": divisors},
        interleave=True,
    )
    model = open_checkpoint(path).load()
    assert model.config.rope_scaling == scaling
    np.testing.assert_allclose(final_states(model), final_states(original), rtol=1e-5, atol=1e-5)


def test_divisors_that_are_not_llama_3s_are_refused(tmp_path):
    save_directory(random_decoder(CONFIG), tmp_path / "hf", {})
    path = converted(
        tmp_path / "hf",
        tmp_path / "model.gguf",
        architecture="llama",
        extra={"rope_freqs.weight": np.array([1, 1, 2, 8], np.float32)},
        interleave=True,
    )
    with pytest.raises(ValueError, match=r"rope_freqs.weight: not the scaling of Llama 3.1 to 3.3"):
        _ = open_checkpoint(path).config


@pytest.mark.parametrize("architecture", ["starcoder2", "phi2", "deepseek", "mixtral"])
def test_architectures_that_we_cannot_read_are_refused_by_name(tmp_path, architecture):
    path = converted(GOLDEN / "llama", tmp_path / "model.gguf", architecture=architecture)
    with pytest.raises(ValueError, match=rf"general.architecture is '{architecture}'"):
        _ = open_checkpoint(path).config
