"""Which losses a cache's targets serve, and the refusal of all others.

`decant train`, loops of one's own and `decant.torch` ask here, so that none of them accepts a loss
that another refuses. Imports nothing, because settings ask here too and `--help` must be quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tv", "uld", "gold", "on_policy"]
Tail = Literal["bucket", "sampled", "prior", "renormalize", "counts", "sketch"]
ADD = "add it to this cache: the same precompute config with"
ADD_COUNTS = f"{ADD} --signals.logits.counts 100"
ADD_SKETCH = f"{ADD} --signals.logits.sketch.rank 256"
ONLY_FORWARD: dict[Tail, str] = {
    "renormalize": "it gives the teacher no mass outside its top-k, where the student has some",
    "sampled": "draws are right on average only where the teacher's probabilities enter linearly, "
    "as in forward KL",
    "counts": "counts are right on average only where the teacher's probabilities enter linearly, "
    "as in forward KL",
}
"""Tails that work with forward KL only, and the reason."""
_WEAK_FROM: dict[Tail, float] = {"renormalize": 2, "bucket": 2, "prior": 2, "sampled": 4}
"""T from which a student learns little from a tail."""
FEWEST_DRAWS = 1.0
"""Draws of a token in an update, on average over the vocabulary, below which a sketch teaches more
than counts, as measured in docs/benchmarks.md."""
BY_RANK: tuple[Divergence, ...] = ("uld", "gold")
"""Divergences that compare sorted probabilities."""


@dataclass(frozen=True)
class Held:
    """What all of some caches, or a batch, hold for a loss; see `schemas/reading/held.py`."""

    k: int
    counts: bool = False
    sketch: bool = False
    drawn_at: float | None = None
    """The highest T that the tail draws are made for. None: no draws."""
    prior: bool = False
    labels: bool = False
    """The teacher's log-probabilities of the text's own tokens."""
    writers: bool = False
    """Log-probabilities by the model that wrote the text."""
    unmatched: bool = False
    """Which of the teacher's tokens the student has too."""
    tail_at_1: bool = False
    """The tail's mass is known at T = 1 only: see `LogitsSignal`."""

    def __str__(self) -> str:
        parts = {
            f"the top {self.k} and their tail's mass": self.k > 0,
            f"tail draws up to T = {self.drawn_at or 1:.4g}": self.drawn_at is not None,
            "counts": self.counts,
            "a sketch": self.sketch,
        }
        return ", ".join(name for name, there in parts.items() if there)


@dataclass(frozen=True)
class Asked:
    """What a loss asks of the targets."""

    divergence: Divergence
    tail: Tail | None
    temperatures: tuple[float | None, ...]
    """T, or T at the first and at the last update. None: a JAX array, whose value no check
    knows."""
    prefix: str = ""
    """`loss.` for settings of a command, whose flags errors then name."""

    def require_consistent(self) -> None:
        """ValueError for settings that contradict each other, whatever the targets are."""
        if self.tail == "counts" and not self._at_1:
            raise ValueError(
                f"{self._t_is} with tail = counts: counts are drawn at T = 1 and say nothing about "
                f"another T. Use {self._say('temperature', 1)}, or tail = sketch, which serves "
                "every T"
            )
        if self.divergence == "on_policy":
            self._require_on_policy()
        if self.divergence in BY_RANK and self.tail not in (None, "bucket"):
            raise ValueError(
                f"{self.prefix}divergence is {self.divergence} with tail = {self.tail}: sorted "
                f"probabilities have no ids, so the tail is one category. Leave {self.prefix}tail "
                "out"
            )
        if self.tail in ONLY_FORWARD and self.divergence != "forward_kl":
            raise ValueError(
                f"{self.prefix}divergence is {self.divergence} with tail = {self.tail}: "
                f"{ONLY_FORWARD[self.tail]}. Use tail = sketch, prior or bucket, or forward_kl"
            )

    def best_tail(self, held: Held, *, draws_of_token: float | None = None) -> Tail | None:
        """The tail of a loss that leaves it unset; None for "on_policy", which reads none.

        At T = 1 throughout: counts, else a sketch, else draws. With any T > 1: a sketch, else draws
        up to the T that they were made for. Where none of these is possible: the prior, else the
        bucket. `draws_of_token` is how often the counts of an update draw a token on average; below
        `FEWEST_DRAWS` a sketch comes before counts. None: unknown. ValueError if no tail of these
        targets fits.
        """
        if self.divergence == "on_policy":
            return None
        if self.divergence in BY_RANK and held.k:
            return "bucket"
        forward = self.divergence == "forward_kl"
        drawn = forward and held.k > 0 and (held.drawn_at or 0) + 1e-6 >= self.highest
        sketched = held.sketch and held.k > 0
        few = draws_of_token is not None and draws_of_token < FEWEST_DRAWS
        possible: dict[Tail, bool] = {
            "counts": forward and held.counts and self._at_1 and not (few and sketched),
            "sketch": sketched,
            "sampled": drawn,
            "prior": held.prior and held.k > 0,
            "bucket": held.k > 0,
        }
        for tail, fits in possible.items():
            if fits:
                return tail
        raise ValueError(
            f"these targets are {held}, which serve forward_kl at T = 1 only, but this loss is "
            f"{self.divergence} at T up to {self.highest:.4g}. Use {self._say('temperature', 1)} "
            f"and {self._say('divergence', 'forward_kl')}, or capture with --signals.logits.k 8"
        )

    def weakness(self, tail: Tail, held: Held) -> str | None:
        """What to say about a tail from which a student learns little at this T, if it does."""
        if self.highest < _WEAK_FROM.get(tail, float("inf")):
            return None
        better = f"{self.prefix}tail = sketch" if held.sketch else f"sketches: {ADD_SKETCH}"
        return (
            f"At T = {self.highest:.4g} a student learns little from it (docs/benchmarks.md); "
            f"better are {better}"
        )

    def require_held(self, held: Held, *, where: str) -> None:
        """ValueError if the targets of `where`, a cache or a batch, do not serve the loss."""
        if self.divergence == "gold" and not held.unmatched:
            raise ValueError(
                f"{where}: does not say which of the teacher's tokens the student has too, which "
                f"{self.prefix}divergence = gold compares apart. Use `decant align CACHE "
                "--tokenizer PATH --targets matched`, or uld or forward_kl"
            )
        if held.tail_at_1 and not self._at_1:
            raise ValueError(
                f"{where}: was aligned from a cache without a sketch, so its tails are known at "
                f"T = 1 only, but {self._t_is}. Use {self._say('temperature', 1)}, or add a sketch "
                "to the first cache and align again: the same precompute config with "
                "--signals.logits.sketch.rank 256"
            )
        if self.divergence == "on_policy":
            self._require_written(held, where)
        for name, there, remedy in (
            ("counts", held.counts, ADD_COUNTS),
            ("sketch", held.sketch, ADD_SKETCH),
        ):
            if self.tail == name and not there:
                raise ValueError(
                    f"{where}: holds {held}, but no {name}, which {self.prefix}tail = {name} "
                    f"learns from. Leave {self.prefix}tail out for the best that it holds, or "
                    f"{remedy}"
                )
        if not held.k and self.tail not in (None, "counts"):
            raise ValueError(
                f"{where}: holds {held}, and no top-k, which {self.prefix}tail = {self.tail} "
                f"learns from. Use {self._say('tail', 'counts')}, or capture with "
                "--signals.logits.k 8"
            )
        if self.tail == "sampled":
            self._require_drawn(held, where)

    def _require_on_policy(self) -> None:
        if not self._at_1:
            raise ValueError(
                f"{self._t_is} with divergence = on_policy: the log-probabilities of teacher and "
                f"writer are those at T = 1. Use {self._say('temperature', 1)}, or reverse_kl, "
                "which serves every T"
            )
        if self.tail is not None:
            raise ValueError(
                f"{self.prefix}tail is {self.tail} with divergence = on_policy, which reads no "
                f"tail: only the log-probability of the written token. Leave {self.prefix}tail "
                "out, or use reverse_kl"
            )

    def _require_written(self, held: Held, where: str) -> None:
        if not held.labels:
            raise ValueError(
                f"{where}: holds no teacher's log-probabilities of the texts' own tokens, which "
                "divergence = on_policy learns from. Capture the texts again with this release"
            )
        if not held.writers:
            raise ValueError(
                f"{where}: its texts come without the log-probabilities of the model that wrote "
                "them, which divergence = on_policy learns from. Write rollouts with `decant "
                "generate RUN --prompts FILE --jsonl --logprobs --output rollouts.jsonl` and "
                "capture them (docs/on-policy.md), or use "
                f"{self._say('divergence', 'forward_kl')}"
            )

    def _require_drawn(self, held: Held, where: str) -> None:
        if held.drawn_at is None:
            raise ValueError(
                f"{where}: holds {held}, but no draws from the tail, which {self.prefix}tail = "
                f"sampled learns from. Leave {self.prefix}tail out for the best that it holds, or "
                "capture with --signals.logits.draws 16"
            )
        if self.highest > held.drawn_at + 1e-6:
            raise ValueError(
                f"{where}: its tails were drawn from at T up to {held.drawn_at:.4g}, but "
                f"{self._t_is}, where a few draws would weigh more than all others. Leave "
                f"{self.prefix}tail out for the best that it holds, or capture with "
                f"--signals.logits.draws 16 --signals.logits.draw-temperatures 1 "
                f"{self.highest:.4g}"
            )

    @property
    def highest(self) -> float:
        """The highest T that is known."""
        return max((t for t in self.temperatures if t is not None), default=1.0)

    @property
    def _at_1(self) -> bool:
        return all(t == 1 for t in self.temperatures)

    @property
    def _t_is(self) -> str:
        """`loss.temperature is up to 2`."""
        if None in self.temperatures:
            return f"{self.prefix}temperature is a JAX array, whose value no check knows"
        upto = "up to " if self.prefix else ""
        return f"{self.prefix}temperature is {upto}{self.highest:.4g}"

    def _say(self, name: str, value: object) -> str:
        """How to give a setting: as a flag, or as an argument in Python."""
        return f"--{self.prefix}{name} {value}" if self.prefix else f"{name}={value!r}"
