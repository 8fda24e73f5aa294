"""Settings of the loss: what a student learns from, and how much of each.

    α · T² · D(teacher ‖ student) + (1 − α) · cross-entropy + Σ λ · term

where each part is a mean over the counted tokens of the whole batch, whatever the batch is cut
into. A term compares one or more pairs of layers and is the mean over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from decant.trainer.loss.schedules import Schedule, Shape, check_schedule

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tv"]
Tail = Literal["bucket", "sampled", "prior", "renormalize"]
HiddenKind = Literal["mse", "cosine"]
AttentionKind = Literal["mse", "kl"]

ONLY_FORWARD: dict[Tail, str] = {
    "renormalize": "the teacher has no mass outside its top-k then, where the student's is",
    "sampled": "draws are right on average only where the teacher's probabilities enter linearly, "
    "as in forward KL",
}
"""Tails that one divergence works with, and why no other does."""


@dataclass(frozen=True)
class Term:
    """What every term that compares layers has."""

    weight: float = 1.0
    """λ ≥ 0 of this term; the others keep theirs."""
    weight_end: float | None = None
    """Where λ goes, as `loss.alpha_end`."""
    weight_schedule: Shape = "linear"
    """How it goes there, as `loss.alpha_schedule`."""
    student_layers: tuple[int, ...] = ()
    """The student's layer of each pair; negative ones count from the end. See `teacher_layers`."""
    teacher_layers: tuple[int, ...] = ()
    """The teacher's layer of each pair; the cache must hold it."""

    @property
    def schedule(self) -> Schedule:
        """λ over a run."""
        return Schedule(self.weight, self.weight_end, self.weight_schedule)

    def check(self, name: str) -> None:
        """ValueError that says `name` if no run could mean this."""
        check_schedule(f"{name}.weight", self.schedule)
        for field in ("weight", "weight_end"):
            weight = getattr(self, field)
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"{name}.{field} is {weight}; it is a factor, 0 or more")
        ours, theirs = list(self.student_layers), list(self.teacher_layers)
        if len(ours) != len(theirs):
            raise ValueError(
                f"{name}: student_layers {ours} and teacher_layers {theirs} are of different "
                f"length, {len(ours)} and {len(theirs)}; they are pairs, the first with the first. "
                "Leave both out for the default"
            )


@dataclass(frozen=True)
class HiddenLoss(Term):
    """Hidden states like the teacher's.

    Layer 0 is the embedding's output, layer i the output of the i-th block, the last one (−1) the
    states after the final norm: this one with the teacher's is the default pair. Where the cache
    holds principal directions of the layer, the student's states are taken along the same ones.
    """

    kind: HiddenKind = "mse"
    """`mse`, the mean over the width of the squared difference; `cosine`, one minus the cosine,
    which is half the `mse` of states scaled to a root mean square of one."""
    projection: bool = False
    """Compare a linear map of the student's states, trained beside the student, kept in
    checkpoints and dropped at export. Needed where the widths differ."""


@dataclass(frozen=True)
class AttentionLoss(Term):
    """Attention maps like the teacher's, over the keys that a query sees.

    Layers count blocks from 0. By default every block whose maps the cache holds is paired with
    the student's block that was cut from it; without one, with the nearest in depth, where blocks
    of a student that was not cut from the teacher lie evenly over it, first on first and last on
    last.
    """

    kind: AttentionKind = "mse"
    """`mse`, the mean over a query's visible keys of the squared difference; `kl`,
    KL(teacher ‖ student) of a query's row in nats."""
    normalize: bool = True
    """Scale each row to sum to one, on both sides: what is stored is rounded. Off takes the maps as
    they are stored, whose rows of one byte a probability sum to one within a few percent."""
    average_heads: bool = False
    """Compare means over the heads of each side. Needed where their numbers differ, and where the
    cache holds the mean only."""


@dataclass(frozen=True)
class Loss:
    """α · T² · D(teacher ‖ student) + (1 − α) · cross-entropy + Σ λ · term.

    Terms are `[[loss.hidden]]` and `[[loss.attention]]` in a file; on the command line the first of
    them is `--loss.hidden.0.weight 0.5`, and so on.
    """

    alpha: float = 0.9
    """Share of the teacher in [0, 1]; 0 is training on hard labels only."""
    alpha_end: float | None = None
    """Where α goes: `alpha` is its value at the first update, this at the last. Unset: it stays."""
    alpha_schedule: Shape = "linear"
    """How it goes there: `linear` in the step, or `cosine`, slow at both ends."""
    temperature: float = 1.0
    """T ≥ 1 of both distributions; higher looks further into the tail."""
    temperature_end: float | None = None
    """Where T goes, as `alpha_end`."""
    temperature_schedule: Shape = "linear"
    """How it goes there, as `alpha_schedule`."""
    divergence: Divergence = "forward_kl"
    """`forward_kl` KL(p‖q), `reverse_kl` KL(q‖p), `jsd` (generalised Jensen–Shannon) or `tv`
    (total variation); p is the teacher. The T² is T for `tv`."""
    mix: float = 0.5
    """Of `jsd`: mix·KL(p‖m) + (1−mix)·KL(q‖m) with m = mix·p + (1−mix)·q. Towards 0 its gradient
    turns into that of forward KL (times mix), towards 1 into that of reverse KL."""
    tail: Tail = "sampled"
    """What stands for the vocabulary outside the stored top-k: `sampled`, tokens drawn from it
    (right on average, up to the T that the capture drew at); `prior`, the corpus' mean tail (an
    estimate); `bucket`, one category with its exact mass (the KL is a lower bound);
    `renormalize`, nothing: the stored tokens alone sum to one (biased)."""
    chunk_tokens: int | None = None
    """Tokens whose logits exist at once. Memory is this times the vocabulary times 4 bytes, twice;
    small chunks make thin matrix products. Unset: 256 on a CPU, on accelerators as many as have
    512 MiB of logits."""
    hidden: tuple[HiddenLoss, ...] = ()
    """Terms that compare hidden states; in a file `[[loss.hidden]]`."""
    attention: tuple[AttentionLoss, ...] = ()
    """Terms that compare attention maps; in a file `[[loss.attention]]`."""

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that compare layers, by name: `hidden[0]`, `attention[0]`, …"""
        kinds: dict[str, tuple[Term, ...]] = {"hidden": self.hidden, "attention": self.attention}
        return {f"{kind}[{i}]": term for kind, some in kinds.items() for i, term in enumerate(some)}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """What may change over a run, by name: `alpha`, `temperature`, `hidden[0].weight`, …"""
        return {
            "alpha": Schedule(self.alpha, self.alpha_end, self.alpha_schedule),
            "temperature": Schedule(
                self.temperature, self.temperature_end, self.temperature_schedule
            ),
            **{f"{name}.weight": term.schedule for name, term in self.terms.items()},
        }

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        for name in ("alpha", "temperature"):
            check_schedule(f"loss.{name}", self.schedules[name])
        for name, term in self.terms.items():
            term.check(f"loss.{name}")
        for name, alpha in (("alpha", self.alpha), ("alpha_end", self.alpha_end)):
            if alpha is not None and not 0 <= alpha <= 1:
                raise ValueError(f"loss.{name} is {alpha}; it is a share, from 0 to 1")
        for name in ("temperature", "temperature_end"):
            temperature = getattr(self, name)
            if temperature is not None and not 1 <= temperature < math.inf:
                raise ValueError(
                    f"loss.{name} is {temperature}; the cache knows the tail's mass for T ≥ 1 only"
                )
        if not 0 < self.mix < 1:
            raise ValueError(
                f"loss.mix is {self.mix}; it lies between 0 and 1. At its ends jsd is zero: use "
                "divergence = forward_kl or reverse_kl"
            )
        if self.tail in ONLY_FORWARD and self.divergence != "forward_kl":
            raise ValueError(
                f"loss.divergence is {self.divergence} with tail = {self.tail}: "
                f"{ONLY_FORWARD[self.tail]}. Use tail = bucket or prior, or forward_kl"
            )
