"""The settings of `precompute`, `plan` and `tokenise`. Field docstrings are the `--help` texts."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from decant.command_line.checks import ANY, COUNT, TABLE, Bounds
from decant.command_line.local_paths import (
    IN_BUCKETS,
    IS_CACHE,
    IS_CORPUS,
    IS_MODEL,
    IS_OUTPUT,
    IS_PATH,
)
from decant.command_line.result import LongCommand
from decant.schemas.codecs import NODES, Profile
from decant.schemas.manifest.plan import TeacherMesh
from decant.schemas.signals import AttentionDtype, HiddenDtype, TargetSpec
from decant.schemas.targets.counts import MOST_DRAWS
from decant.schemas.targets.targets import BETAS

LEAST_DRAWS = 8
"""Fewest draws of counts: fewer teach less than the stored tokens do."""
K, DRAWS, COUNTS, RANK, STEP = 8, 0, 100, 256, 4.0
"""What a capture stores of a distribution by default: `k`, `draws`, `counts`, `sketch.rank` and
`sketch.step` of `signals.logits`. One record that serves every T ≥ 1 in about 70 bytes per token
(docs/benchmarks.md has what students learn from it)."""


@dataclass(frozen=True)
class SourceGroup:
    """Files of a corpus that are read alike."""

    files: tuple[str, ...] = field(default=(), metadata=IS_CORPUS)
    """As `corpus.files`."""
    text_field: str | None = None
    """As `corpus.text_field`. Unset: the same."""
    kind: Literal["auto", "text", "jsonl", "json", "csv", "parquet"] = "auto"
    """How documents lie in these files. `auto`: by the suffix. `text`: each file is one text,
    whatever its suffix."""
    max_bytes: Annotated[int | None, COUNT] = None
    """As `corpus.max_bytes`, of these files: whole files, so that a single large one is all
    read."""
    name: str | None = None
    """Name of the group in the cache and in a student's `data.source_weights`. Unset: its number,
    counted from 0."""
    weight: Annotated[float | None, Bounds(1e-6, 1_000_000)] = None
    """How often an epoch of a student takes each row of these files: 2 is twice, 0.5 every other
    epoch. Unset: once. It is no part of the capture: a cache keeps the weights with which its
    newest part was made, and `data.source_weights` replaces them."""


@dataclass(frozen=True)
class Corpus:
    """The documents that the teacher reads, and how they become rows."""

    files: tuple[str, ...] = field(default=("embedded",), metadata=IS_CORPUS)
    """Globs of the input files, or folders, of which all files are read that can be. They are on
    this machine, in buckets (`s3://bucket/…`, `gs://bucket/…`), or in datasets of the Hugging Face
    hub: `hf://datasets/owner/name/…` or `hf://datasets/owner/name@revision/…`, of which the first
    run fixes the commit. A text file is one document. A `.jsonl`, `.json`, `.csv` or `.parquet`
    file has one document per record. All but Parquet may also be compressed (`.gz`, `.zst`). A
    symbolic link counts by its own name. `embedded` is the source code of Python's standard
    library."""
    sources: tuple[SourceGroup, ...] = ()
    """Groups of files with settings of their own, in place of `files`; in a file
    `[[corpus.sources]]`."""
    text_field: str = "text"
    """Field of a record that holds the document: a text, or the messages of a chat. A record
    without this field must have `messages`, or `prompt` and `completion`. In chats only the
    assistant's tokens are learned from, after a prompt only the completion's; no targets are stored
    for other tokens."""
    chat_date: str | None = None
    """Date such as `2026-01-31`, for chat templates that write the current date. Unset: such a
    template writes its own default date; if it has none, it is refused."""
    chat_template: str | None = field(default=None, metadata=IS_PATH)
    """File with a Jinja template that renders the chats in place of the tokenizer's own. The cache
    keeps it with the tokenizer, so its students have it too."""
    chat_variables: tuple[str, ...] = field(default=(), metadata=TABLE)
    """What the chat template may read besides the messages: a table such as
    `enable_thinking = false`, on the command line `enable_thinking=false reasoning_effort=low`."""
    max_bytes: Annotated[int | None, COUNT] = None
    """For a trial on a share of the corpus: take whole files, in the order of the hashes of their
    names, until they hold this many bytes; the last one may exceed it by far. Unset: all files.
    `embedded` has a limit of its own."""
    sequence_length: Annotated[int, Bounds(2, 1 << 24)] = 512
    """S, tokens per row; at most the teacher's context length."""
    heldout: Annotated[float | None, Bounds(least=0, below=1)] = None
    """Share of the documents, chosen by content hash, on which students are evaluated and not
    trained. Unset: the share that gives about 1 MiB of text, but 0.005 to 0.1."""
    open_rows: Annotated[int, Bounds(1, 1 << 16)] = 64
    """Rows that are filled at the same time. With more of them, rows have less padding, and
    documents that share a row stand further apart in the corpus."""
    shard_bytes: Annotated[int | None, Bounds(512, 1 << 40)] = None
    """Bytes of input that a worker tokenises at once; no row spans two of these shards. Unset: a
    sixteenth of the corpus, but 1 to 32 MiB."""
    on_error: Literal["fail", "skip"] = "fail"
    """`fail` stops the run at a path or document that cannot be read, or at a row whose outputs are
    NaN. `skip` leaves it out, counts it and lists it in the manifest."""


@dataclass(frozen=True)
class Teacher:
    """The model whose outputs are stored."""

    model: str = field(default="embedded", metadata=IS_MODEL)
    """A Hugging Face directory or a `.gguf` file, on this machine or in a bucket
    (`s3://bucket/model`, `gs://…`), of which each worker reads its share; or a hub id
    (`owner/name`, `owner/name@revision` or `owner/name/file.gguf`), whose commit the first run
    fixes. `embedded` is SmolLM2-135M-Instruct."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matmul operands. Normalisation, softmax and all sums are always float32."""
    batch_rows: Annotated[int | Literal["auto"] | None, Bounds(1, 1 << 16)] = None
    """Rows per batch. `auto`: about 2,048 tokens on CPU and 32,768 on accelerators, halved until
    the compiler's estimate fits the devices' memory. Unset: `auto` on accelerators; on CPU about
    2,048 tokens without asking the compiler. The first run fixes the number, because other shapes
    round differently."""
    quantize: Literal["none", "int8"] = "none"
    """`int8` keeps the matrices of the blocks as one byte per number, with a scale for each output
    channel. This halves the memory of bfloat16. It counts as another teacher, with its own
    teacher_id."""
    mesh: TeacherMesh = field(default_factory=TeacherMesh)
    """How the devices of a host share the work. By default each device holds the whole model and
    computes its share of the batch."""


@dataclass(frozen=True)
class Sketch:
    """The shape of the teacher's tail, as a few numbers per position."""

    rank: Annotated[int | Literal["full"] | None, Bounds(0)] = None
    """r, numbers stored per position; 0 for none. A student can then train at any temperature
    (`loss.tail = "sketch"`). 64 take about 9 bytes per position, 256 about 28. `full` stores as
    many as the teacher is wide, which gives its dense distribution. Unset: 256, but at most half of
    the teacher's width, and none if `k` is 0; a capture that has begun keeps its own. A
    calibration sample of fewer than 8 positions a number lowers every rank but `full`."""
    step: Annotated[float | None, Bounds(0, 16)] = None
    """Distance of the stored values, in standard deviations of the r-th number (of the 128th if
    there are more). A smaller step takes more bytes and is more exact; 0 keeps float32. In the same
    bytes, many numbers with a large step teach more than few exact ones. Unset: 4, for `full`
    0.5."""
    dither: bool | None = None
    """Add a known pseudo-random fraction of a step before rounding, so that rounding is right on
    average: a student then learns from many positions what none of them says exactly. Unset:
    yes."""

    def settings(self) -> dict[str, Any] | None:
        """The settings with their defaults filled in; None if no sketch is stored.

        The rank must be decided (`Logits.decided`).
        """
        if not self.rank:
            return None
        full = self.rank == "full"
        step = self.step if self.step is not None else (0.5 if full else STEP)
        dither = self.dither is not False and step > 0
        return {"rank": self.rank, "step": float(step), "dither": dither}


@dataclass(frozen=True)
class Logits:
    """What is stored of the teacher's next-token distributions."""

    k: Annotated[int, Bounds(0, 1 << 20)] = K
    """Number of most probable tokens stored per position. Few are enough beside counts and a
    sketch. 0: none, and no draws and no sketch; the cache then needs `counts`."""
    mass: Annotated[float | None, Bounds(above=0, most=1)] = None
    """Store only as many tokens as hold this share of the position's probability, at most `k`: with
    0.95 a position that the teacher is sure of takes one or two. Unset: all store `k`."""
    profile: Profile = "compact"
    """Codec. `lossless` keeps float32. `compact` and `fast` change the distribution by a mean KL
    below 1.1e-4 nats; `fast` is half as large again as `compact` and decodes faster."""
    draws: Annotated[int, Bounds(0, 4096)] = DRAWS
    """m, tokens drawn per position from the tail (all tokens outside the top k); 0 for none.
    Training with `loss.tail = "sampled"` needs them; `counts` teach more in the same bytes."""
    draw_temperatures: Annotated[tuple[float, ...], Bounds(0.5, 10)] = (1.0,)
    """Temperatures that students will train at, among 1, 8/7, 4/3, 2, 4 and 8. The draws come from
    an equal mixture of the tails at these temperatures: (1.0, 2.0) gives each half the draws."""
    counts: Annotated[int | None, Bounds(0, MOST_DRAWS)] = None
    """N, equally spaced draws per position from the whole distribution, of which the cache stores
    how often each token came up: 8 to 1,024, or 0 for none. The target for training at T = 1
    (`loss.tail = "counts"`); it serves no other temperature. 50 take about 19 bytes per position,
    14 beside a stored head of 8. Unset: 100; a capture that has begun keeps its own."""
    sketch: Sketch = field(default_factory=Sketch)

    def decided(self, *, width: int) -> "Logits":
        """The settings of a new capture, with defaults for a teacher of this width filled in."""
        rank = min(RANK, max(1, width // 2)) if self.k else 0
        return self.filled(COUNTS, Sketch(rank))

    def filled(self, counts: int, sketch: Sketch) -> "Logits":
        """The settings with these counts and this sketch where they are unset."""
        own = {name: value for name, value in vars(self.sketch).items() if value is not None}
        same = self.sketch.rank in (None, sketch.rank)
        return dataclasses.replace(
            self,
            counts=counts if self.counts is None else self.counts,
            sketch=dataclasses.replace(sketch, **own) if same else self.sketch,
        )

    def require_possible(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.counts and self.counts < LEAST_DRAWS:
            raise ValueError(
                f"signals.logits.counts is {self.counts}; choose {LEAST_DRAWS} to {MOST_DRAWS:,}, "
                "or 0 for none"
            )
        if self.mass is not None and self.draws:
            raise ValueError(
                f"signals.logits.mass is {self.mass:g}, but tail draws are made from the tail of k "
                "ids at every position; set signals.logits.draws = 0 (counts or a sketch show the "
                "tail), or leave mass out"
            )
        if self.draw_temperatures != (1.0,) and not self.draws:
            raise ValueError(
                f"signals.logits.draw_temperatures is {list(self.draw_temperatures)}, but no draws "
                "are stored: set signals.logits.draws = 16 too, or leave it out (a sketch serves "
                "every temperature)"
            )
        if self.k:
            return
        if self.counts == 0:
            raise ValueError(
                "signals.logits.k is 0, so no token would be stored; ask for "
                "signals.logits.counts = 50 too, or choose k of at least 1"
            )
        for name, asked in (("sketch.rank", self.sketch.rank), ("mass", self.mass)):
            if asked:
                raise ValueError(
                    f"signals.logits.k is 0, but signals.logits.{name} is {asked}, which needs "
                    "stored tokens: choose k of at least 1, such as 8"
                )

    def target_spec(self) -> TargetSpec:
        """The targets to compute, with temperatures T as inverse temperatures β = 1/T.

        ValueError as `require_possible`, and if `draw_temperatures` are not those of the nodes,
        each once.
        """
        self.require_possible()
        nodes = NODES[self.profile]
        spec = TargetSpec(self.k, betas=nodes, labels=True, mass=self.mass)
        if not (self.draws and self.k):
            return spec
        betas = tuple(beta for beta in BETAS[1:] if self._asks_for(beta))
        if not betas or len(betas) != len(self.draw_temperatures):
            known = ", ".join(f"{1 / beta:.4g}" for beta in reversed(BETAS[1:]))
            raise ValueError(
                f"signals.logits.draw_temperatures is {list(self.draw_temperatures)}; expected "
                f"one or more of {known}, each once"
            )
        return dataclasses.replace(spec, draws=self.draws, draw_betas=betas)

    def settings(self) -> dict[str, Any]:
        """The settings that bind a directory to its logits. Settings without an effect are left
        out, so that they do not change an identity; so are `counts` and `sketch`, which may be
        added later."""
        settings: dict[str, Any] = {"k": self.k, "profile": self.profile}
        if NODES[self.profile] != BETAS:
            settings["betas"] = list(NODES[self.profile])
        if self.mass is not None:
            settings["mass"] = self.mass
        if self.draws and self.k:
            settings["draws"] = self.draws
            settings["draw_betas"] = list(self.target_spec().draw_betas)
        return settings

    def _asks_for(self, beta: float) -> bool:
        return any(abs(1 / t - beta) < 1e-3 for t in self.draw_temperatures if t > 0)


@dataclass(frozen=True)
class Hidden:
    """Which hidden states are stored. Default: none."""

    layers: Annotated[tuple[int, ...], Bounds(-1)] = ()
    """Layers to store. Layer 0 is the embedding's output, layer i the output of the i-th block;
    −1 (or the number of blocks) is the output of the final norm."""
    dtype: HiddenDtype = "bfloat16"
    """`int8` has one scale per position, takes half the bytes of `bfloat16` and is off by about
    1%."""
    width: Annotated[int | Literal["full"], COUNT] = "full"
    """`full`, or N to project the states onto the layer's N leading principal directions, which
    calibration computes. The share of the variance that they keep is printed and stored in the
    manifest."""


@dataclass(frozen=True)
class Attention:
    """Which attention maps are stored. Default: none. A map is S² numbers per head and row, so
    choose few."""

    layers: Annotated[tuple[int, ...] | Literal["all"], ANY] = ()
    """Blocks to store, counted from 0, or `all`. −1 is the last block."""
    heads: Annotated[tuple[int, ...] | Literal["all", "mean"], Bounds(0)] = "all"
    """Heads to store, counted from 0, or `all`. `mean` stores the mean of all heads as one head."""
    dtype: AttentionDtype = "uint8-log"
    """`uint8-log` is one byte on a logarithmic scale, off by at most 3% of a probability."""


@dataclass(frozen=True)
class Signals:
    """The kinds of teacher output to store. A later run may add more to a sealed cache."""

    logits: Logits = field(default_factory=Logits)
    hidden: Hidden = field(default_factory=Hidden)
    attention: Attention = field(default_factory=Attention)


@dataclass(frozen=True)
class Precompute(LongCommand):
    """Run a teacher once over a corpus and store its outputs in a cache for training students."""

    corpus: Corpus = field(default_factory=Corpus)
    teacher: Teacher = field(default_factory=Teacher)
    signals: Signals = field(default_factory=Signals)
    output: Path = field(default=Path("runs/cache"), metadata=IS_OUTPUT | IS_CACHE | IN_BUCKETS)
    """The cache's directory, or an address such as `s3://bucket/cache`, which workers then need
    not share a disk for. The same command run again continues where it stopped. New files
    that match `corpus.files` become a new part of the cache."""
    seal_partial: bool = False
    """Capture nothing more now: seal what is done so far as a part, so that training can start. The
    same command without this flag captures the rest and seals it as the next part."""
    replace_changed: bool = False
    """Files of a sealed part that have changed: forget their old documents and capture the new
    ones as a new part. Without this flag such files are refused."""
    runner: str = "FnApiRunner"
    """Beam runner. `FnApiRunner` runs in this process; `DaskRunner` needs the extra `dask`; others
    by their Beam name."""
    runner_options: tuple[str, ...] = ()
    """Beam options for the runner, without leading dashes, such as
    `dask_client_address=tcp://10.0.0.1:8786`."""
    tokenise_workers: Annotated[int | None, Bounds(1, 1024)] = None
    """Number of processes that tokenise, for `FnApiRunner` only: other runners have workers of
    their own. Unset: one per core, but at most one per 32 MiB of text. The teacher always runs in
    one process."""


@dataclass(frozen=True)
class Tokenise(LongCommand):
    """Make a cache of rows without a teacher, to mix its text with another cache in training."""

    like: Path = field(default=Path("runs/cache"), metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache to mix the rows with. They get its tokenizer and its row length."""
    corpus: Corpus = field(default_factory=Corpus)
    output: Path = field(default=Path("runs/text"), metadata=IS_OUTPUT | IS_CACHE | IN_BUCKETS)
    """The directory of the rows, or an address such as `s3://bucket/text`. The same command run
    again continues where it stopped."""
    runner: str = "FnApiRunner"
    """As for `precompute`."""
    runner_options: tuple[str, ...] = ()
    """As for `precompute`."""
    tokenise_workers: Annotated[int | None, Bounds(1, 1024)] = None
    """As for `precompute`."""


@dataclass(frozen=True)
class Align(LongCommand):
    """Make a cache for students with another tokenizer from a sealed cache. No teacher runs again.

    Every text of the cache is tokenised by the other tokenizer. Where both tokenizers begin a token
    at the same byte, the teacher's stored distribution becomes the target of the student's token.
    The new cache is like any other.
    """

    tokenizer: str = field(metadata=IS_MODEL)
    """The students' tokenizer: a directory with its tokenizer.json, a `.gguf` file or a hub id."""
    cache: Path = field(default=Path("runs/cache"), metadata=IS_CACHE | IN_BUCKETS)
    """The sealed cache: a directory, or an address such as `s3://bucket/cache`."""
    output: Path = field(default=Path("runs/aligned"), metadata=IS_OUTPUT | IS_CACHE | IN_BUCKETS)
    """Directory or address of the new cache. The same command run again continues where it
    stopped."""
    targets: Literal["projected", "matched"] = "projected"
    """`projected`: each of the teacher's tokens gives its probability to the student's token that
    is the same, or that begins it; any loss learns from that. `matched`: the teacher's own
    likeliest tokens, for loss.divergence = "uld" or "gold". Other losses see those that the student
    has too, and all others as one token."""
    k: Annotated[int | None, Bounds(1, 1 << 20)] = None
    """Tokens stored per position. Unset: as many as the cache has. Another number needs a
    sketch."""
    counts: Annotated[int | None, Bounds(0, MOST_DRAWS)] = None
    """As `signals.logits.counts` of `precompute`. Unset: as the cache has. Another number needs a
    sketch."""
    draws: Annotated[int, Bounds(0, 4096)] = 0
    """As `signals.logits.draws` of `precompute`; needs a sketch."""
    draw_temperatures: Annotated[tuple[float, ...], Bounds(0.5, 10)] = (1.0,)
    """As `signals.logits.draw_temperatures` of `precompute`."""
    sequence_length: Annotated[int | None, Bounds(2, 1 << 24)] = None
    """Tokens per row. Unset: as the cache has."""
    special_tokens: tuple[str, ...] = field(default=(), metadata=TABLE)
    """Special tokens of the teacher and the student's in their places, beyond those of the same
    text or role: a table such as `"<|im_start|>" = "<start_of_turn>"`, on the command line
    `'<|im_start|>=<start_of_turn>'`."""
    runner: str = "FnApiRunner"
    """As for `precompute`."""
    runner_options: tuple[str, ...] = ()
    """As for `precompute`."""
