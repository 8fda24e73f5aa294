"""Settings of the trainer's commands. A field's docstring gives its unit and its consequence.

What the cache knows (k, tokenizer, sequence length, vocabulary) is never repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from models.execution import Remat
from trainer.loss_config import AttentionLoss, HiddenLoss, Loss

__all__ = [
    "AttentionLoss",
    "Data",
    "Distributed",
    "Evaluate",
    "Export",
    "HiddenLoss",
    "Loss",
    "MeshShape",
    "Optimiser",
    "Plot",
    "Student",
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
class Data:
    """Which rows, in which order, how many at a time."""

    batch_rows: int = 2
    """Rows of an update. Few, because a small cache holds few: more updates beat larger ones."""
    microbatches: int = 1
    """Pieces that an update's rows are computed in, one after another; divides `batch_rows`.
    More need less memory and change nothing but rounding."""
    epochs: int = 1
    """Passes over the train rows; each is shuffled anew."""
    steps: int | None = None
    """Updates; overrides `epochs` when set."""
    seed: int = 0
    """Of the order of rows and of weights from scratch."""


@dataclass(frozen=True)
class Optimiser:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1e-3
    """At its peak, after the warm-up."""
    warmup_steps: int = 10
    """Updates of linear growth from zero; at most the whole run."""
    final_fraction: float = 0.1
    """Of the peak, reached at the last update."""
    weight_decay: float = 0.01
    """Decoupled, on matrices only: neither norms nor biases."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient; longer ones are scaled down to it."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.98
    """Decay of its running square. Lower than usual: short runs cannot wait for 1/(1−β₂) steps."""
    epsilon: float = 1e-8
    """Added to the root of the running square."""


@dataclass(frozen=True)
class MeshShape:
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
    mesh: MeshShape = field(default_factory=MeshShape)
    distributed: Distributed = field(default_factory=Distributed)
    remat: Remat = "none"
    """What of each block is kept for the backward pass instead of being computed again: `none`,
    all but attention's maps is kept; `dots`, the products with weights; `block`, only the block's
    input, for a third more work. The same numbers but for rounding."""
    compilation_cache: bool = True
    """Keep compiled programs in `compiled` beside the run's directory (or where
    JAX_COMPILATION_CACHE_DIR says), so that going on starts at once."""
    checkpoint_every: int = 40
    """Updates between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 1
    """Checkpoints kept; each holds the weights three times (with Adam's two moments)."""
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


@dataclass(frozen=True)
class Evaluate:
    """Judge a run's student on held-out rows."""

    run: Path = Path("runs/student")
    """The run; its last checkpoint is judged."""
    cache: Path = Path("runs/cache")
    """A sealed cache with the run's tokenizer."""
    heldout_rows: int | None = None
    """Rows to judge by, spread evenly. Unset takes all."""
    batch_rows: int = 4
    """Rows at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmul operands."""


@dataclass(frozen=True)
class Export:
    """Write a run's student as a Hugging Face directory."""

    run: Path = Path("runs/student")
    """The run; its last checkpoint is exported."""
    cache: Path = Path("runs/cache")
    """Where the tokenizer is."""
    output: Path = Path("runs/exported")
    """Directory to write; transformers and `student.source` read it."""


@dataclass(frozen=True)
class Plot:
    """Draw what students learned: held-out KL, cross-entropy and agreement over updates."""

    runs: tuple[Path, ...] = (Path("runs/student"),)
    """Runs to draw in one picture."""
    output: Path = Path("runs/student/learned.png")
    """The PNG."""
