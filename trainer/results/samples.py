"""Samples of a run's student for the report: how it continues held-out text.

They are kept in the run's directory, because they take a checkpoint and a compiled program. The
same checkpoint, prompts and seed give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decant.models.text.tokenizer import Tokenizer
from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Generate, Report
from decant.trainer.judging.heldout import spread_rows
from decant.trainer.results.generate import complete, make_sampler, prompt_ids
from decant.trainer.run.checkpoint import CHECKPOINTS, latest_step
from decant.trainer.run.data_facts import main_cache
from decant.trainer.run.initial_student import open_initial
from decant.trainer.run.trained_student import load_student

FILE = "samples.json"
PROMPT_TOKENS = 24
"""Tokens of a held-out document that the student continues."""
MAX_TOKENS = 48
"""Most tokens that the student adds."""


@dataclass(frozen=True)
class Prompt:
    """A beginning, and how the text goes on."""

    ids: tuple[int, ...]
    text: str
    goes_on: str
    """Empty for a prompt from the settings."""


def samples_of(run: Path, config: Report) -> list[dict[str, str]]:
    """For each prompt: `prompt`, `goes_on` (the text itself) and `sample` (the student's).

    Raises ValueError or OSError if the run, its checkpoint or its cache cannot be read.
    """
    tokenizer = open_initial(run).tokenizer()
    prompts = _prompts(run, config, tokenizer)
    # The checkpoint's time tells apart two checkpoints of equal number.
    step = latest_step(run)
    made = (run / CHECKPOINTS / str(step)).stat().st_mtime_ns if step else 0
    asked = {"step": step, "made": made, "prompts": [list(prompt.ids) for prompt in prompts]}
    asked |= {"seed": config.seed, "max_tokens": MAX_TOKENS}
    if kept := _kept(run, asked):
        return kept
    texts = _complete(run, prompts, tokenizer, seed=config.seed)
    samples = [
        {"prompt": prompt.text, "goes_on": prompt.goes_on, "sample": text}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    write_json(run / FILE, {"asked": asked, "samples": samples})
    return samples


def _kept(run: Path, asked: dict[str, Any]) -> list[dict[str, str]] | None:
    if not (run / FILE).exists():
        return None
    kept = read_json(run / FILE, holds="samples")
    return kept["samples"] if kept.get("asked") == asked else None


def _prompts(run: Path, config: Report, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of the settings, or the first tokens of documents of held-out rows."""
    if config.prompts:
        settings = [Generate(run=run, prompt=text) for text in config.prompts]
        texts = zip(settings, config.prompts, strict=True)
        return [Prompt(tuple(prompt_ids(one, tokenizer)), text, "") for one, text in texts]
    path = main_cache(run)
    if path is None:
        raise ValueError(f"{run}: does not record its cache; give --prompts")
    cache = open_cache(path)
    rows = spread_rows(cache.rows(split="heldout"), config.samples)
    batch = cache.read(rows, signals=())
    return [
        _beginning(tokens[segments == _longest(segments)], tokenizer)
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
    ]


def _longest(segments: np.ndarray) -> int:
    """The segment of a row with the most tokens; 0 is padding."""
    return int(np.argmax(np.bincount(segments)[1:]) + 1)


def _beginning(ids: np.ndarray, tokenizer: Tokenizer) -> Prompt:
    """A document's piece cut into a prompt and what follows."""
    at = min(PROMPT_TOKENS, max(1, len(ids) // 2))
    first, rest = ids[:at].tolist(), ids[at : at + MAX_TOKENS].tolist()
    return Prompt(tuple(first), tokenizer.decode(first), tokenizer.decode(rest))


def _complete(
    run: Path, prompts: Sequence[Prompt], tokenizer: Tokenizer, *, seed: int
) -> list[str]:
    """The student's continuation of each prompt, without the prompt."""
    graph, params = load_student(run, dtype="float32")
    config = Generate(run=run, seed=seed, samples=1)
    sampler = make_sampler(graph, params, config=config, vocabulary=tokenizer.size)
    texts = []
    for prompt in prompts:
        ids = list(prompt.ids)
        (row,) = complete(sampler, ids, samples=1, max_tokens=MAX_TOKENS, stop=tokenizer.end_ids)
        texts.append(tokenizer.decode(row[len(ids) :]))
    return texts
