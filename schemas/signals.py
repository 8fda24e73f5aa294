"""The description of each signal in the manifest: all settings that a reader needs.

Signals are named `logits`, `counts`, `sketch`, `hidden/12` and `attention/3`. The first three are
stored in records; `counts` and `sketch` describe the same distributions as `logits`. Hidden layer 0
is the embedding's output, layer i the output of the i-th block, and the last layer the states after
the final norm. Attention counts blocks from 0.
"""

from dataclasses import dataclass
from typing import Any, Literal

from decant.schemas.codecs import Profile
from decant.schemas.disk.layout import COUNTS, SKETCH
from decant.schemas.disk.names import require_names
from decant.schemas.targets.targets import BETAS

HiddenDtype = Literal["bfloat16", "int8"]
AttentionDtype = Literal["uint8-log", "bfloat16"]
MEAN = "mean"


@dataclass(frozen=True)
class TargetSpec:
    """The stored part of a next-token distribution; `targets/targets.py` defines the terms."""

    k: int
    """Ids stored per position, at most. 0: no ids and no `tail_logmass`."""
    draws: int = 0
    """m, tail draws stored per position, at most."""
    draw_betas: tuple[float, ...] = ()
    """β of the nodes whose tails the proposal mixes."""
    betas: tuple[float, ...] = BETAS
    """β of each node of `tail_logmass`."""
    labels: bool = False
    """Whether `label_logprobs` are stored: the log-probability of the next token of the text."""
    mass: float | None = None
    """A position stores as few ids as hold this share of its probability, at most `k`. None: all
    positions store `k`."""


@dataclass(frozen=True, kw_only=True)
class LogitsSignal(TargetSpec):
    """The teacher's next-token distributions."""

    signal_id: str
    teacher_id: str
    profile: Profile
    unmatched: int = 0
    """Above 0: the head holds the teacher's own likeliest tokens. One without a partner in this
    cache's vocabulary has an id of its own, from V up to V + unmatched − 1, which is no token."""
    tail_at_1: bool = False
    """Whether the tail's mass is known at T = 1 only; the other nodes are those of a flat tail."""

    @property
    def target_spec(self) -> TargetSpec:
        """The fields that a teacher needs in order to compute these targets again."""
        return TargetSpec(self.k, self.draws, self.draw_betas, self.betas, self.labels, self.mass)


@dataclass(frozen=True)
class CountsSignal:
    """Counts of equally spaced draws at T = 1, as `targets/counts.py` defines."""

    signal_id: str
    teacher_id: str
    draws: int
    """N, the sum of a position's counts."""


@dataclass(frozen=True)
class SketchSignal:
    """Sketches, as `targets/sketch.py` defines."""

    signal_id: str
    teacher_id: str
    rank: int
    """r, numbers stored per position."""
    teacher_width: int
    """D, width of the teacher's last hidden state; equal to `rank` for rank "full"."""
    step: float
    """Distance of stored values, in units of the standard deviation of the r-th number (of the
    128th if there are more); 0: float32, exact."""
    dither: bool
    """Whether a pseudo-random fraction of a step, known to the reader, is added before rounding and
    subtracted after it, so that rounding is right on average."""
    softcap: float | None = None
    """Cap of the teacher's logits."""
    variance_kept: float = 1.0
    """Share of the variance of the teacher's logits at T = 2 that sketches keep, on the calibration
    sample in which the basis was found."""
    asked_rank: int | None = None
    """The rank that the settings asked for, if the calibration sample was too small for it."""


@dataclass(frozen=True)
class HiddenSignal:
    """Hidden states of one layer, encoded as `targets/hidden.py` defines."""

    signal_id: str
    teacher_id: str
    layer: int
    dtype: HiddenDtype
    width: int
    """Numbers stored per position."""
    teacher_width: int
    """Width of the teacher's layer. Larger than `width` if states are projected on `directions`."""
    shard_rows: int
    """Rows per file."""
    directions: str | None = None
    """File of the statistic with the leading principal directions, float32
    [teacher_width, width]. Stored states are the teacher's states times it."""
    variance_kept: float = 1.0
    """Share of the layer's variance that the directions keep, on the calibration sample."""


@dataclass(frozen=True)
class AttentionSignal:
    """Attention maps of one block, encoded as `targets/attention.py` defines."""

    signal_id: str
    teacher_id: str
    layer: int
    dtype: AttentionDtype
    heads: tuple[int, ...] | Literal["mean"]
    """The teacher's heads that are stored, in this order; "mean" stores their mean as one head."""
    teacher_heads: int
    shard_rows: int
    """Rows per file."""

    @property
    def stored_heads(self) -> int:
        """Length of the stored arrays' heads axis."""
        return 1 if self.heads == MEAN else len(self.heads)


UNSET_IN_CAPTURES = ("unmatched", "tail_at_1")
"""Fields that only aligned parts set. Manifests do not write them unset, so that those of captures
stay as older releases read and identify them."""
RecordSignal = LogitsSignal | CountsSignal | SketchSignal
"""Signals that are stored in records, one a row."""
Signal = RecordSignal | HiddenSignal | AttentionSignal
ArraySignal = HiddenSignal | AttentionSignal


def hidden_name(layer: int) -> str:
    """Name of the signal with a layer's hidden states, `hidden/12`."""
    return f"hidden/{layer}"


def attention_name(layer: int) -> str:
    """Name of the signal with a block's attention maps, `attention/3`."""
    return f"attention/{layer}"


def scale_name(name: str) -> str:
    """Name of the array with the scales of an int8 array, `hidden/12-scale`."""
    return f"{name}-scale"


def array_names(name: str, signal: Signal) -> tuple[str, ...]:
    """Names of the arrays that store the signal called `name`; none if it is stored in records."""
    if isinstance(signal, RecordSignal):
        return ()
    return (name, scale_name(name)) if signal.dtype == "int8" else (name,)


def signal_from_json(name: str, value: dict[str, Any]) -> Signal:
    """The signal called `name` from the JSON form of its `dataclasses.asdict`.

    ValueError for another name than signals have.
    """
    require_names("signal", [name])
    kind = name.partition("/")[0]
    if kind == COUNTS:
        return CountsSignal(**value)
    if kind == SKETCH:
        return SketchSignal(**value)
    if kind == "hidden":
        if value.get("directions") is not None:
            require_names("statistic", [value["directions"]])
        return HiddenSignal(**value)
    if kind == "attention":
        heads = value["heads"]
        return AttentionSignal(**{**value, "heads": heads if heads == MEAN else tuple(heads)})
    tuples = {field: tuple(value.get(field, ())) for field in ("betas", "draw_betas")}
    return LogitsSignal(**{**value, **tuples})
