"""What the teacher is asked to give for each position, as plain numbers."""

from dataclasses import dataclass

from schemas.manifest import Signal


@dataclass(frozen=True)
class Wanted:
    """What is kept of a position's distribution; as in manifest.Signal."""

    k: int
    draws: int = 0
    draw_betas: tuple[float, ...] = ()
    threshold: float | None = None

    @classmethod
    def of(cls, signal: Signal) -> "Wanted":
        """What the signal holds."""
        return cls(signal.k, signal.draws, signal.draw_betas, signal.threshold)
