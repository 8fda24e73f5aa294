"""What the teacher is asked to give for each position, as plain numbers."""

from dataclasses import dataclass

from schemas.signals import LogitsSignal
from schemas.targets import BETAS


@dataclass(frozen=True)
class Wanted:
    """What is kept of a position's distribution; as in signals.LogitsSignal."""

    k: int
    draws: int = 0
    draw_betas: tuple[float, ...] = ()
    betas: tuple[float, ...] = BETAS

    @classmethod
    def of(cls, signal: LogitsSignal) -> "Wanted":
        """What the signal holds."""
        return cls(signal.k, signal.draws, signal.draw_betas, signal.betas)
