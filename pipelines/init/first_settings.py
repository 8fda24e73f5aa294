"""The command `init`: looks at both, chooses, writes, and says what to type next."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from decant.command_line.result import Result
from decant.models.checkpoints.hub import HubId
from decant.pipelines.init.choices import Choices, choose
from decant.pipelines.init.files import (
    corpus_line,
    left_out,
    require_new,
    teacher_line,
    write_files,
)
from decant.pipelines.init.survey import look_at_corpus, look_at_teacher


def first_settings(teacher: str, corpus: Sequence[str], *, out: Path, console: Console) -> Result:
    """Write settings for `teacher` and `corpus` to `out` and to `train.toml` beside it.

    Notices go to `console`.

    FileExistsError if a file is there already; FileNotFoundError or ValueError if the teacher or
    the corpus cannot be read.
    """
    require_new(out)  # first, because a teacher may have to be fetched
    if not Path(teacher).exists() and (hub_id := HubId.parse(teacher)):
        console.print(
            f"{teacher}: not a path here, so its files are fetched from the hub unless they were "
            f"before; the weights of {hub_id.name} may be many GB, and `precompute` needs them too"
        )
    model = look_at_teacher(teacher)
    texts = look_at_corpus(corpus, model)
    if texts.kinds.get("chat") and not model.chats:
        raise ValueError(
            f"{texts.patterns[0]}: holds chats, but {model.title} has no chat template. Use a "
            "teacher that was trained to chat, or put its chat_template.jinja beside its "
            "tokenizer.json"
        )
    choices = choose(model, texts, platform=jax.default_backend())
    files = write_files(out, model, texts, choices)

    def details(console: Console) -> None:
        console.print(f"teacher  {teacher_line(model)}")
        console.print(f"corpus   {corpus_line(texts)}")
        for line in left_out(texts):
            console.print(f"         left out: {line}")
        for name, choice in _shown(choices):
            console.print(f"{name} = {choice.value}: {choice.why}")

    precompute, train = files
    return Result(
        f"wrote {precompute} and {train}; change them as you like",
        {
            "files": files,
            "teacher": dataclasses.asdict(model),
            "corpus": dataclasses.asdict(texts),
            "choices": {name: dataclasses.asdict(choice) for name, choice in _shown(choices)},
        },
        details=details,
        next=[
            ["decant", "plan", precompute],
            ["decant", "precompute", precompute],
            ["decant", "train", train],
        ],
    )


def _shown(choices: Choices) -> list:
    values = vars(choices).items()
    return [(name, choice) for name, choice in values if dataclasses.is_dataclass(choice)]
