"""The description of each signal in the manifest: all settings that a reader needs.

Signals are named `logits`, `hidden/12` and `attention/3`. Hidden layer 0 is the embedding's
output, layer i the output of the i-th block, and the last layer the states after the final norm.
Attention counts blocks from 0.
"""

from dataclasses import dataclass
from typing import Any, Literal

from decant.schemas.codecs import Profile
from decant.schemas.disk.names import require_names
from decant.schemas.targets.targets import BETAS

HiddenDtype = Literal["bfloat16", "int8"]
AttentionDtype = Literal["uint8-log", "bfloat16"]
MEAN = "mean"


@dataclass(frozen=True)
class TargetSpec:
    """The stored part of a next-token distribution; `targets/targets.py` defines the terms."""

    k: int
    """Ids stored per position, at most."""
    draws: int = 0
    """m, tail draws stored per position, at most."""
    draw_betas: tuple[float, ...] = ()
    """β of the nodes whose tails the proposal mixes."""
    betas: tuple[float, ...] = BETAS
    """β of each node of `tail_logmass`."""


@dataclass(frozen=True, kw_only=True)
class LogitsSignal(TargetSpec):
    """The teacher's next-token distributions."""

    signal_id: str
    teacher_id: str
    profile: Profile

    @property
    def target_spec(self) -> TargetSpec:
        """The fields that a teacher needs in order to compute these targets again."""
        return TargetSpec(self.k, self.draws, self.draw_betas, self.betas)


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


Signal = LogitsSignal | HiddenSignal | AttentionSignal
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
    """Names of the arrays that store the signal called `name`; none for logits."""
    if isinstance(signal, LogitsSignal):
        return ()
    return (name, scale_name(name)) if signal.dtype == "int8" else (name,)


def signal_from_json(name: str, value: dict[str, Any]) -> Signal:
    """The signal called `name` from the JSON form of its `dataclasses.asdict`.

    ValueError for another name than signals have.
    """
    require_names("signal", [name])
    kind = name.partition("/")[0]
    if kind == "hidden":
        if value.get("directions") is not None:
            require_names("statistic", [value["directions"]])
        return HiddenSignal(**value)
    if kind == "attention":
        heads = value["heads"]
        return AttentionSignal(**{**value, "heads": heads if heads == MEAN else tuple(heads)})
    tuples = {field: tuple(value.get(field, ())) for field in ("betas", "draw_betas")}
    return LogitsSignal(**{**value, **tuples})
