"""8-bit floats with scales for a tensor, a row or a rectangle: DeepSeek's and Qwen's FP8 files."""

from __future__ import annotations

from decant.models.prequantised.matrix import Matrix, Numbers, Tiles
from decant.models.prequantised.stored import Header

FLOATS = ("F8_E4M3", "F8_E5M2")
_EXPONENTS = ("U8", "F8_E8M0")


def float_matrix(header: Header, name: str, scale: str, *, block: tuple[int, int] | None) -> Matrix:
    """The matrix in the tensor `name`, whose scales are in the tensor `scale`.

    `block`: rows and columns of a rectangle with a scale of its own. ValueError if there are no
    scales, or if they fit neither the blocks nor the rows nor the whole.
    """
    shape = header[name].shape
    if len(shape) != 2 or scale not in header:
        need = "a matrix" if scale in header else f"a tensor {scale}"
        raise ValueError(f"tensor {name} of shape {shape} is stored in 8-bit floats; needs {need}.")
    return Matrix("FP8", Numbers(name, (shape[0], shape[1])), scales(header, scale, shape, block))


def scales(
    header: Header, name: str, shape: tuple[int, ...], block: tuple[int, int] | None
) -> Tiles:
    """The scales, or zero points, of a matrix of this shape that are not packed."""
    grid = header[name].shape
    rows, columns = shape
    tiles: dict[tuple[int, ...], tuple[int, int]] = {
        (1, 1): (rows, columns),
        (rows, 1): (1, columns),
    }
    if block:
        tiles[-(-rows // block[0]), -(-columns // block[1])] = block
    flat: dict[tuple[int, ...], tuple[int, ...]] = {(): (1, 1), (rows,): (rows, 1), (1,): (1, 1)}
    there = flat.get(grid, grid)
    if there not in tiles:
        raise ValueError(
            f"tensor {name} is {grid}; expected a number for the matrix of {shape}, for each row"
            + (f" or for each block of {block}." if block else ".")
        )
    exponents = header[name].dtype in _EXPONENTS and header[name].dtype == "U8"
    return Tiles(Numbers(name, (there[0], there[1]), exponents=exponents), tiles[there])
