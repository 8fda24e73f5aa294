"""The tolerances of `verify`: how far stored values may be from the teacher's, and why.

A tolerance is the sum of two: one for how the teacher computes, one for how its outputs are stored.
The first is needed because padding, packing and batches change the order of sums, so that the same
weights give other last bits in another program.
"""

import math
from dataclasses import dataclass

from decant.schemas.codecs import Profile
from decant.schemas.signals import AttentionDtype, HiddenDtype

_FEW = 100
"""Fewer values than this have no 99th percentile apart from their maximum."""


@dataclass(frozen=True)
class Limits:
    """Upper limits on mean, 99th percentile and maximum over positions."""

    mean: float
    p99: float
    max: float

    def __add__(self, other: "Limits") -> "Limits":
        return Limits(self.mean + other.mean, self.p99 + other.p99, self.max + other.max)

    def of_few(self, count: int) -> "Limits":
        """The limits for `count` values: a mean of few scatters, and their p99 is their maximum."""
        mean = self.mean + 2 * (self.p99 - self.mean) / math.sqrt(max(count, 1))
        return Limits(mean, self.p99 if count >= _FEW else self.max, self.max)


ANY = Limits(1e30, 1e30, 1e30)
"""Of figures that inform: a sketch's KL depends on the teacher and on the rank."""


@dataclass(frozen=True)
class Rounding:
    """How far the outputs of two programs may be apart if both run the same teacher."""

    kl: Limits
    """Nats, at any T ≥ 1."""
    tail: Limits
    """Error of the tail's probability."""
    logprob: Limits
    """Nats, of a single id."""
    states: Limits
    """Error of a hidden state, relative to its length."""
    maps: Limits
    """Total variation distance of a query's row."""
    steps: Limits
    """Error of a sketch's numbers, in units of the last one's deviation."""
    tie: float
    """Nats that an id may be below the k-th log-probability and still have been the k-th."""


ROUNDING = {
    # Canary rows of another worker pass at a mean of 1e-6 (calibration/canary.py). Two float32
    # programs differ by 1e-5 of a logit; Hugging Face's differs from ours by 1.4e-4
    # (docs/benchmarks).
    "float32": Rounding(
        kl=Limits(1e-6, 2e-6, 1e-5),
        tail=Limits(1e-5, 1e-4, 1e-3),
        logprob=Limits(1e-4, 1e-3, 1e-2),
        states=Limits(1e-4, 1e-3, 1e-2),
        maps=Limits(1e-4, 1e-3, 1e-2),
        steps=Limits(1e-3, 1e-2, 5e-2),
        tie=1e-3,
    ),
    # Canary rows pass at 1e-3. bfloat16 has 8 bits: a logit of 20 is known to a tenth, and single
    # positions are off by ten times the mean and more.
    "bfloat16": Rounding(
        kl=Limits(1e-3, 1e-2, 5e-2),
        tail=Limits(1e-2, 5e-2, 0.2),
        logprob=Limits(0.1, 0.5, 2.0),
        states=Limits(0.02, 0.05, 0.3),
        maps=Limits(0.02, 0.1, 0.5),
        steps=Limits(0.5, 2.0, 8.0),
        tie=0.5,
    ),
}

_EXACT = Limits(0.0, 0.0, 0.0)
_LEVELS = Limits(1.1e-4, 2.5e-4, 1e-3)
STORED_KL: dict[Profile, Limits] = {
    # Every bit is kept. T = 1, 2 and 4 are nodes of the tail, so nothing is interpolated.
    "lossless": _EXACT,
    # Measured (docs/benchmarks; 730,576 positions): 9e-5, 1.8e-4, 2.3e-4 at T = 1.
    "compact": _LEVELS,
    "fast": _LEVELS,
}
_THIRTY_SECONDS = Limits(2e-3, 1e-2, 2e-2)
STORED_TAIL: dict[Profile, Limits] = {
    "lossless": _EXACT,
    # Stored in multiples of 1/32 nat: at most 1.6% of a mass t. Scaling head and tail to sum to
    # one leaves t·(1 − t) of that; the head's own rounding adds to it. Measured on the embedded
    # teacher: 6e-4, 4e-3, 7e-3.
    "compact": _THIRTY_SECONDS,
    "fast": _THIRTY_SECONDS,
}
_EIGHTHS = Limits(4e-2, 0.1, 0.15)
STORED_DRAWS: dict[Profile, Limits] = {
    "lossless": _EXACT,
    # Stored in multiples of 1/8 nat: off by 1/16 at most, half of that on average. Scaling head
    # and tail to sum to one adds to it.
    "compact": _EIGHTHS,
    "fast": _EIGHTHS,
}
_SIXTY_FOURTH = Limits(1 / 64, 1 / 64, 1 / 64)
STORED_LABELS: dict[Profile, Limits] = {
    "lossless": _EXACT,
    # Stored in multiples of 1/32 nat.
    "compact": _SIXTY_FOURTH,
    "fast": _SIXTY_FOURTH,
}
HALF_STEP = Limits(0.3, 0.5, 0.5)
"""Rounding of a sketch, in steps: evenly spread, so 1/4 on average."""
SKETCH_HEAD = Limits(1e-3, 5e-3, 2e-2)
"""Error of the sketch's head relative to its root mean square: float16 has 11 bits, and the
reference solves for the same head in float64."""
SKETCH_BIAS = Limits(1e-4, 1e-3, 1e-2)
"""Nats: rounding of float32 sums over the width."""
SKETCH_OFFSETS = Limits(2e-3, 0.1, 0.5)
"""Nats that offsets add to the KL. They are fitted to the calibration sample, where they take some
off. Measured: −0.018, 0.010, 0.028 at T = 1 and less at other T (SmolLM2, 8 rows); −0.0009, 0.035,
0.14 with the default's coarse numbers (16 rows), and 0.066 for 99% of an adaptive head's positions
beside five numbers of a toy teacher."""
STORED_STATES: dict[HiddenDtype, Limits] = {
    # Half of the last of 8 bits: at most 2⁻⁸. Measured (docs/benchmarks): 0.17 / 0.26 / 0.31%.
    "bfloat16": Limits(0.003, 0.004, 0.004),
    # Measured (docs/benchmarks): 0.69 / 0.87 / 1.05%. A small width averages over fewer numbers.
    "int8": Limits(0.01, 0.015, 0.02),
}
STORED_MAPS: dict[AttentionDtype, Limits] = {
    # Measured (docs/benchmarks): 0.0007 / 0.0012 / 0.0015; at most 2⁻⁹ of each probability, halved.
    "bfloat16": Limits(0.001, 0.002, 0.004),
    # Measured (docs/benchmarks): 0.008 / 0.014 / 0.016; at most 3.2% of each probability, halved.
    "uint8-log": Limits(0.01, 0.016, 0.02),
}
MASS = Limits(1e-5, 1e-4, 1e-3)
"""|Σ head + tail − 1|: rounding of float32 sums, for every codec and compute dtype."""
SPELLED = 0.99
"""Least share of tokens that decoding and encoding again must return (`retokenise.py`)."""
