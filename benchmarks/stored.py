"""Error and size of stored hidden states and attention maps, against the teacher's in float32.

    python -m benchmarks.stored [--model embedded] [--rows 8] [--hidden 12 -1] [--attention 0 15]

Error of a hidden state: ‖stored − exact‖ ÷ ‖exact‖ at a position. Error of an attention map: total
variation of a query's row. Bytes a token are those of the files, compared with a plain bfloat16
array of as many tokens.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.capture import real_rows
from decant.models import open_checkpoint
from decant.pipelines.calibration.directions import Moments
from decant.pipelines.calibration.signal_specs import describe_arrays
from decant.pipelines.config import Attention, Hidden, Signals
from decant.pipelines.teacher.loaded import LoadedTeacher
from decant.pipelines.teacher.outputs import OutputSpec
from decant.schemas.arrays.spec import create_array, specs_of
from decant.schemas.arrays.writer import ArrayWriter
from decant.schemas.manifest.plan import PlannedTeacher
from decant.schemas.signals import HiddenSignal, scale_name
from decant.schemas.targets.attention import decode_log
from decant.schemas.targets.hidden import decode_int8

WIDTHS = (64, 128, 256)


def main() -> None:
    options = _arguments()
    checkpoint = open_checkpoint(options.model)
    rows = real_rows(options.model, length=options.sequence_length, count=options.rows)
    planned = PlannedTeacher(
        options.model, "", "float32", checkpoint.tokenizer().size, options.sequence_length, 2
    )
    teacher = LoadedTeacher(planned)
    exact = ExactTeacher(checkpoint, rows)
    hidden = Table("signal", "stored as", "error mean", "p99", "max", "variance kept", *BYTES)
    maps = Table("signal", "stored as", "TV mean", "p99", "max", "", *BYTES)
    kinds: list[Signals] = [
        Signals(hidden=Hidden(tuple(options.hidden), dtype, width))
        for dtype, width in (("bfloat16", "full"), ("int8", "full"), *(("int8", n) for n in WIDTHS))
    ]
    kinds += [
        Signals(attention=Attention(tuple(options.attention), "all", dtype))
        for dtype in ("bfloat16", "uint8-log")
    ]
    for signals in kinds:
        for name, cells in measure(teacher, rows, signals, exact=exact, options=options):
            (hidden if name.startswith("hidden") else maps).add_row(name, *cells)
    console = Console(width=120)
    console.print(
        f"{options.model}, {len(rows)} rows of {options.sequence_length} tokens; directions from "
        "the same rows",
        hidden,
        maps,
    )


BYTES = ("B/token", "plain bfloat16")


def measure(teacher, rows, signals: Signals, *, exact: "ExactTeacher", options):
    """The name and the table cells of each signal."""
    length = options.sequence_length
    described = describe_arrays(
        signals,
        exact.config,
        teacher_id="",
        length=length,
        unit_rows=1 << (len(rows) - 1).bit_length(),
    )
    moments = Moments([s.layer for s in described.values() if _projected(s)])
    directions, kept = {}, {}
    if moments.layers:
        with teacher.run(rows, OutputSpec(), observers=(moments,)) as outputs:
            list(outputs)
    for name, signal in described.items():
        if _projected(signal):
            directions[name], kept[name] = moments.directions(signal.layer, width=signal.width)
    with teacher.run(rows, OutputSpec(None, described, directions)) as computed:
        outputs = list(computed)
    tokens = sum(int((row.segment_ids > 0).sum()) for row in rows)
    for name, signal in described.items():
        size = written(name, signal, outputs, length=length) / tokens
        if isinstance(signal, HiddenSignal):
            errors = exact.state_errors(name, signal, outputs, directions.get(name))
            stored_as = signal.dtype + (f", {signal.width} wide" if _projected(signal) else "")
            plain = 2 * signal.teacher_width * len(rows) * length / tokens
            share = f"{kept[name]:.1%}" if name in kept else ""
        else:
            errors, stored_as, share = exact.map_errors(name, signal, outputs), signal.dtype, ""
            plain = 2 * signal.stored_heads * length**2 * len(rows) / tokens
        figures = (errors.mean(), np.quantile(errors, 0.99), errors.max())
        cells = (f"{figure:.2e}" for figure in figures)
        yield name, (stored_as, *cells, share, f"{size:,.0f}", f"{plain:,.0f} ({size / plain:.0%})")


def written(name, signal, outputs, *, length: int) -> int:
    """Write a signal's arrays; returns the bytes of its files."""
    slots = 1 << (len(outputs) - 1).bit_length()
    size = 0
    with tempfile.TemporaryDirectory() as scratch:
        for array, spec in specs_of(signal, name=name, slots=slots, sequence_length=length).items():
            create_array(Path(scratch) / array, spec)
            writer = ArrayWriter(Path(scratch) / array, spec, first=0)
            for output in outputs:
                writer.append(output.arrays[array])
            size += sum(shard.bytes for shard in writer.finish())
    return size


class ExactTeacher:
    """The teacher's states and maps in float32, computed one row at a time."""

    def __init__(self, checkpoint, rows):
        self.config = checkpoint.config
        self.rows = rows
        graph, self._weights = nnx.split(checkpoint.load(dtype="float32"))
        every = tuple(range(self.config.num_layers + 1))

        @jax.jit
        def states(weights, tokens, segment_ids, positions):
            model = nnx.merge(graph, weights)
            return model(tokens, segment_ids, positions, hidden_layers=every)[1]

        @jax.jit
        def maps(weights, states, segment_ids, positions, layer):
            model = nnx.merge(graph, weights)
            return model.attention_maps(states, segment_ids, positions, layer=layer)

        self._maps = maps
        self._states = [
            jax.device_get(states(self._weights, *(x[None] for x in _inputs(row)))) for row in rows
        ]

    def state_errors(self, name, signal, outputs, directions) -> np.ndarray:
        """Relative error at each position; of projected states, against their exact projection.

        The column `variance kept` shows how much the directions leave out.
        """
        errors = []
        for row, states, output in zip(self.rows, self._states, outputs, strict=True):
            counted = row.segment_ids > 0
            exact = states[signal.layer][0][counted].astype(np.float64)
            exact = exact if directions is None else exact @ directions
            stored = output.arrays[name]
            if signal.dtype == "int8":
                stored = decode_int8(stored, output.arrays[scale_name(name)])
            wrong = np.linalg.norm(stored[counted].astype(np.float64) - exact, axis=-1)
            errors.append(wrong / np.linalg.norm(exact, axis=-1))
        return np.concatenate(errors)

    def map_errors(self, name, signal, outputs) -> np.ndarray:
        """Total variation of each query's row, for each head."""
        errors = []
        for row, states, output in zip(self.rows, self._states, outputs, strict=True):
            _, segment_ids, positions = _inputs(row)
            places = segment_ids[None], positions[None]
            exact = np.asarray(
                self._maps(self._weights, states[signal.layer], *places, signal.layer)[0]
            )
            stored = output.arrays[name]
            stored = decode_log(stored) if signal.dtype == "uint8-log" else stored
            distance = 0.5 * np.abs(stored.astype(np.float32) - exact).sum(-1)
            errors.append(distance[:, segment_ids > 0].ravel())
        return np.concatenate(errors)


def _inputs(row):
    return row.tokens, row.segment_ids, row.positions


def _projected(signal) -> bool:
    return isinstance(signal, HiddenSignal) and signal.width < signal.teacher_width


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--hidden", type=int, nargs="*", default=[12, -1])
    parser.add_argument("--attention", type=int, nargs="*", default=[0, 15])
    return parser.parse_args()


if __name__ == "__main__":
    main()
