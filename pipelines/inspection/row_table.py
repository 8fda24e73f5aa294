"""One row in the terminal: a line a token, and where its documents are from."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from decant.foreign import plain
from decant.pipelines.inspection.row import Candidate, Origin, Prediction, Token, visible


def row_table(tokens: Sequence[Token]) -> Table:
    """The tokens and their predictions; with a student, its probabilities beside the teacher's,
    and of a text that a model wrote, that model's."""
    beside = any(t.prediction and t.prediction.kl is not None for t in tokens)
    written = is_written(tokens)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("token", max_width=24)
    numbers = ("p", "student", "KL ≥") if beside else ("p",)
    numbers = (*numbers, *(["writer"] if written else []))
    for name in (*numbers, "entropy", "tail"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("likeliest: teacher/student" if beside else "the teacher's likeliest")
    for token in tokens:
        if token.prediction is None:
            table.add_row(_visible(token.text), style="dim")
        else:
            table.add_row(
                _visible(token.text), *_cells(token.prediction, beside=beside, written=written)
            )
    return table


def is_written(tokens: Sequence[Token]) -> bool:
    """Whether a model is known to have written any of the tokens."""
    return any(t.prediction and t.prediction.writer_probability is not None for t in tokens)


def legend(*, beside: bool, written: bool = False) -> str:
    """What the table's columns mean."""
    lines = [
        "p: the teacher's probability of the token in this line, given those before it (– if it",
        "is not among the stored ids). entropy: of the teacher's prediction, in nats. tail: its",
        "probability of all tokens that are not stored.",
    ]
    if beside:
        lines += [
            "student: its probability of the token. KL ≥: from teacher to student in nats, with",
            "the tail as one token. A – beside a likeliest token: not stored of the teacher.",
        ]
    if written:
        lines.append("writer: the probability that the model gave to the token when it wrote it.")
    return "\n".join(lines)


def origin_lines(origins: Sequence[Origin]) -> list[str]:
    """Source file and place of each document in a row."""
    return [
        f"{origin.source}, document {origin.document}, from its token {origin.start} on"
        for origin in origins
    ]


def _cells(prediction: Prediction, *, beside: bool, written: bool) -> list[str | Text]:
    cells = [_share(prediction.probability)]
    if beside:
        cells += [_share(prediction.student_probability), f"{prediction.kl:.2f}"]
    if written:
        cells.append(_share(prediction.writer_probability))
    likely = Text("  ").join(_candidate(one, beside=beside) for one in prediction.alternatives)
    return [*cells, f"{prediction.entropy:.2f}", f"{prediction.tail:.3f}", likely]


def _candidate(candidate: Candidate, *, beside: bool) -> Text:
    numbers = f"={_share(candidate.teacher, 2)}"
    if beside:
        numbers += f"/{_share(candidate.student, 2)}"
    return Text.assemble(_visible(candidate.text), numbers)


def _share(p: float | None, digits: int = 3) -> str:
    return "–" if p is None else f"{p:.{digits}f}"


def _visible(text: str) -> Text:
    # Not a string, in which Rich would read markup.
    return Text(plain(visible(text)))
