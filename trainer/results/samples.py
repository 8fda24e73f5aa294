"""Samples of a run's student for the report: how it continues held-out text.

They are kept in the run's directory, because they take a checkpoint and a compiled program. The
same checkpoint, prompts and seed give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from decant.models.mesh.sharding import student_mesh
from decant.models.text.tokenizer import Tokenizer
from decant.schemas import open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Generate, Report
from decant.trainer.judging.heldout import spread_rows
from decant.trainer.results.prompts import prompts_of
from decant.trainer.results.sampling import Request, Sampler, Sampling
from decant.trainer.run.checkpoint import CHECKPOINTS, latest_step
from decant.trainer.run.data_facts import main_cache
from decant.trainer.run.saved_initial import open_initial
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
        found = [prompts_of(one, tokenizer)[0] for one in settings]
        return [Prompt(tuple(one.ids), one.text, "") for one in found]
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
    mesh = student_mesh(fsdp=jax.device_count())
    graph, params = load_student(run, dtype="float32", mesh=mesh)
    sampler = Sampler(
        graph,
        params,
        sampling=Sampling(MAX_TOKENS, temperature=0.8, top_p=0.95, seed=seed),
        vocabulary=tokenizer.size,
        stop=tokenizer.end_ids,
        batch_rows=len(prompts),
        mesh=mesh,
    )
    made = sampler.complete([Request(prompt.ids, i, 0) for i, prompt in enumerate(prompts)])
    return [tokenizer.decode(completion.ids) for completion in made]
