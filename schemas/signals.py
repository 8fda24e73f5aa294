"""What a cache says of each signal it holds: everything that is needed to read it.

Signals are named `logits`, `hidden/12` and `attention/3`. Hidden layer 0 is the embedding's
output, i the output of the i-th block, and the last one the states after the final norm; attention
counts blocks from 0.
"""

from dataclasses import dataclass
from typing import Any, Literal

from decant.schemas.codecs import Profile
from decant.schemas.targets.targets import BETAS

HiddenDtype = Literal["bfloat16", "int8"]
AttentionDtype = Literal["uint8-log", "bfloat16"]
MEAN = "mean"


@dataclass(frozen=True)
class TargetSpec:
    """What is kept of each next-token distribution; `targets/targets.py` defines the terms."""

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
    """Hidden states of one layer; see decant.schemas.targets.hidden for what is stored of them."""

    signal_id: str
    teacher_id: str
    layer: int
    dtype: HiddenDtype
    width: int
    """Numbers stored a position."""
    teacher_width: int
    """Numbers that the layer has. More than `width`: see `directions`."""
    shard_rows: int
    """Rows in one file."""
    directions: str | None = None
    """The statistic that holds the leading principal directions, float32 [teacher_width, width]:
    what is stored are the states times it."""
    variance_kept: float = 1.0
    """Share of the layer's variance along the stored directions, on the calibration sample."""


@dataclass(frozen=True)
class AttentionSignal:
    """Attention maps of one block; see schemas.targets.attention for what is stored of them."""

    signal_id: str
    teacher_id: str
    layer: int
    dtype: AttentionDtype
    heads: tuple[int, ...] | Literal["mean"]
    """Which of the teacher's heads, in this order; or their mean, stored as one head."""
    teacher_heads: int
    shard_rows: int
    """Rows in one file."""

    @property
    def stored_heads(self) -> int:
        """Length of the stored heads' axis."""
        return 1 if self.heads == MEAN else len(self.heads)


Signal = LogitsSignal | HiddenSignal | AttentionSignal
ArraySignal = HiddenSignal | AttentionSignal


def hidden_name(layer: int) -> str:
    """`hidden/12`."""
    return f"hidden/{layer}"


def attention_name(layer: int) -> str:
    """`attention/3`."""
    return f"attention/{layer}"


def scale_name(name: str) -> str:
    """`hidden/12-scale`: the array beside an int8 one."""
    return f"{name}-scale"


def array_names(name: str, signal: Signal) -> tuple[str, ...]:
    """The arrays that the signal called `name` is stored in."""
    if isinstance(signal, LogitsSignal):
        return ()
    return (name, scale_name(name)) if signal.dtype == "int8" else (name,)


def signal_from_json(name: str, value: dict[str, Any]) -> Signal:
    """The signal called `name` that `dataclasses.asdict` turned into JSON."""
    kind = name.partition("/")[0]
    if kind == "hidden":
        return HiddenSignal(**value)
    if kind == "attention":
        heads = value["heads"]
        return AttentionSignal(**{**value, "heads": heads if heads == MEAN else tuple(heads)})
    tuples = {field: tuple(value.get(field, ())) for field in ("betas", "draw_betas")}
    return LogitsSignal(**{**value, **tuples})
