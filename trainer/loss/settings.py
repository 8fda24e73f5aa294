"""Settings of the loss. A field's docstring is the help text of its flag.

    α · T² · D(teacher ‖ student) + (1 − α) · cross-entropy + Σ λ · term

Each part is a mean over the counted tokens of the whole batch, also when the batch is split into
microbatches or over devices. A term compares one or more pairs of layers: it is the mean over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from decant.command_line.checks import ANY, Bounds
from decant.served_losses import Asked, Divergence, Tail
from decant.trainer.loss.schedules import Schedule, Shape, check_schedule

HiddenKind = Literal["mse", "cosine"]
HiddenScale = Literal["mean", "sum"]
AttentionKind = Literal["mse", "kl"]
AttentionScale = Literal["mean", "pairs"]

SHARE = Bounds(0, 1)
WEIGHT = Bounds(0, 1_000_000)
TEMPERATURE = Bounds(1, 1000)
"""A cache holds the tail's mass for T ≥ 1 only."""


@dataclass(frozen=True)
class Term:
    """Settings that every term has: its weight λ and the pairs of layers that it compares."""

    weight: Annotated[float, WEIGHT] = 1.0
    """λ ≥ 0, the factor of this term in the loss."""
    weight_end: Annotated[float | None, WEIGHT] = None
    """λ at the last update; `weight` is λ at the first. Unset: λ is constant."""
    weight_schedule: Shape = "linear"
    """The path of λ from first to last update: `linear`, or `cosine`, which is slow at both
    ends."""
    student_layers: Annotated[tuple[int, ...], ANY] = ()
    """The student's layer of each pair. A negative number counts from the end."""
    teacher_layers: Annotated[tuple[int, ...], ANY] = ()
    """The teacher's layer of each pair, in the order of `student_layers`. The cache must hold these
    layers."""

    @property
    def schedule(self) -> Schedule:
        """λ over the updates of a run."""
        return Schedule(self.weight, self.weight_end, self.weight_schedule)

    def check(self, name: str) -> None:
        """ValueError for settings that contradict each other; its text starts with `name`."""
        check_schedule(f"{name}.weight", self.schedule)
        ours, theirs = list(self.student_layers), list(self.teacher_layers)
        if len(ours) != len(theirs):
            raise ValueError(
                f"{name}: student_layers {ours} and teacher_layers {theirs} have different "
                f"lengths, {len(ours)} and {len(theirs)}. They form pairs, first with first. Leave "
                "both out for the default pairs"
            )


@dataclass(frozen=True)
class HiddenLoss(Term):
    """A term that pulls hidden states towards the teacher's.

    Layer 0 is the embedding's output, layer i the output of the i-th block, and the last layer (−1)
    the states after the final norm. By default the last layers of both models are compared. If the
    cache stores a layer along principal directions, the student's states are projected onto the
    same directions.
    """

    kind: HiddenKind = "mse"
    """`mse`: the mean over the width of the squared difference. `cosine`: one minus the cosine,
    which is half the `mse` of states scaled to a root mean square of one."""
    scale: HiddenScale = "mean"
    """For `mse`: `mean` over the width, so that the width does not change the term's size; or `sum`
    over the width, as online trainers often have it."""
    projection: bool = False
    """Map the student's states by a matrix before they are compared. The matrix is trained with
    the student, saved in checkpoints and dropped at export. Required if the widths differ."""

    def check(self, name: str) -> None:
        """As `Term.check`."""
        super().check(name)
        if self.scale == "sum" and self.kind != "mse":
            raise ValueError(
                f"{name}: scale is sum with kind = {self.kind}; a cosine is no sum over the "
                "width. Use kind = mse, or leave out scale"
            )


@dataclass(frozen=True)
class AttentionLoss(Term):
    """A term that pulls attention maps towards the teacher's, over the keys that a query sees.

    Layers count blocks from 0. By default every teacher block whose maps the cache holds is paired
    with the student block that was cut from it, or else with the nearest in depth. Blocks of a
    student that was not cut from the teacher count as spread evenly over the teacher's depth, from
    its first block to its last.
    """

    kind: AttentionKind = "mse"
    """`mse`: the mean over a query's visible keys of the squared difference. `kl`:
    KL(teacher ‖ student) of a query's row, in nats."""
    scale: AttentionScale = "mean"
    """For `mse`: `mean` over counted queries, heads and each query's visible keys. `pairs`: the sum
    over heads of the squared differences, divided by the batch's pairs of a counted query and any
    token of its document, later ones included, as online trainers have it. The two differ by no
    constant factor: `pairs` gives a long row's few visible keys less weight."""
    normalize: bool = True
    """Scale each row of both maps to sum to one, because stored maps are rounded. Off: compare maps
    as they are stored; with one byte a probability their rows sum to one within a few percent."""
    average_heads: bool = False
    """Compare the mean over the student's heads with the mean over the teacher's. Required if the
    models have different numbers of heads or the cache holds only the mean."""

    def check(self, name: str) -> None:
        """As `Term.check`."""
        super().check(name)
        if self.scale == "pairs" and self.kind != "mse":
            raise ValueError(
                f"{name}: scale is pairs with kind = {self.kind}; it divides squared differences. "
                "Use kind = mse, or leave out scale"
            )


@dataclass(frozen=True)
class Loss:
    """α · T² · D(teacher ‖ student) + (1 − α) · cross-entropy + Σ λ · term.

    T² is T for `divergence = tv` and `uld`. A file adds terms as `[[loss.hidden]]` and
    `[[loss.attention]]`; the command line numbers them, as in `--loss.hidden.0.weight 0.5`.
    """

    alpha: Annotated[float | None, SHARE] = None
    """α in [0, 1]: the teacher's share of the loss. 0 trains on hard labels only. Unset: 0.9; for
    `on_policy` 1, because cross-entropy teaches the student its own mistakes."""
    alpha_end: Annotated[float | None, SHARE] = None
    """α at the last update; `alpha` is α at the first. Unset: α is constant."""
    alpha_schedule: Shape = "linear"
    """The path of α from first to last update: `linear`, or `cosine`, which is slow at both
    ends."""
    temperature: Annotated[float, TEMPERATURE] = 1.0
    """T ≥ 1, the temperature of both distributions. A higher T gives the tail more weight."""
    temperature_end: Annotated[float | None, TEMPERATURE] = None
    """T at the last update; `temperature` is T at the first. Unset: T is constant."""
    temperature_schedule: Shape = "linear"
    """The path of T from first to last update, as for `alpha_schedule`."""
    divergence: Divergence = "forward_kl"
    """D, between the teacher p and the student q. `forward_kl`: KL(p‖q). `reverse_kl`: KL(q‖p).
    `jsd`: generalised Jensen–Shannon divergence, see `mix`. `tv`: total variation. For students
    with another tokenizer: `uld` compares the sorted probabilities of both, whichever tokens they
    belong to; `gold` is w·`jsd` over the tokens that both vocabularies have, and 1−w times `uld`
    over all others, with w their share of the teacher's vocabulary. `gold` needs a cache by
    `decant align CACHE --targets matched`. `on_policy`, for caches of rollouts (docs/on-policy.md):
    −min(ρA, clip(ρ)A) at every token that a student wrote, with A = log p − log q of that token and
    ρ the ratio of q to its writer's probability. It reads no top-k and no tail; T is 1."""
    mix: Annotated[float, Bounds(1e-6, 1 - 1e-6)] = 0.5
    """For `jsd` and `gold`: mix·KL(p‖m) + (1−mix)·KL(q‖m) with m = mix·p + (1−mix)·q. It is zero
    for mix = 0 and for mix = 1. Near 0 its gradient is that of forward KL times mix; near 1 it is
    that of reverse KL times 1−mix."""
    clip: Annotated[float, Bounds(1e-6, 1_000_000)] = 0.2
    """For `on_policy`: ε; ρ is clipped to 1 − ε … 1 + ε, as in PPO. A token whose probability has
    moved that far in the direction of its advantage is no longer learned from."""
    anchor: Annotated[float, WEIGHT] = 0.0
    """For `on_policy`: λ ≥ 0, the weight of an estimate of KL(student ‖ writer), which holds the
    student near the one that wrote the rollouts. 0: clipping alone does."""
    tail: Tail | None = None
    """How the loss represents the teacher's tail, the vocabulary outside the stored top-k. Unset:
    chosen by what the cache holds, by T and by the size of an update; the log says which and why.
    `counts`: how often each token was drawn from the whole distribution (T = 1; the top-k is not
    used). `sketch`: the tail's shape position by position (any T). `sampled`: tokens drawn from the
    tail (right on average, up to the T of the capture's draws). `prior`: the mean tail of the
    corpus (an estimate). `bucket`: one category with the tail's exact mass (the KL is a lower
    bound). `renormalize`: no tail: stored tokens sum to one (biased)."""
    chunk_tokens: Annotated[int | None, Bounds(1, 1 << 24)] = None
    """Tokens whose logits exist at once. They take twice chunk_tokens · vocabulary · 4 bytes. Fewer
    tokens make smaller, slower matrix products. Unset: 256 on a CPU; on accelerators the number
    whose logits take 512 MiB."""
    hidden: tuple[HiddenLoss, ...] = ()
    """Terms that compare hidden states; in a file `[[loss.hidden]]`."""
    attention: tuple[AttentionLoss, ...] = ()
    """Terms that compare attention maps; in a file `[[loss.attention]]`."""

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that compare layers, by name: `hidden[0]`, `attention[0]`, …"""
        kinds: dict[str, tuple[Term, ...]] = {"hidden": self.hidden, "attention": self.attention}
        return {
            f"{kind}[{i}]": term for kind, terms in kinds.items() for i, term in enumerate(terms)
        }

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The values that may change over a run: `alpha`, `temperature`, `hidden[0].weight`, …"""
        return {
            "alpha": Schedule(self.first_alpha, self.alpha_end, self.alpha_schedule),
            "temperature": Schedule(
                self.temperature, self.temperature_end, self.temperature_schedule
            ),
            **{f"{name}.weight": term.schedule for name, term in self.terms.items()},
        }

    @property
    def first_alpha(self) -> float:
        """α at the first update."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.divergence == "on_policy" else 0.9

    def __post_init__(self) -> None:
        """ValueError for settings that contradict each other."""
        for name in ("alpha", "temperature"):
            check_schedule(f"loss.{name}", self.schedules[name])
        for name, term in self.terms.items():
            term.check(f"loss.{name}")
        self.asked.require_consistent()

    @property
    def asked(self) -> Asked:
        """What the loss asks of a cache's targets."""
        ends = self.schedules["temperature"].ends
        return Asked(self.divergence, self.tail, tuple(dict.fromkeys(ends)), prefix="loss.")
