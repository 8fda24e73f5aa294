"""Settings of the loss, with the defaults and checks of `decant train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tv"]
Tail = Literal["bucket", "sampled", "prior", "renormalize", "counts", "sketch"]
TAILS = get_args(Tail)
DIVERGENCES = get_args(Divergence)
ONLY_IN_JAX = ("uld", "gold", "on_policy")
"""Divergences of `decant train` that are not built here."""
ONLY_FORWARD: tuple[Tail, ...] = ("renormalize", "sampled", "counts")
"""Tails that work with forward KL only."""


@dataclass(frozen=True)
class Settings:
    """The fields mean what they mean in `[loss]` of `decant train`, see `losses.loss`."""

    temperature: float = 1.0
    alpha: float = 0.9
    tail: Tail = "bucket"
    """Already chosen, if the caller left it unset: see `tail_choice.py`."""
    divergence: Divergence = "forward_kl"
    mix: float = 0.5
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        """ValueError for values out of range, or settings that contradict each other."""
        _require_one_of("tail", self.tail, TAILS)
        if self.divergence in ONLY_IN_JAX:
            raise ValueError(
                f"divergence is {self.divergence}, which `decant train` has, but decant.torch does "
                f"not; expected one of {', '.join(DIVERGENCES)}"
            )
        _require_one_of("divergence", self.divergence, DIVERGENCES)
        for name, (least, most) in {"temperature": (1, 1000), "alpha": (0, 1)}.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; expected {least} to {most}")
        if not 0 < self.mix < 1:
            raise ValueError(f"mix is {self.mix}; expected a number between 0 and 1")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}; expected at least 1")
        if self.tail in ONLY_FORWARD and self.divergence != "forward_kl":
            raise ValueError(
                f"divergence is {self.divergence} with tail = {self.tail}, which works with "
                "forward_kl only. Use tail = sketch, prior or bucket, or forward_kl"
            )
        if self.tail == "counts" and self.temperature != 1:
            raise ValueError(
                f"temperature is {self.temperature:.4g} with tail = counts: draws at T = 1 say "
                "nothing about other temperatures. Use tail = sketch, prior or bucket, or T = 1"
            )

    @property
    def beta(self) -> float:
        """1/T."""
        return 1 / self.temperature

    @property
    def scale(self) -> float:
        """The factor that keeps the gradient's size as T grows: T², or T for total variation."""
        return self.temperature if self.divergence == "tv" else self.temperature**2

    @property
    def dense(self) -> bool:
        """Whether every token is a category: the divergence has no shortcut for this tail."""
        return self.tail in ("prior", "sketch") and self.divergence != "forward_kl"

    def chunk_length(self, *, device: str, vocabulary: int) -> int:
        """Positions whose logits exist at once."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        # As `decant train`: a CPU's caches hold few logits, accelerators want large products.
        return 256 if device == "cpu" else max(1, (1 << 27) // vocabulary)


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
