"""Records of what a student wrote, and the file that they are written into.

A record is a corpus record: `{"prompt", "completion"}`, and with log-probabilities a rollout, which
`decant precompute` scores token by token. Records are in the order of the prompts.

The file gets its name when it is complete. Until then lines are appended to a hidden file beside it
whose name holds a digest of the command, so the same command goes on where it was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from decant.models.text.tokenizer import Tokenizer
from decant.trainer.results.prompts import Prompt
from decant.trainer.results.sampling import Completion


def record_of(
    prompt: Prompt, completion: Completion, *, tokenizer: Tokenizer, writer: str | None
) -> dict[str, Any]:
    """The record of one completion; with a `writer`, that of a rollout.

    The text is the completion's without its end token, decoded after its prompt. A character that
    the last tokens hold only a part of is written as U+FFFD; the ids are whole.
    """
    ids = completion.ids.tolist()
    texts = {"prompt": prompt.text, "completion": continuation(prompt.ids, ids, tokenizer)}
    if writer is None:
        return texts
    return {
        **texts,
        "prompt_ids": prompt.ids,
        "completion_ids": ids,
        # Nine digits give the same float32 again.
        "logprobs": [float(f"{value:.9g}") for value in completion.logprobs],
        "writer": writer,
        "tokenizer": tokenizer.digest,
    }


def continuation(prompt: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids that follow a prompt, without a last end token.

    They are decoded together with it: alone, SentencePiece would drop the first space.
    """
    body = ids[:-1] if ids and ids[-1] in tokenizer.end_ids else ids
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *body])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(body)


def as_line(record: dict[str, Any]) -> str:
    """The record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False)


class RecordFile:
    """The file `output`, which `finish` gives its name; `asked` is a digest of all that decides
    its lines."""

    def __init__(self, output: Path, *, asked: str):
        self._output = output
        self._partial = output.with_name(f".{output.name}.{asked[:16]}.partial")
        output.parent.mkdir(parents=True, exist_ok=True)

    def lines_kept(self, *, multiple: int) -> int:
        """Lines that an earlier run has written: as many whole multiples as there are.

        What follows them is cut off.
        """
        if not self._partial.exists():
            return 0
        ends = [0]
        with self._partial.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    ends.append(ends[-1] + len(line))
        kept = (len(ends) - 1) // multiple * multiple
        os.truncate(self._partial, ends[kept])
        return kept

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write more lines; when this returns they survive a kill."""
        with self._partial.open("ab") as file:
            file.write("".join(f"{as_line(record)}\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the file its name, and remove what other commands began and never finished."""
        self._partial.touch()
        self._partial.replace(self._output)
        for left in self._output.parent.glob(f".{self._output.name}.*.partial"):
            with contextlib.suppress(FileNotFoundError):
                left.unlink()


def windows(
    prompts: Sequence[Prompt], *, samples: int, size: int
) -> Iterator[list[tuple[Prompt, int]]]:
    """(prompt, sample number) of all completions, in order, in lists of `size` but for the last."""
    every = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    for start in range(0, len(every), size):
        yield every[start : start + size]
