"""The settings of `precompute`. A field's docstring gives its unit and its consequence."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from decant.schemas.codecs import NODES, Profile
from decant.schemas.manifest.plan import TeacherMesh
from decant.schemas.signals import AttentionDtype, HiddenDtype, TargetSpec
from decant.schemas.targets.targets import BETAS

_MOST_DRAWS = 4096


@dataclass(frozen=True)
class Corpus:
    """What the teacher reads."""

    files: tuple[str, ...] = ("embedded",)
    """Globs of text files (one document each) or `.jsonl` files (one document a line), each also
    with `.gz` or `.zst`, and of `.parquet` files (one document a record). `embedded` is the source
    text of Python's own standard library."""
    text_field: str = "text"
    """Field of a record that holds the document: a text, or the messages of a chat. A record
    without it has `messages`, or `prompt` and `completion`; then the assistant's tokens or the
    completion's are learned, and nothing is stored elsewhere."""
    chat_date: str | None = None
    """What chat templates that write the current date take for it, such as `2026-01-31`. Unset:
    those that have a date of their own write that, the others are refused."""
    max_bytes: int | None = None
    """Take whole files, in the order of their names' hashes, until they hold this many bytes.
    For a trial on a share of a corpus; unset takes all. `embedded` has its own limit."""
    sequence_length: int = 512
    """S, tokens a row. Not above the teacher's context."""
    heldout: float | None = None
    """Share of documents kept apart, by content hash, for judging students. Unset: what gives
    about 1 MiB of text, between 0.5% and 10%."""
    open_rows: int = 64
    """Rows that packing keeps open: more pack tighter and mix documents further apart."""
    shard_bytes: int | None = None
    """Bytes of input one tokenise worker takes; rows never span shards. Unset: a sixteenth of the
    corpus, between 1 and 32 MiB."""
    on_error: Literal["fail", "skip"] = "fail"
    """Whether a document that cannot be read, or a row that gives NaN, stops the run or is left
    out, counted and listed in the manifest."""


@dataclass(frozen=True)
class Teacher:
    """The model that is run once."""

    model: str = "embedded"
    """A Hugging Face directory, a `.gguf` file, a hub id (`owner/name`, `owner/name@revision`, or
    `owner/name/file.gguf`; its commit is fixed by the plan), or `embedded` (SmolLM2-135M-Instruct).
    """
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matmul operands; normalisation, softmax and all sums are float32 always."""
    batch_rows: int | Literal["auto"] | None = None
    """Rows a batch. `auto`: about 2,048 tokens on CPU and 32,768 on accelerators, or what of that
    the compiler says the devices' memory holds. Unset: auto on accelerators, on CPU the same
    without asking the compiler. Frozen by the plan, because shapes change rounding."""
    quantize: Literal["none", "int8"] = "none"
    """`int8` keeps the blocks' matrices in one byte a number, with a scale for each output channel:
    half the memory of bfloat16, another teacher (its own teacher_id)."""
    mesh: TeacherMesh = field(default_factory=TeacherMesh)
    """How the devices of a host share the work. Unset, each holds the whole model and takes its
    share of the batch."""


@dataclass(frozen=True)
class Logits:
    """What is kept of the teacher's next-token distribution."""

    k: int = 32
    """Ids stored a position. With 16 draws, 32 take the bytes of 64 without and teach more."""
    profile: Profile = "compact"
    """Codec: `lossless` keeps float32. `compact` and `fast` keep the mean KL below 1.1e-4 nats;
    `fast` takes half as much again and decodes faster."""
    draws: int = 16
    """m, tokens drawn from the tail a position, beside the top-k; for `loss.tail = "sampled"`."""
    draw_temperatures: tuple[float, ...] = (1.0,)
    """Temperatures whose tails are mixed to draw from, among 1, 8/7, 4/3, 2, 4 and 8: those that
    students will train at. (1.0, 2.0) serves both, each with half the draws."""

    def target_spec(self) -> TargetSpec:
        """What the teacher is asked for. ValueError for settings that contradict each other."""
        if not self.draws:
            return TargetSpec(self.k, betas=NODES[self.profile])
        if self.draws < 0 or self.draws > _MOST_DRAWS:
            raise ValueError(
                f"signals.logits.draws is {self.draws}; expected 0 to {_MOST_DRAWS} draws"
            )
        betas = tuple(beta for beta in BETAS[1:] if self._asks_for(beta))
        if not betas or len(betas) != len(self.draw_temperatures):
            known = ", ".join(f"{1 / beta:.4g}" for beta in reversed(BETAS[1:]))
            raise ValueError(
                f"signals.logits.draw_temperatures is {list(self.draw_temperatures)}; expected "
                f"one or more of {known}, each once"
            )
        return TargetSpec(self.k, self.draws, betas, NODES[self.profile])

    def settings(self) -> dict[str, Any]:
        """What decides the targets: goes into identities, without what has no effect."""
        settings: dict[str, Any] = {"k": self.k, "profile": self.profile}
        if NODES[self.profile] != BETAS:
            settings["betas"] = list(NODES[self.profile])
        if self.draws:
            settings["draws"] = self.draws
            settings["draw_betas"] = list(self.target_spec().draw_betas)
        return settings

    def _asks_for(self, beta: float) -> bool:
        return any(abs(1 / t - beta) < 1e-3 for t in self.draw_temperatures if t > 0)


@dataclass(frozen=True)
class Hidden:
    """Which hidden states are kept."""

    layers: tuple[int, ...] = ()
    """Layers to store: 0 is the embedding's output, i the output of the i-th block, −1 (or the
    number of blocks) the states after the final norm."""
    dtype: HiddenDtype = "bfloat16"
    """`int8`, with one scale a position, takes half the bytes and is off by about 1%."""
    width: int | Literal["full"] = "full"
    """`full`, or N: states are projected onto the N leading principal directions of their layer,
    found in calibration. The share of variance kept is printed and stands in the manifest."""


@dataclass(frozen=True)
class Attention:
    """Which attention maps are kept. A map is S² numbers a head and row: choose few."""

    layers: tuple[int, ...] | Literal["all"] = ()
    """Blocks to store, counted from 0; negative ones from the last; or `all`."""
    heads: tuple[int, ...] | Literal["all", "mean"] = "all"
    """Heads to store, counted from 0; `mean` stores their mean as one head."""
    dtype: AttentionDtype = "uint8-log"
    """`uint8-log`: one byte on a logarithmic scale, off by 3% of a probability at most."""


@dataclass(frozen=True)
class Signals:
    """Kinds of teacher output to store. More may be added to a sealed cache later."""

    logits: Logits = field(default_factory=Logits)
    hidden: Hidden = field(default_factory=Hidden)
    attention: Attention = field(default_factory=Attention)


@dataclass(frozen=True)
class Precompute:
    """Run a teacher once over a corpus and seal what students learn from."""

    corpus: Corpus = field(default_factory=Corpus)
    teacher: Teacher = field(default_factory=Teacher)
    signals: Signals = field(default_factory=Signals)
    output: Path = Path("runs/cache")
    """The cache's directory. Running again with the same settings goes on where it stopped; files
    that the globs find by then make a new part of it."""
    seal_partial: bool = False
    """Capture nothing: seal what is committed so far as a part, so that training can start. The
    same command without this flag captures the rest and seals it as the next part."""
    runner: str = "FnApiRunner"
    """Beam runner. FnApiRunner is Beam's own in-process runner; `DaskRunner` needs the extra
    `dask`; any other by Beam's name for it."""
    runner_options: tuple[str, ...] = ()
    """Options handed to the Beam runner, written without their leading dashes, such as
    `dask_client_address=tcp://10.0.0.1:8786`."""
    tokenise_workers: int | None = None
    """Processes of this machine that tokenise; for FnApiRunner, the others have workers of their
    own. Unset: one a core if each gets 32 MiB of text or more, else none besides this one. The
    teacher always runs in one."""


@dataclass(frozen=True)
class Tokenise:
    """Seal the rows of a corpus without running a teacher, to be mixed in with a cache's."""

    like: Path = Path("runs/cache")
    """The sealed cache that the rows are to be mixed with: its tokenizer, its row length."""
    corpus: Corpus = field(default_factory=Corpus)
    output: Path = Path("runs/text")
    """Directory of the rows. Running again with the same settings goes on where it stopped."""
    runner: str = "FnApiRunner"
    """As for `precompute`."""
    runner_options: tuple[str, ...] = ()
    """As for `precompute`."""
    tokenise_workers: int | None = None
    """As for `precompute`."""
