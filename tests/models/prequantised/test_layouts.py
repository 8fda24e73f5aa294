"""Every layout against the weights that it stands for, worked out in float64 from its description.

tests/making/quantised.py writes both, element by element, without our code.
"""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16, float8_e8m0fnu

from decant.models.prequantised import matrix, mxfp4
from decant.models.prequantised.scheme import read_scheme
from decant.models.prequantised.stored import InFile, full_index
from tests.making import quantised
from tests.making.safetensors_bytes import DTYPES

SHAPE = (48, 64)


def packs(**how) -> dict[str, Any]:
    """quantization_config of compressed-tensors with one group of all Linear modules."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"} | how
    kinds = {"int": "pack-quantized", "float": "float-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds[weights["type"]],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
INT8 = packs(num_bits=8, strategy="channel") | {"format": "int-quantized"}

LAYOUTS = {
    # 48 and 64 are no multiples of 20 and 24: the last blocks are smaller.
    "fp8 blocks": (
        FP8 | {"weight_block_size": [20, 24]},
        lambda d: quantised.fp8_blocks(d, "m", SHAPE, block=(20, 24)),
    ),
    "fp8 tensor": (
        FP8 | {"weight_block_size": None},
        lambda d: quantised.fp8_scaled(d, "m", SHAPE, per="number", suffix="weight_scale_inv"),
    ),
    "fp8 exponents": (
        FP8,
        lambda d: quantised.fp8_scaled(
            d, "m", SHAPE, per="channel", suffix="weight_scale_inv", dtype=float8_e8m0fnu
        ),
    ),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8"},
        lambda d: quantised.fp8_scaled(d, "m", SHAPE, per="channel"),
    ),
    "float-quantized tensor": (
        packs(num_bits=8, type="float", strategy="tensor"),
        lambda d: quantised.fp8_scaled(d, "m", SHAPE, per="tensor", dtype=bfloat16),
    ),
    "float-quantized channel": (
        packs(num_bits=8, type="float", strategy="channel"),
        lambda d: quantised.fp8_scaled(d, "m", SHAPE, per="channel", dtype=bfloat16),
    ),
    **{
        f"pack-quantized {bits} {strategy} {'' if symmetric else 'zeros'} {'order' * order}": (
            packs(num_bits=bits, strategy=strategy, group_size=size, symmetric=symmetric),
            lambda d, b=bits, t=strategy, s=size, y=symmetric, o=order: quantised.compressed_int(
                d, "m", SHAPE, bits=b, strategy=t, size=s or 0, symmetric=y, order=o
            ),
        )
        for bits, strategy, size, symmetric, order in (
            (4, "group", 16, True, False),
            (4, "group", 16, False, False),
            (4, "group", 16, True, True),
            (4, "group", 16, False, True),
            (4, "channel", None, True, False),
            (4, "channel", None, False, False),
            (8, "group", 32, True, False),
            (8, "tensor", None, True, False),
        )
    },
    **{
        f"int-quantized {strategy} {'' if symmetric else 'zeros'}": (
            packs(num_bits=8, strategy=strategy, group_size=size, symmetric=symmetric)
            | {"format": "int-quantized"},
            lambda d, t=strategy, s=size, y=symmetric: quantised.compressed_int(
                d, "m", SHAPE, bits=8, strategy=t, size=s or 0, symmetric=y, pack=False
            ),
        )
        for strategy, size, symmetric in (
            ("channel", None, True),
            ("channel", None, False),
            ("tensor", None, True),
            ("group", 16, False),
        )
    },
    **{
        f"gptq v{version} {bits} bits {'order' * order}": (
            GPTQ
            | {"bits": bits, "desc_act": order}
            | ({} if version == 1 else {"checkpoint_format": "gptq_v2"}),
            lambda d, b=bits, v=version, o=order: quantised.gptq(
                d, "m", SHAPE, bits=b, size=16, version=v, order=o
            ),
        )
        for version, bits, order in (
            (1, 4, False),
            (1, 4, True),
            (1, 8, False),
            (2, 4, False),
            (2, 8, True),
            (2, 2, False),
        )
    },
    "gptq one group": (
        GPTQ | {"group_size": -1},
        lambda d: quantised.gptq(d, "m", SHAPE, bits=4, size=64),
    ),
    "awq": (AWQ, lambda d: quantised.awq(d, "m", SHAPE, size=16)),
    "awq one group": (AWQ | {"group_size": -1}, lambda d: quantised.awq(d, "m", SHAPE, size=64)),
    "mxfp4": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        lambda d: quantised.mxfp4(d, "m", (3, 24, 64)),
    ),
}


def header(tensors):
    return {n: InFile(DTYPES[str(a.dtype)], a.shape) for n, a in tensors.items()}


def scheme(config):
    found = read_scheme(json.loads(json.dumps({"quantization_config": config})))
    assert found is not None
    return found


def found(name):
    """The one weight of a layout, the function that reads its tensors, and its plain values."""
    config, make = LAYOUTS[name]
    tensors, plain = make(np.random.default_rng(0))
    asked = []

    def read(tensor, index):
        array = tensors[tensor] if index is None else tensors[tensor][index]
        asked.append(array.nbytes)
        return array

    stored, others = scheme(config).plain(header(tensors))
    assert others == []
    (weight,) = stored.values()
    assert set(stored) == {"m" if name == "mxfp4" else "m.weight"}
    return weight, read, plain, asked


@pytest.mark.parametrize("name", LAYOUTS)
def test_dequantised_weights_are_those_of_the_layouts_formula(name):
    weight, read, plain, _ = found(name)
    assert weight.shape == plain.shape
    whole = weight.read(read, full_index(plain.shape))
    # Rounded once: to float32, from the exact product.
    np.testing.assert_array_equal(whole.astype(np.float32), plain.astype(np.float32))
    assert len(np.unique(plain)) > 40


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_share_has_the_bits_of_the_whole(name, monkeypatch):
    # A few elements at once, so that every share takes several steps.
    monkeypatch.setattr(matrix, "AT_ONCE", 100)
    monkeypatch.setattr(mxfp4, "AT_ONCE", 100)
    weight, read, plain, asked = found(name)
    draw = np.random.default_rng(1)
    for _ in range(20):
        pairs = [sorted(draw.integers(0, n + 1, 2)) for n in plain.shape]
        index = tuple(slice(int(a), int(b)) for a, b in pairs)
        part = weight.read(read, index)
        np.testing.assert_array_equal(part.astype(np.float32), plain[index].astype(np.float32))
    asked.clear()
    weight.read(read, full_index(plain.shape))
    everything = sum(asked)
    asked.clear()
    half = tuple(slice(0, n // 2) for n in plain.shape)
    weight.read(read, half)
    assert sum(asked) < 0.6 * everything


REFUSED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bitsandbytes of old": ({"load_in_8bit": True}, "bitsandbytes"),
    "hqq": ({"quant_method": "hqq"}, "hqq"),
    "no method": ({"bits": 4}, r"\{'bits': 4\}"),
    "not an object": ("fp8", "'fp8'; expected an object"),
    "awq gemv": (AWQ | {"version": "gemv"}, "version = 'gemv'; only the gemm layout"),
    "awq 8 bits": (AWQ | {"bits": 8}, "bits = 8"),
    "awq without zero points": (AWQ | {"zero_point": False}, "zero_point = False"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    "nvfp4": (packs() | {"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized'"),
    "sparse": (packs() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "rotated": (packs() | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "3 bits": (packs(num_bits=3), "num_bits = 3"),
    "fp4": (packs(type="float"), "num_bits = 4; floats are read with 8 bits only"),
    "no group size": (packs(), "group_size = None; expected a whole number"),
    "blocks": (FP8 | {"weight_block_size": [128]}, r"weight_block_size = \[128\]; expected two"),
    "names": (FP8 | {"modules_to_not_convert": "lm_head"}, "expected a list of names"),
    "a broken pattern": (packs(group_size=16) | {"ignore": ["re:("]}, "not an expression"),
    "a slow pattern": (packs(group_size=16) | {"ignore": ["re:(a+)+$"]}, "a shorter pattern"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_here_is_refused_by_name(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"config.json: quantization_config.*{message}"):
        scheme(config)


def test_a_method_that_is_refused_comes_with_the_remedy():
    with pytest.raises(ValueError, match=r"quantised by bitsandbytes. Take the unquantised .*gguf"):
        scheme({"quant_method": "bitsandbytes"})


def test_the_text_of_a_model_of_images_may_say_itself_how_its_weights_are_stored():
    """As Kimi K2.5's config.json does."""
    own = {"quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(ValueError, match=r"text_config.quantization_config: quantised by bitsand"):
        read_scheme({"model_type": "kimi_k25", "text_config": own})
    assert read_scheme({"model_type": "kimi_k25", "text_config": {}}) is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8 blocks", {"m.weight_scale_inv": (2, 3)}, r"is \(2, 3\); expected a number for the"),
        ("fp8 blocks", {"m.weight_scale_inv": None}, "needs a tensor m.weight_scale_inv"),
        ("awq", {"m.qzeros": (4, 5)}, "do not fit numbers of 4 bits in the gemm layout"),
        ("awq", {"m.scales": (5, 48), "m.qzeros": (5, 6)}, "scales for 5 groups, but 64 inputs"),
        ("awq", {"m.scales": None}, "scales is not there"),
        ("gptq v1 4 bits ", {"m.qzeros": (4, 4)}, "do not fit numbers of 2, 4 or 8 bits"),
        ("gptq v1 4 bits ", {"m.g_idx": (63,)}, "expected a group for 64 inputs"),
        ("mxfp4", {"m_scales": (3, 24, 3)}, "expected U8"),
        (
            "pack-quantized 4 group zeros ",
            {"m.weight_zero_point": None},
            "missing: the zero",
        ),
        ("pack-quantized 4 group zeros ", {"m.weight_zero_point": (48, 4)}, r"expected \(6, 4\)"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_named(name, change, message):
    config, make = LAYOUTS[name]
    tensors = header(make(np.random.default_rng(0))[0])
    for tensor, shape in change.items():
        if shape is None:
            del tensors[tensor]
        else:
            tensors[tensor] = tensors[tensor]._replace(shape=shape)
    with pytest.raises(ValueError, match=message):
        scheme(config).plain(tensors)


def test_groups_that_do_not_exist_are_refused_when_read():
    weight, read, plain, _ = found("gptq v1 4 bits order")

    def lying(tensor, index):
        return read(tensor, index) - (tensor == "m.g_idx")

    # -1 says that inputs were not reordered; below it nothing is right.
    weight.read(lying, full_index(plain.shape))

    def worse(tensor, index):
        return read(tensor, index) + 4 * (tensor == "m.g_idx")

    with pytest.raises(ValueError, match=r"m.g_idx names groups 4 to 7; there are scales for 4"):
        weight.read(worse, full_index(plain.shape))


def test_modules_follow_the_configs_rules():
    draw = np.random.default_rng(0)
    at = "model.layers.0.mlp"
    tensors = quantised.compressed_int(
        draw, f"{at}.up_proj", SHAPE, bits=4, strategy="group", size=16
    )[0]
    tensors |= quantised.compressed_int(
        draw, f"{at}.down_proj", SHAPE, bits=8, strategy="channel", pack=False
    )[0]
    tensors |= {"lm_head.weight": np.zeros(SHAPE, np.float32)}
    config: dict[str, Any] = packs(group_size=16) | {"format": "mixed-precision"}
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj$"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    }
    stored, others = scheme(config).plain(header(tensors))
    assert {name: weight.kind for name, weight in stored.items()} == {
        f"{at}.up_proj.weight": "INT4",
        f"{at}.down_proj.weight": "INT8",
    }
    assert others == ["lm_head.weight"]
    for name in (f"{at}.up_proj", "re:.*mlp.*"):
        with pytest.raises(ValueError, match=r"up_proj.weight_packed is I32; .* leaves it as it"):
            scheme(config | {"ignore": [name]}).plain(header(tensors))


@pytest.mark.parametrize("pattern", ["m", "model.layers.*.m", "up.m"])
def test_a_module_that_is_said_to_stay_plain_may_not_be_quantised(pattern):
    tensors, _ = quantised.fp8_blocks(
        np.random.default_rng(0), "model.layers.3.up.m", SHAPE, block=(16, 16)
    )
    config = FP8 | {"weight_block_size": [16, 16]}
    scheme(config | {"modules_to_not_convert": ["lm_head"]}).plain(header(tensors))
    with pytest.raises(ValueError, match=rf"modules_to_not_convert.* names {pattern!r}"):
        scheme(config | {"modules_to_not_convert": [pattern]}).plain(header(tensors))


def test_scales_of_activations_and_caches_are_no_weights():
    tensors, _ = quantised.fp8_scaled(np.random.default_rng(0), "a.q_proj", SHAPE, per="tensor")
    extra = ("a.q_proj.input_scale", "a.k_scale", "a.v_scale", "a.q_proj.activation_scale")
    tensors |= {name: np.ones(1, np.float32) for name in extra}
    stored, others = scheme(packs(num_bits=8, type="float", strategy="tensor")).plain(
        header(tensors)
    )
    assert set(stored) == {"a.q_proj.weight"}
    assert others == []


@pytest.mark.parametrize("split", [0, 1])
def test_a_share_takes_memory_for_itself_only(split, monkeypatch):
    monkeypatch.setattr(matrix, "AT_ONCE", 1 << 14)
    draw, (outputs, inputs) = np.random.default_rng(0), (2048, 1024)
    tensors = {
        "m.qweight": draw.integers(0, 2**31, (inputs // 8, outputs)).astype(np.int32),
        "m.qzeros": draw.integers(0, 2**31, (inputs // 128, outputs // 8)).astype(np.int32),
        "m.scales": np.ones((inputs // 128, outputs), np.float16),
    }
    (weight,) = scheme(GPTQ | {"group_size": 128}).plain(header(tensors))[0].values()

    def read(name, at):
        return tensors[name] if at is None else tensors[name][at]

    index = list(full_index((outputs, inputs)))
    index[split] = slice(0, index[split].stop // 8)
    tracemalloc.start()
    try:
        share = weight.read(read, tuple(index))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert share.nbytes == outputs * inputs * 4 // 8
    assert peak < 2 * share.nbytes
