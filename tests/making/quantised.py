"""Quantised tensors by name, and the plain weights that they stand for, in float64.

Written from the published layouts, element by element, and without our code.
"""

from typing import Any

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word of AWQ's gemm layout holds this one of eight columns."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp8_blocks(draw, name, shape, *, block):
    """`weight` and `weight_scale_inv`, a number for each block (a smaller one at the edges)."""
    rows, columns = shape
    codes = draw.normal(size=shape).astype(float8_e4m3fn)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales = draw.uniform(0.01, 0.3, grid).astype(np.float32)
    plain = np.empty(shape)
    for i, j in np.ndindex(*shape):
        plain[i, j] = float(codes[i, j]) * float(scales[i // block[0], j // block[1]])
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, plain


def fp8_scaled(draw, name, shape, *, per, suffix="weight_scale", dtype: Any = np.float32):
    """8-bit floats with a scale for the tensor or for each row, as compressed-tensors has them."""
    codes = draw.normal(size=shape).astype(float8_e4m3fn)
    grid = {"tensor": (1,), "number": (), "channel": (shape[0], 1)}[per]
    scales = draw.uniform(0.01, 0.3, grid).astype(dtype)
    plain = codes.astype(np.float64) * scales.astype(np.float64)
    return {f"{name}.weight": codes, f"{name}.{suffix}": scales}, plain


def packed(codes, bits, axis, columns=None):
    """Unsigned codes in 32-bit words along `axis`, the first one in the lowest bits."""
    codes = np.asarray(codes, np.uint64)
    codes = codes if axis else codes.T
    count = 32 // bits
    words = np.zeros((codes.shape[0], -(-codes.shape[1] // count)), np.uint64)
    for j in range(codes.shape[1]):
        word, place = divmod(j, count)
        source = j if columns is None else word * count + columns[place]
        words[:, word] |= codes[:, source] << np.uint64(bits * place)
    words = words.astype(np.uint32).view(np.int32)
    return np.ascontiguousarray(words if axis else words.T)


def compressed_int(
    draw, name, shape, *, bits, strategy, size=0, symmetric=True, pack=True, order=False
):
    """compressed-tensors' pack-quantized and int-quantized: scales bfloat16 [output, groups]."""
    rows, columns = shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = draw.integers(low, high, shape)
    groups = {"tensor": 1, "channel": 1, "group": columns // size if size else 0}[strategy]
    of = draw.permutation(columns) // size if order else np.arange(columns) // (size or columns)
    scales = draw.uniform(0.01, 0.3, (1 if strategy == "tensor" else rows, groups)).astype(bfloat16)
    zeros = draw.integers(low, high, scales.shape) * (not symmetric)
    plain = np.empty(shape)
    for i, j in np.ndindex(*shape):
        at = (0 if strategy == "tensor" else i, of[j])
        plain[i, j] = (int(codes[i, j]) - int(zeros[at])) * float(scales[at])
    tensors = {f"{name}.weight_scale": scales if strategy != "tensor" else scales.reshape(1)}
    if pack:
        tensors[f"{name}.weight_packed"] = packed(codes - low, bits, 1)
        tensors[f"{name}.weight_shape"] = np.array(shape, np.int64)
    else:
        tensors[f"{name}.weight"] = codes.astype(np.int8)
    if not symmetric:
        whole = zeros.astype(np.int8) if not pack else packed(zeros - low, bits, 0)
        tensors[f"{name}.weight_zero_point"] = whole
    if order:
        tensors[f"{name}.weight_g_idx"] = of.astype(np.int32)
    return tensors, plain


def gptq(draw, name, shape, *, bits, size, version=1, order=False):
    """GPTQ: `qweight` packs inputs, `qzeros` outputs; version 1 stores zero points less one."""
    outputs, inputs = shape
    codes = draw.integers(0, 2**bits, (inputs, outputs))
    groups = inputs // size
    zeros = draw.integers(1, 2**bits, (groups, outputs))
    scales = draw.uniform(0.01, 0.3, (groups, outputs)).astype(np.float16)
    of = draw.permutation(inputs) // size if order else np.arange(inputs) // size
    plain = np.empty(shape)
    for o, i in np.ndindex(*shape):
        plain[o, i] = (int(codes[i, o]) - int(zeros[of[i], o])) * float(scales[of[i], o])
    return {
        f"{name}.qweight": packed(codes, bits, 0),
        f"{name}.qzeros": packed(zeros - (version == 1), bits, 1),
        f"{name}.scales": scales,
        f"{name}.g_idx": of.astype(np.int32),
    }, plain


def awq(draw, name, shape, *, size):
    """AWQ's gemm layout: outputs are packed, in an order of their own."""
    outputs, inputs = shape
    codes = draw.integers(0, 16, (inputs, outputs))
    zeros = draw.integers(0, 16, (inputs // size, outputs))
    scales = draw.uniform(0.01, 0.3, zeros.shape).astype(np.float16)
    plain = np.empty(shape)
    for o, i in np.ndindex(*shape):
        plain[o, i] = (int(codes[i, o]) - int(zeros[i // size, o])) * float(scales[i // size, o])
    return {
        f"{name}.qweight": packed(codes, 4, 1, AWQ_COLUMNS),
        f"{name}.qzeros": packed(zeros, 4, 1, AWQ_COLUMNS),
        f"{name}.scales": scales,
    }, plain


def mxfp4(draw, name, shape):
    """A stack [experts, output, input] in MXFP4; the plain one is [experts, input, output]."""
    experts, outputs, inputs = shape
    codes = draw.integers(0, 16, shape)
    exponents = draw.integers(110, 130, (experts, outputs, inputs // 32))
    plain = np.empty((experts, inputs, outputs))
    for e, o, i in np.ndindex(*shape):
        sign = -1 if codes[e, o, i] >= 8 else 1
        value = sign * FP4[codes[e, o, i] % 8]
        plain[e, i, o] = value * 2.0 ** (int(exponents[e, o, i // 32]) - 127)
    pairs = codes.reshape(experts, outputs, inputs // 32, 16, 2)
    return {
        f"{name}_blocks": (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8),
        f"{name}_scales": exponents.astype(np.uint8),
    }, plain
