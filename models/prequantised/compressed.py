"""The layouts of compressed-tensors (llm-compressor): 8-bit floats, and integers packed or not.

config.json has groups of modules, each with a scheme: bits, and what a scale belongs to. A linear
map [output, input] has `weight` or `weight_packed`, `weight_scale` and, if its zero points are not
0, `weight_zero_point`; with act-order, `weight_g_idx` is the group of each input.
"""

from __future__ import annotations

import dataclasses
import re

from decant.models.families.field_reader import FieldReader
from decant.models.prequantised.fp8 import FLOATS, float_matrix, scales
from decant.models.prequantised.matrix import Matrix, Numbers, Tiles, find_groups
from decant.models.prequantised.names import read_names
from decant.models.prequantised.stored import Header

_WORD = 32
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_PATTERN = "re:"
_WEIGHTS = (".weight", ".weight_packed")


@dataclasses.dataclass(frozen=True)
class Numeric:
    """How the weights of a group of modules are stored."""

    bits: int
    floats: bool
    strategy: str
    group_size: int
    symmetric: bool
    block: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Compressed:
    """The quantization_config of a compressed-tensors checkpoint."""

    groups: tuple[tuple[tuple[str, ...], Numeric | None], ...]
    """Targets of each group, and how their weights are stored; None: as plain numbers."""
    ignore: tuple[str, ...]

    def weights(self, header: Header) -> dict[str, Matrix]:
        """Plain name → matrix. ValueError if the files contradict the config."""
        found = {}
        for name, tensor in header.items():
            suffix = next((s for s in _WEIGHTS if name.endswith(s)), None)
            packed = suffix == ".weight_packed"
            if suffix and (packed or tensor.dtype in (*FLOATS, "I8")):
                module = name.removesuffix(suffix)
                found[f"{module}.weight"] = self._matrix(header, module, name)
        return found

    def _matrix(self, header: Header, module: str, name: str) -> Matrix:
        how = self._numeric(module)
        scale, dtype = f"{module}.weight_scale", header[name].dtype
        if how is None or how.floats != (dtype in FLOATS) or scale not in header:
            stored = "leaves it as it is" if how is None else f"says {how}"
            lacks = "" if scale in header else f" without {scale}"
            raise ValueError(f"tensor {name} is {dtype}{lacks}; quantization_config {stored}.")
        if how.floats and how.strategy != "group":
            return float_matrix(header, name, scale, block=how.block)
        packed = name.endswith("_packed")
        codes = _codes(name, header[name].shape, how, packed=packed)
        block = (1, how.group_size) if how.strategy == "group" else how.block
        zeros = f"{module}.weight_zero_point"
        if zeros not in header and not how.symmetric:
            raise ValueError(f"tensor {zeros} is missing: the zero points of {name}.")
        zero_tiles = _zeros(header, zeros, codes.shape, how, block) if zeros in header else None
        groups = None
        if how.strategy == "group":
            listed, size = f"{module}.weight_g_idx", how.group_size
            groups = find_groups(header, listed, inputs=codes.shape[1], size=size)
        kind = "FP8" if how.floats else f"INT{how.bits}"
        return Matrix(kind, codes, scales(header, scale, codes.shape, block), zero_tiles, groups)

    def _numeric(self, module: str) -> Numeric | None:
        """How the module's weights are stored: by its name before its class, which is Linear."""
        if any(_names(pattern, module) for pattern in self.ignore):
            return None
        by_name = [
            how for targets, how in self.groups if any(_names(target, module) for target in targets)
        ]
        by_class = [how for targets, how in self.groups if "Linear" in targets]
        return next(iter([*by_name, *by_class]), None)


def _codes(name: str, shape: tuple[int, ...], how: Numeric, *, packed: bool) -> Numbers:
    if len(shape) != 2:
        raise ValueError(f"tensor {name} is {shape}; expected a matrix.")
    if not packed:
        return Numbers(name, (shape[0], shape[1]))
    columns = shape[1] * (_WORD // how.bits)
    return Numbers(name, (shape[0], columns), bits=how.bits, offset=2 ** (how.bits - 1))


def _zeros(
    header: Header,
    name: str,
    shape: tuple[int, int],
    how: Numeric,
    block: tuple[int, int] | None,
) -> Tiles:
    """Zero points, which are packed along the outputs where they are I32."""
    if header[name].dtype != "I32":
        return scales(header, name, shape, block)
    count = 1 if how.strategy == "channel" else -(-shape[1] // how.group_size)
    packed = (-(-shape[0] * how.bits // _WORD), count)
    if header[name].shape != packed:
        raise ValueError(f"tensor {name} is {header[name].shape}; expected {packed}.")
    numbers = Numbers(name, (shape[0], count), bits=how.bits, axis=0, offset=2 ** (how.bits - 1))
    return Tiles(numbers, (1, shape[1] if how.strategy == "channel" else how.group_size))


def _names(pattern: str, module: str) -> bool:
    """Whether an entry of `ignore` or `targets` names this module."""
    if pattern.startswith(_PATTERN):
        return re.match(pattern.removeprefix(_PATTERN), module) is not None
    return pattern == module


def read_compressed(reader: FieldReader) -> Compressed:
    """The settings in quantization_config. ValueError for a format that we cannot read."""
    reader.require("format", *_FORMATS, "mixed-precision", "dense")
    reader.require("transform_config", {})
    reader.section("sparsity_config").require("format", "dense")
    groups = reader.section("config_groups")
    return Compressed(
        tuple(_read_group(groups.section(name)) for name in groups.fields),
        read_names(reader, "ignore", prefix=_PATTERN),
    )


def _read_group(of: FieldReader) -> tuple[tuple[str, ...], Numeric | None]:
    of.require("format", None, *_FORMATS, "dense")
    targets = read_names(of, "targets", prefix=_PATTERN)
    if of.take("weights", None) is None:
        return targets, None
    how = of.section("weights")
    how.require("num_bits", 8, 4, 2)
    how.require("type", "int", "float")
    how.require("strategy", "tensor", "channel", "group", "block")
    floats = how.take("type", "int") == "float"
    if floats and how.take("num_bits", 8) != 8:
        raise how.error("num_bits", how.fields["num_bits"], "floats are read with 8 bits only")
    size = how.take("group_size", None)
    strategy = how.take("strategy", None) or ("tensor" if size is None else "group")
    rectangle = how.take("block_structure", None) if strategy == "block" else None
    if strategy != "group":
        size = 0
    elif type(size) is not int or size < 1:
        raise how.error("group_size", size, "expected a whole number ≥ 1")
    return targets, Numeric(
        bits=how.take("num_bits", 8),
        floats=floats,
        strategy=strategy,
        group_size=int(size or 0),
        symmetric=how.flag("symmetric", True),
        block=(rectangle[0], rectangle[1]) if rectangle else None,
    )
