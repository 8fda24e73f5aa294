"""How many tokens of a student with another tokenizer a teacher speaks of, and at what speed.

    python -m benchmarks.tokenizer_pairs DIRECTORY... [--tokens 200000] [--rows 512]

The embedded teacher's tokenizer and those of the directories are paired, both ways. The text is
Python's standard library (code) and this project's documentation (prose), in pieces of `rows`
tokens as a cache has them. Columns:

- partners: share of the teacher's, and of the student's, vocabulary that has an exact partner;
- begun: share of the student's tokens that begin where a teacher's token begins;
- known: share whose probability is known too, because the token is the first of the teacher's
  next token, or whole teacher's tokens; of it by several tokens in the last column;
- tokens/s: of one core, without and with the student's tokenizer itself.

Before that, each tokenizer must spell the text: ValueError if joined bytes differ from it.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import itertools
import sysconfig
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from decant.models import open_checkpoint
from decant.models.text.alignment import align_segment
from decant.models.text.projection import project_vocabulary
from decant.models.text.spelling import Spelling, token_spelling
from decant.models.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


def main() -> None:
    options = _arguments()
    tokenizers = {"SmolLM2": open_checkpoint("embedded").tokenizer()}
    tokenizers |= {path.name: Tokenizer.from_files(path) for path in options.directories}
    texts = {
        "code": sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")),
        "prose": sorted((ROOT / "docs").glob("*.md")),
    }
    columns = ("teacher", "student", "text", "partners", "begun", "known", "by several")
    table = Table(*columns, "tokens/s without", "tokens/s with")
    for kind, paths in texts.items():
        documents = [path.read_text("utf-8", errors="ignore") for path in paths]
        for name, tokenizer in tokenizers.items():
            require_spelt(tokenizer, documents, name=name)
        for (ours, teacher), (theirs, student) in itertools.permutations(tokenizers.items(), 2):
            segments = pieces(teacher, documents, tokens=options.tokens, length=options.rows)
            table.add_row(ours, theirs, kind, *measured(teacher, student, segments))
    Console(width=120).print(table)


def require_spelt(tokenizer: Tokenizer, documents: list[str], *, name: str) -> None:
    """ValueError if the bytes of a document's tokens are not the document."""
    spelling = token_spelling(tokenizer)
    for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
        joined = spelling.join(ids.tolist())
        if joined != spelling_of_text(text, spelling):
            raise ValueError(f"{name} does not spell {text[:40]!r}…")


def spelling_of_text(text: str, spelling: Spelling) -> bytes:
    """The text, with the space that the tokenizer puts in front. SentencePiece writes ▁ for " "."""
    spaced = spelling.prefix != "never" and text
    return ((" " if spaced else "") + (text.replace("▁", " ") if spaced else text)).encode()


def pieces(
    teacher: Tokenizer, documents: list[str], *, tokens: int, length: int
) -> list[tuple[np.ndarray, bool]]:
    """Segments of a cache's rows, and whether each begins its document, up to `tokens` in all."""
    made, count = [], 0
    for ids in teacher.encode_batch(documents):
        for start in range(0, len(ids), length - 1):
            made.append((ids[start : start + length], start == 0))
            count += len(made[-1][0])
            if count >= tokens:
                return made
    return made


def measured(
    teacher: Tokenizer, student: Tokenizer, segments: list[tuple[np.ndarray, bool]]
) -> list[str]:
    """The cells of a row of the table."""
    ours, theirs = token_spelling(teacher), token_spelling(student)
    made = project_vocabulary(teacher, student, teacher_spelling=ours, student_spelling=theirs)
    begun = known = several = tokens = 0
    start = time.process_time()
    aligned = [
        align_segment(
            ids,
            np.ones(len(ids), bool),
            teacher=ours,
            student=student,
            student_spelling=theirs,
            mapping=made.special,
            begins=begins,
        )
        for ids, begins in segments
    ]
    took = time.process_time() - start
    texts = [ours.join(ids.tolist()).decode(errors="ignore") for ids, _ in segments]
    start = time.process_time()
    for text in texts:
        student.encode_batch([text])
    encoding = time.process_time() - start
    for (ids, _), each in zip(segments, aligned, strict=True):
        at = np.flatnonzero(each.source[:-1] >= 0)
        first = made.first[ids[each.source[at] + 1]] == each.tokens[at + 1]
        begun += len(at)
        known += int((first | (each.spans[at] > 0)).sum())
        several += int((each.spans[at] > 1).sum())
        tokens += max(len(each.tokens) - 1, 0)
    count = sum(len(ids) for ids, _ in segments)
    return [
        f"{made.teacher_overlap:.2f} {made.overlap:.2f}",
        *(f"{share / tokens:.3f}" for share in (begun, known, several)),
        f"{count / max(took - encoding, 1e-9):,.0f}",
        f"{count / took:,.0f}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=512, help="tokens of a row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
