"""Settings of the trainer's commands. A field's docstring gives its unit and its consequence.

What the cache knows (k, tokenizer, sequence length, vocabulary) is never repeated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from decant.models.mesh.remat import Remat
from decant.trainer.loss.settings import AttentionLoss, HiddenLoss, Loss

__all__ = [
    "AttentionLoss",
    "Data",
    "Distributed",
    "Evaluate",
    "Export",
    "Generate",
    "HiddenLoss",
    "Keep",
    "Loss",
    "MixedCache",
    "Optimiser",
    "Report",
    "Student",
    "StudentMesh",
    "Train",
]


@dataclass(frozen=True)
class Student:
    """Where the student's first weights come from."""

    init: Literal["cut", "checkpoint", "scratch"] = "cut"
    """`cut`: some blocks of `source`; `checkpoint`: all of it; `scratch`: random weights."""
    source: str = "embedded"
    """Checkpoint to cut or to start from: a Hugging Face directory, a hub id, a `.gguf` file or
    `embedded`. Read once: the initial student is saved in the run's directory."""
    layers: int | tuple[int, ...] = 8
    """Blocks to cut, counted from 0. One number is a count, spread evenly over the source with its
    first and last block. For `scratch` without `config`: how many blocks."""
    config: Path | None = None
    """For `scratch`: a Hugging Face `config.json`. Unset: the teacher's, as the cache holds it."""
    hidden_size: int | None = None
    """For `scratch`: width, instead of the config's."""
    intermediate_size: int | None = None
    """For `scratch`: width of the MLP, instead of the config's."""
    num_heads: int | None = None
    """For `scratch`: query heads, instead of the config's."""
    num_kv_heads: int | None = None
    """For `scratch`: key/value heads, instead of the config's."""


@dataclass(frozen=True)
class MixedCache:
    """A cache whose train rows are mixed with the main one's."""

    path: Path = Path()
    """A sealed cache with the main one's tokenizer and row length; of the same teacher, of another,
    or of none (`decant tokenise`): its rows are then learned from their next tokens
    alone, as with `loss.alpha = 0`."""
    weight: float = 1.0
    """Rows of it for each row of the main cache, over any stretch of the run."""


@dataclass(frozen=True)
class Data:
    """Which rows, in which order, how many at a time."""

    batch_rows: int = 2
    """Rows of an update. Few, because a small cache holds few: more updates beat larger ones."""
    microbatches: int = 1
    """Pieces that an update's rows are computed in, one after another; divides `batch_rows`.
    More need less memory and change nothing but rounding."""
    epochs: int = 1
    """Passes over the main cache's train rows; each is shuffled anew."""
    steps: int | None = None
    """Updates; overrides `epochs` when set."""
    seed: int = 0
    """Of the order of rows and of weights from scratch."""
    caches: tuple[MixedCache, ...] = ()
    """Caches mixed in with the main one; in a file `[[data.caches]]`. Epochs are the main one's,
    and held-out rows are always its own."""


@dataclass(frozen=True)
class Optimiser:
    """How gradients move the weights, by how much, and which weights stay.

    Parameters are named in patterns: `embedding`, `layers.0.query`, `layers.*norm`, `final_norm`,
    `head`; `*` is any characters, and `layers.0` is all of that block.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """`adafactor` keeps a row and a column of numbers a matrix instead of two moments a weight, and
    its learning rate is relative to the size of the weights: 1e-2, say. `muon` orthogonalises the
    updates of the blocks' matrices, of the size of AdamW's; all else is AdamW's."""
    learning_rate: float = 1e-3
    """At its peak, after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: falling to the last update on a cosine or a line, staying, or (`wsd`)
    staying and then falling on a line over the last `decay_fraction` of the run."""
    warmup_steps: int = 10
    """Updates of linear growth from zero; at most the whole run."""
    decay_fraction: float = 0.2
    """Of the run's updates, in which `wsd` falls."""
    final_fraction: float = 0.1
    """Of the peak, reached at the last update; not with `constant`."""
    weight_decay: float = 0.01
    """Decoupled: times the learning rate, off each weight."""
    no_decay: tuple[str, ...] = ("*norm", "*bias")
    """Parameters that weight decay leaves alone."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, to the bit: no gradient, no moments. Freezing a tied
    embedding freezes the head too."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient; longer ones are scaled down to it."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's running mean."""
    beta2: float = 0.98
    """Decay of its running square. Lower than usual: short runs cannot wait for 1/(1−β₂) steps."""
    epsilon: float = 1e-8
    """Added to the root of the running square."""
    momentum: float = 0.95
    """Muon's decay of the gradient's running mean."""

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(
                f"optimiser.decay_fraction is {self.decay_fraction}; it is a share of the run's "
                "updates, above 0 and at most 1"
            )


@dataclass(frozen=True)
class StudentMesh:
    """How the devices of all processes share the work. Results are those of one but for rounding,
    and a run may go on with another shape."""

    data: int | None = None
    """Groups of devices, each with all weights and its share of a batch's rows. Unset: as many as
    there are devices for."""
    fsdp: int = 1
    """Devices of a group that keep weights, gradients and optimiser state in shares, and split the
    group's rows. For a student that one device cannot hold."""
    tensor: int = 1
    """Devices that split every matrix product and the vocabulary over the same rows. For one whose
    single block, or logits, one device cannot hold; they talk in every block."""


@dataclass(frozen=True)
class Distributed:
    """Several processes that train one student: the same command in each, but for `process`. They
    share the file system. Without these settings there is one process."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 can be reached by the others; any free port."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    detect: bool = False
    """Let jax find out what is not given, on Slurm, Open MPI, Kubernetes and TPU pods."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay. Each holds the weights three times with Adam's two moments."""

    last: int = 1
    """The newest ones, from which a run goes on; at least one."""
    best: int = 0
    """Of those that were judged, the best ones: one is saved whenever a judgement is among them."""
    best_by: Literal["kl", "ce"] = "kl"
    """By the held-out KL to the teacher (its bound at T = 1), or the held-out cross-entropy."""
    every: int | None = None
    """Those after every so many updates, for good. Unset: none."""


@dataclass(frozen=True)
class Train:
    """Train a student from a sealed cache. Running again goes on from the last checkpoint."""

    cache: Path = Path("runs/cache")
    """The sealed cache."""
    run: Path = Path("runs/student")
    """Directory of this run: initial student, checkpoints, `metrics.jsonl`."""
    student: Student = field(default_factory=Student)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optimiser: Optimiser = field(default_factory=Optimiser)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmul operands; weights, moments, normalisation and all sums are float32 always."""
    mesh: StudentMesh = field(default_factory=StudentMesh)
    distributed: Distributed = field(default_factory=Distributed)
    remat: Remat = "none"
    """What of each block is kept for the backward pass instead of being computed again: `none`,
    every product's operands; `dots`, the block's input, queries, keys, values and the gated MLP's
    two products; `block`, only its input, for a third more work. The same numbers but for
    rounding."""
    compilation_cache: bool = True
    """Keep compiled programs in `compiled` beside the run's directory (or where
    JAX_COMPILATION_CACHE_DIR says), so that going on starts at once."""
    checkpoint_every: int = 40
    """Updates between checkpoints; one more is written at the end."""
    keep: Keep = field(default_factory=Keep)
    evaluate_every: int = 20
    """Updates between looks at the held-out rows; also before the first and after the last."""
    heldout_rows: int | None = 8
    """Held-out rows to judge by, spread evenly over all of them: the same for every student.
    Unset takes all."""
    log_every: int = 1
    """Updates between lines of `metrics.jsonl`."""
    max_bad_steps: int = 10
    """Updates in a row with a non-finite loss or gradient, each skipped, that stop the run."""
    quiet: bool = False
    """Print nothing but errors."""
    json: bool = False
    """Print every line of `metrics.jsonl`, and the seconds left, on standard output, for batch
    jobs; all else goes to standard error."""
    allow: tuple[str, ...] = ()
    """What may be another than when the run began, such as `optimiser.learning_rate`,
    `data.batch_rows`, `cache`, `code`; written down in `run.json`. What decides the shape of what
    was saved (the student, the kind of optimiser, what is frozen) never may."""


@dataclass(frozen=True)
class Evaluate:
    """Judge a run's student on held-out rows: a JSON document, kept in the run's directory too."""

    run: Path = Path("runs/student")
    """The run."""
    checkpoint: str = "last"
    """Of its checkpoints `last`, `best` by held-out KL, `best-ce`, or the number of updates."""
    cache: Path = Path("runs/cache")
    """A sealed cache with the run's tokenizer."""
    heldout_rows: int | None = None
    """Rows to judge by, spread evenly. Unset takes all."""
    batch_rows: int = 4
    """Rows at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmul operands."""
    table: bool = False
    """Print a table for the eye instead of JSON."""


@dataclass(frozen=True)
class Export:
    """Write a run's student as a Hugging Face directory."""

    run: Path = Path("runs/student")
    """The run."""
    checkpoint: str = "last"
    """Of its checkpoints `last`, `best` by held-out KL, `best-ce`, or the number of updates."""
    cache: Path = Path("runs/cache")
    """What a run learned from that began before 0.5: newer ones have written it down."""
    output: Path = Path("runs/exported")
    """Directory to write; transformers, `student.source` and `teacher.model` read it."""


@dataclass(frozen=True)
class Generate:
    """A few samples from a run's student, for a look."""

    run: Path = Path("runs/student")
    """The run."""
    checkpoint: str = "last"
    """Of its checkpoints `last`, `best` by held-out KL, `best-ce`, or the number of updates."""
    prompt: str = "The"
    """What the samples begin with."""
    chat: bool = False
    """Put the prompt as a user's message, by the tokenizer's chat template."""
    chat_date: str | None = None
    """The date that templates may write, such as 2026-01-31."""
    samples: int = 3
    """How many."""
    max_tokens: int = 64
    """Of each sample, after the prompt; one ends earlier where the document does."""
    temperature: float = 0.8
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the fewest tokens that make up this probability; 1: from all."""
    seed: int = 0
    """Of the draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmul operands."""

    def __post_init__(self) -> None:
        """Refuse what no sample could be drawn by."""
        if self.samples < 1 or self.max_tokens < 1:
            raise ValueError(
                f"samples = {self.samples}, max_tokens = {self.max_tokens}; each is 1 or more"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it is 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is a probability, above 0")


@dataclass(frozen=True)
class Report:
    """Compare runs on one page: `report RUN…`, or `--runs RUN…`."""

    runs: tuple[Path, ...] = (Path("runs/student"),)
    """Runs to compare."""
    output: Path = Path("runs/report")
    """Directory for `report.html`, which is whole by itself, and its charts as PNGs."""
