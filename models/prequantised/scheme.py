"""How a checkpoint's weights were quantised: `quantization_config` in config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from decant.models.families.field_reader import FieldReader, shown
from decant.models.prequantised import words
from decant.models.prequantised.compressed import read_compressed
from decant.models.prequantised.fp8 import FLOATS, float_matrix
from decant.models.prequantised.matrix import Matrix
from decant.models.prequantised.mxfp4 import Stack, stack
from decant.models.prequantised.names import read_names
from decant.models.prequantised.stored import Header

Stored = Matrix | Stack
"""A weight in few bits: its plain `shape`, its `kind`, the `parts` in the files, and `read`."""
FIELDS = ("quantization_config", "compression_config")
_REMEDY = (
    "Take the unquantised checkpoint, a .gguf file, or one in a format that is read: fp8, "
    "compressed-tensors, awq, gptq or mxfp4. With transformers, model.dequantize() and "
    "save_pretrained write plain weights"
)
_UNUSED = re.compile(
    r".*\.(activation_scale|(input|output|k|v|q)_(scale|zero_point|global_scale)|weight_shape)"
    r"|.*\.(weight_g_idx|g_idx)"
)
"""Tensors that only quantised activations and caches use, or that the others determine."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a checkpoint are stored."""

    identity: Mapping[str, Any]
    """All that decides what the files' numbers mean, for teacher_id."""
    weights: Callable[[Header], Mapping[str, Stored]]
    """The weights in few bits among the tensors of the files, by the name of the plain weight.
    ValueError if the tensors contradict the config or each other."""

    def plain(self, header: Header) -> tuple[Mapping[str, Stored], list[str]]:
        """The weights in few bits by plain name, and the names of the other plain tensors."""
        stored = self.weights(header)
        used = {part for weight in stored.values() for part in weight.parts}
        others = [n for n in header if n not in used and not _UNUSED.fullmatch(n)]
        return stored, others


def read_scheme(fields: Mapping[str, Any]) -> Scheme | None:
    """How the weights of the checkpoint with this config.json are stored; None: as plain numbers.

    ValueError for a method that is not read here, with what to do.
    """
    text = fields.get("text_config")  # of models of images and text, some of which say it there
    inside = {f"text_config.{n}": text.get(n) for n in FIELDS} if isinstance(text, Mapping) else {}
    for name, value in {**{n: fields.get(n) for n in FIELDS}, **inside}.items():
        if not value:
            continue
        where = f"config.json: {name}"
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {shown(value)}; expected an object.")
        method = value.get("quant_method")
        if method is None and any(key.startswith("load_in_") for key in value):
            method = "bitsandbytes"  # its early versions did not write their name
        read = _METHODS.get(method) if isinstance(method, str) else None
        if read is None:
            raise ValueError(f"{where}: quantised by {method or shown(value)}. {_REMEDY}.")
        reader = FieldReader(where, value)
        weights, identity = read(reader)
        return Scheme({"quant_method": method, **identity}, weights)
    return None


Found = tuple[Callable[[Header], Mapping[str, Stored]], dict[str, Any]]


def _fp8(reader: FieldReader) -> Found:
    block = reader.take("weight_block_size", None)
    whole = isinstance(block, (list, tuple)) and len(block) == 2
    if block is not None and not (whole and all(type(n) is int and n > 0 for n in block)):
        raise reader.error("weight_block_size", block, "expected two numbers ≥ 1")
    tile = (block[0], block[1]) if block else None
    reader.require("fmt", "e4m3", "float8_e4m3fn", "e5m2")
    skipped = _skipped(reader)

    def weights(header: Header) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for name, tensor in header.items():
            if tensor.dtype in FLOATS and not name.endswith(("_scale", "_scale_inv")):
                skipped.refuse(name)
                names = [f"{name}_scale_inv", f"{name}_scale"]
                scale = next((n for n in names if n in header), names[0])
                found[name] = float_matrix(header, name, scale, block=tile)
        return found

    return weights, {"weight_block_size": block}


def _gptq(reader: FieldReader) -> Found:
    version = reader.take("checkpoint_format", "gptq")
    reader.require("checkpoint_format", "gptq", "gptq_v2")
    size = reader.take("group_size", 128)
    skipped = _skipped(reader)

    def weights(header: Header) -> dict[str, Stored]:
        return {
            f"{module}.weight": words.gptq(
                header, module, group_size=size, zero_shift=int(version == "gptq")
            )
            for module in skipped.packed(header)
        }

    return weights, {"checkpoint_format": version, "group_size": size}


def _awq(reader: FieldReader) -> Found:
    for name in ("version", "format"):
        if str(reader.take(name, "gemm")).lower() != "gemm":
            raise reader.error(name, reader.take(name), "only the gemm layout is read")
    reader.require("bits", 4)
    reader.require("zero_point", True)
    size = reader.take("group_size", 128)
    skipped = _skipped(reader)

    def weights(header: Header) -> dict[str, Stored]:
        return {
            f"{module}.weight": words.awq(header, module, group_size=size)
            for module in skipped.packed(header)
        }

    return weights, {"group_size": size}


def _mxfp4(reader: FieldReader) -> Found:
    skipped = _skipped(reader)

    def weights(header: Header) -> dict[str, Stored]:
        names = [n.removesuffix("_blocks") for n in header if n.endswith("_blocks")]
        for name in names:
            skipped.refuse(name)
        return {name: stack(header, name) for name in names}

    return weights, {}


def _compressed(reader: FieldReader) -> Found:
    compressed = read_compressed(reader)
    return compressed.weights, dataclasses.asdict(compressed)


_METHODS: dict[str, Callable[[FieldReader], Found]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}


@dataclasses.dataclass(frozen=True)
class Skipped:
    """The modules that stay plain: `modules_to_not_convert`, by transformers' rules."""

    patterns: tuple[str, ...]

    def refuse(self, name: str) -> None:
        """ValueError if the tensor `name`, which is stored in few bits, belongs to one of them."""
        module = name.removesuffix(".weight")
        for pattern in self.patterns:
            if re.match(pattern, module) or module.endswith(pattern):
                raise ValueError(
                    f"tensor {name} is quantised, but modules_to_not_convert of "
                    f"quantization_config names {pattern!r}. One of them is wrong."
                )

    def packed(self, header: Header) -> list[str]:
        """Modules with a tensor `qweight`."""
        modules = [n.removesuffix(".qweight") for n in header if n.endswith(".qweight")]
        for module in modules:
            self.refuse(module)
        return modules


def _skipped(reader: FieldReader) -> Skipped:
    return Skipped(read_names(reader, "modules_to_not_convert"))
