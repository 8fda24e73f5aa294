"""Writes the chosen settings as two commented TOML files, which are never overwritten."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from decant.pipelines.init.choices import Choice, Choices
from decant.pipelines.init.survey import CorpusFacts, TeacherFacts
from decant.schemas.disk.sizes import size_text
from decant.store import is_url

TRAIN = "train.toml"
"""Name of the student's file, beside the capture's."""
_WIDTH = 40


def write_files(
    precompute: Path, teacher: TeacherFacts, corpus: CorpusFacts, choices: Choices
) -> tuple[Path, Path]:
    """Write both files; returns their paths. FileExistsError if one is there, then none is written.

    The cache and the run get their places below the folder of the files.
    """
    train = precompute.with_name(TRAIN)
    require_new(precompute)
    precompute.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (precompute, precompute_text(teacher, corpus, choices, folder=precompute.parent)),
        (train, train_text(teacher, choices, folder=precompute.parent)),
    ):
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    return precompute, train


def require_new(precompute: Path) -> None:
    """FileExistsError if one of the two files is there."""
    for path in (precompute, precompute.with_name(TRAIN)):
        if path.exists():
            raise FileExistsError(
                f"{path}: is there already and is not overwritten. Move it away, or name another "
                "file with --out"
            )


def precompute_text(
    teacher: TeacherFacts, corpus: CorpusFacts, choices: Choices, *, folder: Path
) -> str:
    """The text of precompute.toml."""
    files = [_from(folder, pattern) for pattern in corpus.patterns]
    chat_date = []
    if corpus.kinds.get("chat"):
        chat_date = ['# chat_date = "2026-01-31"  # if the chat template writes the current date']
    return _lines(
        "# Settings of `decant plan` and `decant precompute`, written by `decant init`.",
        "# `decant precompute --help` lists all others with their defaults.",
        "",
        f"output = {_toml(_below(folder, 'runs/cache'))}",
        "",
        "[teacher]",
        f"# {teacher_line(teacher)}.",
        f"model = {_toml(_from(folder, teacher.name))}",
        _chosen("dtype", choices.dtype),
        "",
        "[corpus]",
        f"# {corpus_line(corpus)}.",
        *[f"# Left out: {line}" for line in left_out(corpus)],
        f"files = {_toml(files)}",
        _chosen("sequence_length", choices.sequence_length),
        _chosen("heldout", choices.heldout),
        *chat_date,
        "",
        "[signals.logits]",
        _chosen("k", choices.k),
        _chosen("counts", choices.counts),
        _chosen("sketch.rank", choices.sketch_rank),
        "",
        "# For losses on hidden states, also store some of them (−1: after the final norm):",
        "# [signals.hidden]",
        "# layers = [-1]",
    )


def train_text(teacher: TeacherFacts, choices: Choices, *, folder: Path) -> str:
    """The text of train.toml."""
    every = max(1, choices.updates // 10)
    return _lines(
        "# Settings of `decant train`, written by `decant init`.",
        "# `decant train --help` lists all others with their defaults.",
        "",
        f"cache = {_toml(_below(folder, 'runs/cache'))}",
        f"run = {_toml(_below(folder, 'runs/student'))}",
        _chosen("dtype", choices.dtype),
        _chosen("heldout_rows", choices.heldout_rows),
        _chosen("evaluate_every", Choice(every, "ten judgements in the run")),
        _chosen("checkpoint_every", Choice(every, "a stopped run loses at most a tenth")),
        "",
        "[student]",
        'init = "cut"'.ljust(_WIDTH) + "# blocks of the teacher, spread evenly",
        f"source = {_toml(_from(folder, teacher.name))}",
        _chosen("layers", choices.student_layers),
        "",
        "[data]",
        _chosen("batch_rows", choices.batch_rows),
        _chosen("epochs", choices.epochs),
        "",
        "[optimiser]",
        _chosen("learning_rate", choices.learning_rate),
        _chosen("warmup_steps", Choice(max(1, choices.updates // 20), "a twentieth of the run")),
    )


def teacher_line(teacher: TeacherFacts) -> str:
    """The teacher in a line."""
    chats = ", with a chat template" if teacher.chats else ""
    title = " ".join(teacher.title.split())  # a line end would end the comment in the file
    return (
        f"{title}: {teacher.family}, {_count(teacher.parameters)} parameters in "
        f"{teacher.layers} layers of width {teacher.width:,}, {teacher.vocabulary:,} tokens, "
        f"context {teacher.positions:,}; {size_text(teacher.weight_bytes)} of "
        f"{' and '.join(teacher.kinds[:2])}{chats}"
    )


def corpus_line(corpus: CorpusFacts) -> str:
    """The corpus in a line."""
    kinds = ", ".join(f"{kind}s" for kind in sorted(corpus.kinds)) or "texts"
    low, middle, high = (corpus.length_at(share) for share in (0.1, 0.5, 0.9))
    about = "about " if corpus.documents > len(corpus.lengths) else ""
    return (
        f"{corpus.files:,} files, {size_text(corpus.bytes)}: {about}{corpus.documents:,} "
        f"documents ({kinds}), about {_count(corpus.tokens)} tokens. Of {len(corpus.lengths):,} "
        f"documents read, half have {middle:,} tokens or fewer, 1 of 10 up to {low:,}, "
        f"9 of 10 up to {high:,}"
    )


def left_out(corpus: CorpusFacts) -> Sequence[str]:
    """Lines on the files in the folders that are not read."""
    return [f"{count:,} × {what}" for what, count in sorted(corpus.left_out.items())]


def _chosen(name: str, choice: Choice) -> str:
    return f"{name} = {_toml(choice.value)}".ljust(_WIDTH) + f"# {choice.why}"


def _from(folder: Path, name: str) -> str:
    """A path or glob of the working directory, for a file in `folder`; addresses and hub ids as
    they are."""
    is_name = is_url(name) or not (Path(name).exists() or glob.has_magic(name))
    return name if is_name or folder.resolve() == Path.cwd() else str(Path.cwd() / name)


def _below(folder: Path, name: str) -> str:
    """A path below `folder`, written so that it holds from anywhere."""
    return name if folder.resolve() == Path.cwd() else str(folder.resolve() / name)


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:,.1f}{name}"
    return f"{number:,}"


def _lines(*lines: str) -> str:
    return "\n".join(line.rstrip() for line in lines) + "\n"
