"""Settings of the trainer's commands. A field's docstring is the help text of its flag.

The cache's manifest holds k, tokenizer, sequence length and vocabulary: no setting repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from decant.command_line.checks import ANY, COUNT, DEVICES, TABLE, Bounds, Command
from decant.command_line.local_paths import (
    IN_BUCKETS,
    IS_CACHE,
    IS_MODEL,
    IS_OUTPUT,
    IS_RUN,
    IS_RUN_OR_SWEEP,
)
from decant.command_line.result import LongCommand
from decant.models.mesh.remat import Remat
from decant.trainer.loss.settings import AttentionLoss, HiddenLoss, Loss

__all__ = [
    "Adapter",
    "AttentionLoss",
    "Data",
    "Distributed",
    "Evaluate",
    "Export",
    "Generate",
    "HiddenLoss",
    "Keep",
    "Log",
    "Loss",
    "MixedCache",
    "Optimiser",
    "Report",
    "Student",
    "StudentMesh",
    "Train",
]

_MOST_STEPS = 2**31 - 1
"""The state counts updates in 32 bits."""


@dataclass(frozen=True)
class Adapter:
    """LoRA: beside each chosen matrix W of the frozen student, A and B of a small rank are trained,
    and W + s·B·A takes W's place. Frozen weights have no moments, and checkpoints hold A and B
    only."""

    rank: Annotated[int | None, Bounds(1, 1 << 12)] = None
    """Rank of the changes. Unset: no adapter, all weights are trained."""
    alpha: Annotated[float | None, Bounds(1e-6, 1_000_000)] = None
    """s = `alpha` / `rank`. Unset: twice the rank."""
    scaling: Literal["rank", "root"] = "rank"
    """`root`: s = `alpha` / √`rank` (rsLoRA), for ranks of 64 and more."""
    targets: tuple[str, ...] = ("all-linear",)
    """Matrices of every block: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    `down_proj`; `all-linear` is all that the student has. Those of experts cannot be adapted."""
    base: Literal["bfloat16", "float32"] = "bfloat16"
    """How frozen weights are kept. With `dtype = bfloat16` no float32 copy of them exists."""


@dataclass(frozen=True)
class Student:
    """The student's shape and first weights."""

    init: Literal["cut", "checkpoint", "scratch"] = "cut"
    """`cut`: chosen blocks of `source`; `checkpoint`: all of `source`; `scratch`: random
    weights."""
    source: str = field(default="embedded", metadata=IS_MODEL)
    """Model for `cut` and `checkpoint`: a Hugging Face directory or a `.gguf` file, here or in a
    bucket (`s3://…`, `gs://…`), a hub id, `embedded`, or the directory of another run, whose last
    checkpoint is taken. It is read once; the run's directory keeps the initial student."""
    layers: Annotated[int | tuple[int, ...], Bounds(0)] = 8
    """For `cut`: the blocks of `source` to take, counted from 0. A single number is a count: that
    many blocks, spread evenly from the first to the last; in a file `[3]` is block 3 alone. For
    `scratch` without `config`: the
    number of blocks."""
    config: Path | None = None
    """For `scratch`: a Hugging Face `config.json`. Unset: the teacher's, from the cache."""
    hidden_size: Annotated[int | None, Bounds(1, 1 << 20)] = None
    """For `scratch`: width in place of the config's."""
    intermediate_size: Annotated[int | None, Bounds(1, 1 << 20)] = None
    """For `scratch`: width of the MLP in place of the config's."""
    num_heads: Annotated[int | None, Bounds(1, 1 << 16)] = None
    """For `scratch`: number of query heads in place of the config's."""
    num_kv_heads: Annotated[int | None, Bounds(1, 1 << 16)] = None
    """For `scratch`: number of key/value heads in place of the config's."""
    adapter: Adapter = field(default_factory=Adapter)


@dataclass(frozen=True)
class MixedCache:
    """Another cache, whose train rows are mixed with those of the main cache."""

    path: Path = field(default=Path(), metadata=IS_CACHE | IN_BUCKETS)
    """A sealed cache with the main cache's tokenizer and row length. It may hold targets of the
    same teacher, of another teacher, or none (`decant tokenise`). Rows without targets are learned
    from their next tokens alone, as with `loss.alpha = 0`."""
    weight: Annotated[float, Bounds(1e-6, 1_000_000)] = 1.0
    """Rows of this cache for each row of the main cache; the ratio holds in every stretch of the
    run."""


@dataclass(frozen=True)
class Data:
    """The rows of a run, their order, and how many an update takes."""

    batch_rows: Annotated[int, Bounds(1, 1 << 20)] = 2
    """Rows of an update. The default is small because a small cache has few rows, and more updates
    then teach more than larger ones."""
    microbatches: Annotated[int, Bounds(1, 1 << 20)] = 1
    """Pieces into which an update's rows are split, computed one after another. Must divide
    `batch_rows`. More pieces need less memory and change results by rounding only."""
    epochs: Annotated[int, Bounds(1, 1_000_000)] = 1
    """Passes over the main cache's train rows; each pass has its own order."""
    steps: Annotated[int | None, Bounds(1, _MOST_STEPS)] = None
    """Number of updates. If set, `epochs` is ignored."""
    seed: Annotated[int, ANY] = 0
    """Seed of the order of rows and of random weights."""
    shuffle: Literal["global", "blocks"] = "global"
    """Order of rows. `global`: every epoch is a permutation of all rows. `blocks`: every epoch
    permutes blocks of 64 neighbouring rows, and rows within windows of 256 blocks. Reads then stay
    in few blocks, for caches in a bucket or on a slow disk."""
    mirror: Path | None = field(default=None, metadata=IS_OUTPUT)
    """Folder on this machine's disk that keeps what is read of caches in buckets. Runs and
    processes may share it. Unset: DECANT_MIRROR, else `~/.cache/decant`."""
    mirror_bytes: Annotated[int | None, Bounds(1 << 20)] = None
    """Most bytes of the mirrors in that folder; what was unused longest is deleted. Unset: half of
    what is free on the disk."""
    caches: tuple[MixedCache, ...] = ()
    """Other caches to mix with the main cache; in a file `[[data.caches]]`. `epochs` counts passes
    over the main cache, and held-out rows are those of the main cache."""
    source_weights: tuple[str, ...] = field(default=(), metadata=TABLE)
    """How often an epoch takes each row of a group of the main cache's files, in place of the
    `weight` in `[[corpus.sources]]`: a table such as `code = 0.5`, on the command line `code=0.5
    books=2`. An epoch is then as long as its rows. Held-out rows are judged without weights."""


@dataclass(frozen=True)
class Optimiser:
    """The optimiser, its learning rate, and the parameters that it leaves alone.

    A pattern names parameters: `embedding`, `layers.0.query`, `layers.*norm`, `final_norm`, `head`.
    `*` matches any characters; `layers.0` names all parameters of that block.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """`adamw` keeps two moments for each weight. `adafactor` keeps a row and a column of numbers
    for each matrix; its learning rate is relative to the size of the weights (try 1e-2). `muon`
    orthogonalises the updates of the blocks' matrices and scales them to the size of AdamW's; all
    other parameters are updated by AdamW."""
    learning_rate: Annotated[float, Bounds(0, 1_000_000)] = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """The learning rate after the warm-up. `cosine` and `linear` fall until the last update.
    `constant` stays. `wsd` stays, then falls linearly over the last `decay_fraction` of the run."""
    warmup_steps: Annotated[int, Bounds(0, _MOST_STEPS)] = 10
    """Updates over which the learning rate grows linearly from zero; all updates, if the run is
    shorter."""
    decay_fraction: Annotated[float, Bounds(above=0, most=1)] = 0.2
    """Share of the run's updates in which `wsd` falls."""
    final_fraction: Annotated[float, Bounds(0, 1)] = 0.1
    """Learning rate of the last update as a share of the peak; unused by `constant`."""
    weight_decay: Annotated[float, Bounds(0, 1_000_000)] = 0.01
    """Decoupled weight decay: each update subtracts learning rate · `weight_decay` · weight."""
    no_decay: tuple[str, ...] = ("*norm", "*bias")
    """Patterns of the parameters without weight decay."""
    freeze: tuple[str, ...] = ()
    """Patterns of the parameters that are not trained. They stay equal to the bit and have no
    moments. Freezing a tied embedding freezes the head too."""
    clip_norm: Annotated[float, Bounds(1e-30, 1e30)] = 1.0
    """Largest global norm of a gradient. A longer gradient is scaled down to this norm."""
    beta1: Annotated[float, Bounds(least=0, below=1)] = 0.9
    """AdamW's decay rate of the running mean of gradients."""
    beta2: Annotated[float, Bounds(least=0, below=1)] = 0.98
    """AdamW's decay rate of the running mean of squared gradients. The default is lower than usual,
    because short runs have few multiples of 1/(1−β₂) updates."""
    epsilon: Annotated[float, Bounds(1e-30, 1)] = 1e-8
    """AdamW adds this to the root of the running mean of squares."""
    momentum: Annotated[float, Bounds(least=0, below=1)] = 0.95
    """Muon's decay rate of the running mean of gradients."""


@dataclass(frozen=True)
class StudentMesh:
    """How the devices of all processes share the work: data · fsdp · tensor devices. Results equal
    those of one device but for rounding, and a resumed run may use another mesh."""

    data: Annotated[int | None, DEVICES] = None
    """Number of device groups. Each group holds all weights and takes its share of a batch's rows.
    Unset: as many groups as the devices allow."""
    fsdp: Annotated[int, DEVICES] = 1
    """Devices of a group that each keep a share of weights, gradients and optimiser state and take
    a share of the group's rows. For a student that does not fit one device."""
    tensor: Annotated[int, DEVICES] = 1
    """Devices that take the same rows and split every matrix product and the vocabulary. For a
    student of which one block, or the logits, does not fit one device. These devices communicate
    in every block."""


@dataclass(frozen=True)
class Distributed:
    """Several processes that train one student. Start the same command in each, with another
    `process`; all must share the file system. Without these settings there is one process."""

    coordinator: str | None = None
    """HOST:PORT at which the others reach process 0; any free port."""
    processes: Annotated[int | None, DEVICES] = None
    """Number of processes."""
    process: Annotated[int | None, Bounds(0)] = None
    """Number of this process, from 0."""
    detect: bool = False
    """Let JAX detect the settings that are unset: on Slurm, Open MPI, Kubernetes and TPU pods."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept. With AdamW a checkpoint is three times the size of the weights
    (weights and two moments)."""

    last: Annotated[int, COUNT] = 1
    """Number of newest checkpoints. A run resumes from the newest; if that is damaged, from the one
    before it."""
    best: Annotated[int, Bounds(0)] = 0
    """Number of best checkpoints by held-out rows. An evaluation among the best so far saves a
    checkpoint."""
    best_by: Literal["kl", "ce"] = "kl"
    """`kl`: held-out KL to the teacher at T = 1, the estimate that is printed; `ce`: held-out
    cross-entropy."""
    every: Annotated[int | None, COUNT] = None
    """Also keep the checkpoint after every multiple of this many updates. Unset: none."""


@dataclass(frozen=True)
class Log:
    """Trackers that also get every line of `metrics.jsonl`. They take their server and login from
    their own environment variables, and a continued run goes on in the same run of the tracker."""

    wandb: str | None = None
    """Project of Weights & Biases; needs the extra `wandb`."""
    mlflow: str | None = None
    """Experiment of MLflow; needs the extra `mlflow`."""


@dataclass(frozen=True)
class Train(LongCommand):
    """Train a student from a sealed cache. The same command again resumes from the newest
    checkpoint."""

    cache: Path = field(default=Path("runs/cache"), metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache to learn from: a path, or an address such as `s3://bucket/cache`, which is
    read through `data.mirror`."""
    run: Path = field(default=Path("runs/student"), metadata=IS_OUTPUT | IS_RUN)
    """Directory of this run: initial student, checkpoints and `metrics.jsonl`."""
    student: Student = field(default_factory=Student)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optimiser: Optimiser = field(default_factory=Optimiser)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands. Weights, moments, normalisation and all sums are always float32."""
    mesh: StudentMesh = field(default_factory=StudentMesh)
    distributed: Distributed = field(default_factory=Distributed)
    remat: Remat = "none"
    """Which arrays of each block are kept for the backward pass; all others are computed again.
    `none`: the operands of every product. `dots`: the block's input, queries, keys, values and the
    gated MLP's two products. `block`: the block's input only, for a third more work. Results differ
    by rounding only."""
    compilation_cache: bool = True
    """Keep compiled programs in the directory `compiled` beside the run's (or in
    JAX_COMPILATION_CACHE_DIR), so that a resumed run does not compile again."""
    checkpoint_every: Annotated[int, COUNT] = 40
    """Updates between checkpoints. The end of the run saves one more."""
    keep: Keep = field(default_factory=Keep)
    evaluate_every: Annotated[int, COUNT] = 20
    """Updates between evaluations on held-out rows. The run also evaluates before the first and
    after the last update."""
    heldout_rows: Annotated[int | None, Bounds(0)] = 8
    """Number of held-out rows to evaluate on, spread evenly over all of them, so that every student
    has the same. Unset: all. 0: train without judging, as a cache without held-out rows needs."""
    log_every: Annotated[int, COUNT] = 1
    """Updates between lines of `metrics.jsonl`."""
    log: Log = field(default_factory=Log)
    max_bad_steps: Annotated[int, COUNT] = 10
    """Stop after this many updates in a row with a non-finite loss or gradient. Such updates are
    skipped."""
    allow: tuple[str, ...] = ()
    """Settings that a resumed run may change, such as `optimiser.learning_rate`, `data.batch_rows`,
    `cache` or `code`; `run.json` records the change. Settings that decide the shape of a checkpoint
    (the student, `optimiser.name`, `optimiser.freeze`) can never change."""


@dataclass(frozen=True)
class Evaluate(LongCommand):
    """Evaluate a run's student on held-out rows: prints a table, and keeps the numbers in the run's
    directory as `evaluation.json`."""

    run: Path = field(default=Path("runs/student"), metadata=IS_RUN)
    """Directory of the run."""
    checkpoint: str = "last"
    """Checkpoint to use: `last`, `best` (by held-out KL), `best-ce` (by held-out cross-entropy), or
    a number of updates."""
    cache: Path | None = field(default=None, metadata=IS_CACHE | IN_BUCKETS)
    """A sealed cache with the run's tokenizer. Unset: the cache that the run learned from."""
    other_teacher: str | None = None
    """To judge against another teacher than the run's: the first characters, at least 8, of the
    teacher_id of `cache`. The evaluation is marked with it, and so are report and model card."""
    heldout_rows: Annotated[int | None, COUNT] = None
    """Number of held-out rows to evaluate on, spread evenly. Unset: all."""
    batch_rows: Annotated[int, Bounds(1, 1 << 16)] = 4
    """Rows in one batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands."""
    table: bool = False
    """The table is what is printed anyway; for scripts of releases before 0.9."""


@dataclass(frozen=True)
class Export(LongCommand):
    """Write a run's student as a Hugging Face directory, or its adapter as a PEFT directory."""

    run: Path = field(default=Path("runs/student"), metadata=IS_RUN)
    """Directory of the run."""
    checkpoint: str = "last"
    """Checkpoint to use: `last`, `best` (by held-out KL), `best-ce` (by held-out cross-entropy), or
    a number of updates."""
    cache: Path = field(default=Path("runs/cache"), metadata=IS_CACHE | IN_BUCKETS)
    """Cache that the run learned from. Only for a run that began before version 0.5: newer runs
    have recorded it."""
    output: Path = field(default=Path("runs/exported"), metadata=IS_OUTPUT | IN_BUCKETS)
    """Directory to write, or an address such as `s3://bucket/student`. `student.source` and
    `teacher.model` can read both, transformers the directory."""
    adapter: Literal["apart", "merged"] = "apart"
    """Of a run with `student.adapter`. `apart`: a PEFT directory, which names the base; `merged`: a
    whole model in float32, the adapter added to its weights."""


class Chosen(NamedTuple):
    """Settings of `generate` with their values where they are unset."""

    samples: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Generate(Command):
    """Print samples of text from a run's student, or write its completions of many prompts."""

    run: Path = field(default=Path("runs/student"), metadata=IS_RUN)
    """Directory of the run."""
    model: str | None = field(default=None, metadata=IS_MODEL)
    """A model in place of a run's student: a Hugging Face directory, a GGUF file, a hub id or
    `embedded`."""
    checkpoint: str = "last"
    """Checkpoint to use: `last`, `best` (by held-out KL), `best-ce` (by held-out cross-entropy), or
    a number of updates."""
    prompt: str = "The"
    """Text that every sample begins with."""
    prompts: Path | None = None
    """A file of JSON lines in place of `prompt`: each has `prompt`, a text or messages, or
    `messages`, whose last one of the assistant is left out."""
    chat: bool = False
    """Wrap a prompt that is text as a user's message with the tokenizer's chat template."""
    chat_date: str | None = None
    """Date that the chat template may insert, such as 2026-01-31."""
    chat_variables: tuple[str, ...] = field(default=(), metadata=TABLE)
    """Variables of the chat template, such as `enable_thinking=false`."""
    samples: Annotated[int | None, Bounds(1, 1 << 20)] = None
    """Number of samples of each prompt. Unset: 3, with `prompts` 1."""
    max_tokens: Annotated[int, COUNT] = 64
    """Most tokens of a sample after the prompt. An end-of-document token ends it earlier."""
    temperature: Annotated[float | None, Bounds(0, 1_000_000)] = None
    """Logits are divided by this. 0: always take the likeliest token. Unset: 0.8, for records 1."""
    top_p: Annotated[float | None, Bounds(above=0, most=1)] = None
    """Draw from the smallest set of tokens with at least this probability. 1: all tokens. Unset:
    0.95, for records 1."""
    seed: Annotated[int, ANY] = 0
    """Seed of the draws. A sample depends on it and on the numbers of prompt and sample, not on
    what else is written."""
    jsonl: bool = False
    """Print records: a line of JSON with `prompt` and `completion` for each sample."""
    logprobs: bool = False
    """Records are rollouts: also ids, the log-probability of each token that was written (at
    temperature 1), and digests of the student and its tokenizer. `precompute` scores them."""
    output: Path | None = field(default=None, metadata=IS_OUTPUT)
    """File for the records. It appears when it is complete; the same command goes on after a kill.
    Unset: they are printed."""
    skip_long: bool = False
    """Leave out prompts that are too long for the student, which are otherwise an error."""
    batch_rows: Annotated[int, Bounds(1, 1 << 16)] = 32
    """Samples in one batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands."""
    mesh: StudentMesh = StudentMesh()
    """Devices that share the work. Unset, each holds the whole student and writes its share."""

    @property
    def writes_records(self) -> bool:
        """Whether records are written, rather than texts for people."""
        return self.jsonl or self.logprobs or self.output is not None

    @property
    def sampling(self) -> Chosen:
        """The settings whose defaults depend on others.

        Records are drawn from the student's own distribution, whose log-probabilities they hold.
        """

        def chosen(value: Any, default: Any) -> Any:
            return default if value is None else value

        return Chosen(
            chosen(self.samples, 3 if self.prompts is None else 1),
            chosen(self.temperature, 1.0 if self.writes_records else 0.8),
            chosen(self.top_p, 1.0 if self.writes_records else 0.95),
        )


@dataclass(frozen=True)
class Report(LongCommand):
    """Compare runs on one page."""

    runs: tuple[Path, ...] = field(default=(Path("runs/student"),), metadata=IS_RUN_OR_SWEEP)
    """Directories of the runs to compare; that of a sweep stands for all runs in it."""
    output: Path = field(default=Path("runs/report"), metadata=IS_OUTPUT)
    """Directory to write: `report.html`, which needs no other file, and its charts as PNGs."""
    samples: Annotated[int, Bounds(0, 64)] = 2
    """Number of held-out documents whose beginning each student continues. A run keeps its samples,
    so only the first report takes the time. 0: none."""
    prompts: tuple[str, ...] = ()
    """Texts that each student continues, in place of held-out documents."""
    seed: Annotated[int, ANY] = 0
    """Seed of the samples."""
