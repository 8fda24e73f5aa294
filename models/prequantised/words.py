"""Integers packed in 32-bit words, [input, output]: the tensors of GPTQ and AWQ files.

A linear map has `qweight`, `qzeros`, `scales` and, in GPTQ files, `g_idx`: the group of each input.
"""

from __future__ import annotations

from decant.models.prequantised.matrix import Matrix, Numbers, Tiles, find_groups
from decant.models.prequantised.stored import Header

_WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place within its word of each of eight outputs, in the layout of AWQ's gemm kernel."""


def gptq(header: Header, module: str, *, group_size: int, zero_shift: int) -> Matrix:
    """GPTQ's layout: inputs are packed in `qweight`, outputs in `qzeros`.

    `zero_shift`: 1 if the file's zero points are one less than the real ones, as in version 1.
    """
    qweight, qzeros, scales = _tensors(header, module)
    count, outputs = scales
    bits, rest = divmod(qzeros[1] * _WORD, outputs)
    if rest or bits not in (2, 4, 8) or qzeros[0] != count or qweight[1] != outputs:
        raise ValueError(
            f"{module}: qzeros {qzeros}, scales {scales} and qweight {qweight} do not fit numbers "
            "of 2, 4 or 8 bits."
        )
    inputs = qweight[0] * _WORD // bits
    size = _group_size(module, inputs, count, group_size)
    return Matrix(
        f"INT{bits}",
        Numbers(f"{module}.qweight", (inputs, outputs), bits=bits, axis=0),
        Tiles(Numbers(f"{module}.scales", (count, outputs)), (size, 1)),
        Tiles(
            Numbers(f"{module}.qzeros", (count, outputs), bits=bits, offset=-zero_shift), (size, 1)
        ),
        groups=find_groups(header, f"{module}.g_idx", inputs=inputs, size=size),
        transposed=True,
    )


def awq(header: Header, module: str, *, group_size: int) -> Matrix:
    """AWQ's gemm layout: outputs are packed, eight in a word, in an order of its own."""
    qweight, qzeros, scales = _tensors(header, module)
    (inputs, words), (count, outputs) = qweight, scales
    if qzeros != (count, words) or words * 8 != outputs:
        raise ValueError(
            f"{module}: qzeros {qzeros}, scales {scales} and qweight {qweight} do not fit numbers "
            "of 4 bits in the gemm layout."
        )
    tile = (_group_size(module, inputs, count, group_size), 1)

    def packed(name: str, rows: int) -> Numbers:
        return Numbers(f"{module}.{name}", (rows, outputs), bits=4, order=_AWQ_ORDER)

    return Matrix(
        "INT4",
        packed("qweight", inputs),
        Tiles(Numbers(f"{module}.scales", (count, outputs)), tile),
        Tiles(packed("qzeros", count), tile),
        transposed=True,
    )


def _tensors(header: Header, module: str) -> list[tuple[int, int]]:
    """Shapes of qweight, qzeros and scales. ValueError unless all are matrices."""
    shapes = []
    for name in ("qweight", "qzeros", "scales"):
        found = header.get(f"{module}.{name}")
        packed = name != "scales"
        if not found or len(found.shape) != 2 or (packed and found.dtype != "I32"):
            raise ValueError(
                f"{module}: {name} is {'not there' if not found else tuple(found)}; expected a "
                f"matrix{' of I32' if packed else ''} beside qweight."
            )
        shapes.append((found.shape[0], found.shape[1]))
    return shapes


def _group_size(module: str, inputs: int, count: int, size: int) -> int:
    """Inputs of a group; `size` is the config's, -1 for all. ValueError if there are others."""
    size = inputs if size == -1 else size
    if size < 1 or -(-inputs // size) != count:
        raise ValueError(
            f"{module}: scales for {count} groups, but {inputs} inputs and groups of {size} "
            "(group_size in config.json)."
        )
    return size
