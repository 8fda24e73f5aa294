"""How far what is stored may be from the teacher, and why: the one table that `verify` judges by.

An allowance is that of how the teacher computes plus that of how its outputs are stored. The
teacher's own part is there because padding, packing and batches change the order of sums: the
same weights give other last bits in another program.
"""

from dataclasses import dataclass

from decant.schemas.codecs import Profile
from decant.schemas.signals import AttentionDtype, HiddenDtype


@dataclass(frozen=True)
class Limits:
    """Largest mean, 99th percentile and maximum over positions that pass."""

    mean: float
    p99: float
    max: float

    def __add__(self, other: "Limits") -> "Limits":
        return Limits(self.mean + other.mean, self.p99 + other.p99, self.max + other.max)


@dataclass(frozen=True)
class Rounding:
    """What a teacher that computes in one dtype may be off from itself in another program."""

    kl: Limits
    """Nats, at any T ≥ 1."""
    tail: Limits
    """Share of the distribution."""
    logprob: Limits
    """Nats, of a single id."""
    states: Limits
    """Of a hidden state's length."""
    maps: Limits
    """Total variation of a query's row."""
    tie: float
    """Nats below the k-th log-probability at which an id may still have been the k-th."""


ROUNDING = {
    # Canary rows of another worker pass at a mean of 1e-6 (calibration/canary.py). What float32
    # programs differ by is 1e-5 of a logit; Hugging Face's differ from ours by 1.4e-4 (README).
    "float32": Rounding(
        kl=Limits(1e-6, 2e-6, 1e-5),
        tail=Limits(1e-5, 1e-4, 1e-3),
        logprob=Limits(1e-4, 1e-3, 1e-2),
        states=Limits(1e-4, 1e-3, 1e-2),
        maps=Limits(1e-4, 1e-3, 1e-2),
        tie=1e-3,
    ),
    # Canaries pass at 1e-3. bfloat16 has 8 bits: a logit of 20 is known to a tenth, single
    # positions are off by ten and more times the mean.
    "bfloat16": Rounding(
        kl=Limits(1e-3, 1e-2, 5e-2),
        tail=Limits(1e-2, 5e-2, 0.2),
        logprob=Limits(0.1, 0.5, 2.0),
        states=Limits(0.02, 0.05, 0.3),
        maps=Limits(0.02, 0.1, 0.5),
        tie=0.5,
    ),
}

_EXACT = Limits(0.0, 0.0, 0.0)
_LEVELS = Limits(1.1e-4, 2.5e-4, 1e-3)
STORED_KL: dict[Profile, Limits] = {
    # Every bit is kept; the tail's nodes among them, so nothing is interpolated at T = 1, 2, 4.
    "lossless": _EXACT,
    # README and benchmarks/codecs.py, 730,576 positions: 9e-5, 1.8e-4, 2.3e-4 at T = 1.
    "compact": _LEVELS,
    "fast": _LEVELS,
}
_THIRTY_SECONDS = Limits(2e-3, 1e-2, 2e-2)
STORED_TAIL: dict[Profile, Limits] = {
    "lossless": _EXACT,
    # Multiples of 1/32 nat, 1.6% at most of a mass t, of which t·(1 − t) is left when head and
    # tail sum to one; and the head's own rounding. On the embedded teacher 6e-4, 4e-3, 7e-3.
    "compact": _THIRTY_SECONDS,
    "fast": _THIRTY_SECONDS,
}
_EIGHTHS = Limits(4e-2, 0.1, 0.15)
STORED_DRAWS: dict[Profile, Limits] = {
    "lossless": _EXACT,
    # Multiples of 1/8 nat: 1/16 at most and half of that on average, and what makes head and
    # tail one distribution again.
    "compact": _EIGHTHS,
    "fast": _EIGHTHS,
}
STORED_STATES: dict[HiddenDtype, Limits] = {
    # Half of the last place of 8 bits, at most 2⁻⁸ (README: 0.17 / 0.26 / 0.31%).
    "bfloat16": Limits(0.003, 0.004, 0.004),
    # README: 0.69 / 0.87 / 1.05%; a width of few directions has fewer numbers to average over.
    "int8": Limits(0.01, 0.015, 0.02),
}
STORED_MAPS: dict[AttentionDtype, Limits] = {
    # README: 0.0007 / 0.0012 / 0.0015, at most 2⁻⁹ of each probability, halved.
    "bfloat16": Limits(0.001, 0.002, 0.004),
    # README: 0.008 / 0.014 / 0.016: 3.2% of a probability at most, halved.
    "uint8-log": Limits(0.01, 0.016, 0.02),
}
MASS = Limits(1e-5, 1e-4, 1e-3)
"""|Σ head + tail − 1|: sums of float32 numbers, whatever is stored and however it was computed."""
SPELLED = 0.99
"""Least share of tokens that the cache's tokenizer makes again of the text they stand for."""
