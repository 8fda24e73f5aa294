"""States, scales and maps that no teacher gave are an error that names their unit and row."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from decant.schemas.arrays.spec import create_array, specs_of
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.disk.layout import PartLayout
from decant.schemas.manifest.commits import Commit, summarise_shards, write_commit
from decant.schemas.manifest.manifest import Manifest, Part, Unit
from decant.schemas.reading.signal_arrays import SignalArrays
from decant.schemas.signals import ArraySignal, AttentionSignal, HiddenSignal

ID = "0" * 64
LENGTH = 4
STATES = HiddenSignal(ID, ID, 1, "bfloat16", 8, 8, 1)
CODES = HiddenSignal(ID, ID, 1, "int8", 8, 8, 1)
MAPS = AttentionSignal(ID, ID, 1, "bfloat16", (0, 1), 2, 1)


def arrays_with(
    root: Path, signal: ArraySignal, name: str, *, into: str, value: float
) -> SignalArrays:
    """A signal of two units of two rows, with `value` in row 1 of unit 1 of the array `into`."""
    layout, entries = PartLayout(root / "parts/0000"), []
    specs = specs_of(signal, name=name, slots=4, sequence_length=LENGTH)
    for unit in range(2):
        shards = {}
        for array, spec in specs.items():
            create_array(layout.array(array), spec)
            writer = ArrayWriter(layout.array(array), spec, first=2 * unit)
            for offset in range(2):
                row = np.full(spec.row, 0.5).astype(spec.numpy_dtype)
                if (array, unit, offset) == (into, 1, 1):
                    row[(-1,) * row.ndim] = value
                writer.append(row)
            shards[array] = writer.finish()
        entries.append(summarise_shards(shards, rows=2))
        write_commit(layout.root, name, Commit(unit, ID, entries[-1], {}, shards=shards))
    units = tuple(Unit("train", 2, 8, 6, {name: entry}) for entry in entries)
    part = Part("parts/0000", ID, 2, units, {name: signal}, {}, ())
    return SignalArrays(root, Manifest(LENGTH, 9, ID, (part,)), name)


def read(arrays: SignalArrays) -> dict[str, np.ndarray]:
    units, offsets = np.array([0, 1, 1]), np.array([1, 0, 1])
    return arrays.start(units, offsets, decode=False)()


@pytest.mark.parametrize(
    ("signal", "name", "into", "values"),
    [
        (STATES, "hidden/1", "hidden/1", (np.nan, -np.nan, np.inf, -np.inf)),
        (CODES, "hidden/1", "hidden/1-scale", (np.nan, np.inf, -0.5)),
        (MAPS, "attention/1", "attention/1", (np.nan, np.inf, -0.5, 1.5)),
    ],
)
def test_an_impossible_value_is_an_error_of_its_row(signal, name, into, values, tmp_path):
    for number, value in enumerate(values):
        arrays = arrays_with(tmp_path / str(number), signal, name, into=into, value=value)
        with pytest.raises(ValueError, match=f"parts/0000: {into}, unit 1, row 1 of it holds"):
            read(arrays)


def test_large_states_and_certain_maps_are_read(tmp_path):
    states = arrays_with(tmp_path / "a", STATES, "hidden/1", into="hidden/1", value=-3e38)
    assert read(states)["hidden/1"][2, -1, -1] == ml_dtypes.bfloat16(-3e38)
    maps = arrays_with(tmp_path / "b", MAPS, "attention/1", into="attention/1", value=1)
    assert read(maps)["attention/1"].max() == 1
