"""Settings of the loss, with the defaults and checks of `decant train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from decant.served_losses import Asked, Divergence, Tail

TAILS = get_args(Tail)
DIVERGENCES = get_args(Divergence)


@dataclass(frozen=True)
class Settings:
    """The fields mean what they mean in `[loss]` of `decant train`, see `losses.loss`."""

    temperature: float = 1.0
    alpha: float | None = None
    """None: 0.9; for "on_policy" 1."""
    tail: Tail | None = "bucket"
    """Already chosen, if the caller left it unset. None: "on_policy" reads none."""
    divergence: Divergence = "forward_kl"
    mix: float = 0.5
    chunk_tokens: int | None = None
    clip: float = 0.2
    anchor: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for values out of range, or settings that contradict each other."""
        if self.tail is not None:
            _require_one_of("tail", self.tail, TAILS)
        _require_one_of("divergence", self.divergence, DIVERGENCES)
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}; expected {least:,} to {most:,}")
        self.asked.require_consistent()
        if self.tail is None and self.divergence != "on_policy":
            raise ValueError(f"divergence is {self.divergence}, which needs a tail")

    @property
    def asked(self) -> Asked:
        """What the loss asks of the targets."""
        return Asked(self.divergence, self.tail, (self.temperature,))

    @property
    def teachers_share(self) -> float:
        """α."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.divergence == "on_policy" else 0.9

    @property
    def of_ids(self) -> Divergence:
        """The divergence between probabilities of the same ids. ULD has none: its forward KL is
        reported, but not learned from."""
        by_rank: dict[Divergence, Divergence] = {"uld": "forward_kl", "gold": "jsd"}
        return by_rank.get(self.divergence, self.divergence)

    @property
    def beta(self) -> float:
        """1/T."""
        return 1 / self.temperature

    @property
    def scale(self) -> float:
        """The factor that keeps the gradient's size as T grows: T², or T for total variation."""
        return self.temperature if self.of_ids == "tv" else self.temperature**2

    @property
    def dense(self) -> bool:
        """Whether every token is a category: the divergence has no shortcut for this tail."""
        shortcut = self.divergence in ("forward_kl", "on_policy")
        return self.tail in ("prior", "sketch") and not shortcut

    def chunk_length(self, *, device: str, vocabulary: int) -> int:
        """Positions whose logits exist at once."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        # As `decant train`: a CPU's caches hold few logits, accelerators want large products.
        return 256 if device == "cpu" else max(1, (1 << 27) // vocabulary)


_BOUNDS = {
    "temperature": (1, 1000),
    "alpha": (0, 1),
    "mix": (1e-6, 1 - 1e-6),
    "chunk_tokens": (1, 1 << 24),
    "clip": (1e-6, 1_000_000),
    "anchor": (0, 1_000_000),
}
"""As in `[loss]` of `decant train`."""


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
