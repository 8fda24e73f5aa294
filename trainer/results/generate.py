"""The command `generate`: what a student writes, as text for people or as records for a corpus."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from flax import nnx

from decant import __version__
from decant.models import open_checkpoint
from decant.models.mesh.sharding import student_mesh
from decant.models.text.tokenizer import Tokenizer
from decant.progress import notices, progress
from decant.schemas.disk.identity import digest, file_sha256
from decant.trainer.config import Generate
from decant.trainer.results.prompts import Prompt, as_prompts, prompts_of, that_fit
from decant.trainer.results.rollouts import RecordFile, as_line, record_of, windows
from decant.trainer.results.sampling import Completion, Request, Sampler, Sampling
from decant.trainer.run.saved_initial import open_initial
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.run.trained_student import load_student, student_digest

_WINDOW = 16
"""Batches between two writes of records. Prompts are sorted by length within so many."""


class _Work(NamedTuple):
    """A student at work."""

    config: Generate
    tokenizer: Tokenizer
    prompts: list[Prompt]
    sampler: Sampler
    writer: str
    """The student's `student_digest`; empty if nobody asks for it."""

    @property
    def window(self) -> int:
        return _WINDOW * self.sampler.batch_rows

    def complete(
        self, pairs: Sequence[tuple[Prompt, int]], written: Callable[[Sequence[Completion]], object]
    ) -> list[Completion]:
        requests = [Request(prompt.ids, prompt.number, sample) for prompt, sample in pairs]
        return self.sampler.complete(requests, written=written)

    def records(self, *, after: int = 0) -> Generator[list[dict[str, Any]], None, None]:
        """Records of all completions, in windows, without the first `after`; progress and speed go
        to standard error. The caller closes the generator, which ends the progress."""
        config, console = self.config, notices()
        total, tokens, began = len(self.prompts) * config.sampling.samples, 0, time.monotonic()
        writer = self.writer if config.logprobs else None
        with progress(
            "generate", total=total, unit="completions", console=console, before=after
        ) as count:

            def written(batch: Sequence[Completion]) -> None:
                nonlocal tokens
                tokens += sum(len(completion.ids) for completion in batch)
                count.add(len(batch))

            pairs = windows(self.prompts, samples=config.sampling.samples, size=self.window)
            for number, window in enumerate(pairs):
                if number * self.window < after:
                    continue
                made = self.complete(window, written)
                yield [
                    record_of(prompt, completion, tokenizer=self.tokenizer, writer=writer)
                    for (prompt, _), completion in zip(window, made, strict=True)
                ]
        seconds = time.monotonic() - began
        console.print(
            f"wrote {total - after:,} completions of {tokens:,} tokens, "
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
        )


def generate(config: Generate) -> list[str]:
    """The samples of each prompt as text, with the prompt and with special tokens spelled out.

    Raises FileNotFoundError if there is no such run, model or file of prompts, ValueError for a
    prompt that does not fit the student; see `prompts.py`.
    """
    work = _begin(config)
    (pairs,) = windows(work.prompts, samples=config.sampling.samples, size=1 << 62)
    made = work.complete(pairs, lambda batch: None)
    return [
        work.tokenizer.decode([*prompt.ids, *completion.ids])
        for (prompt, _), completion in zip(pairs, made, strict=True)
    ]


def generate_records(
    config: Generate, prompts: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """The records of all completions; `prompts` takes the place of those of the settings."""
    given = None
    if prompts is not None:
        given = [(f"prompt {number}", prompt) for number, prompt in enumerate(prompts)]
        config = dataclasses.replace(config, samples=config.samples or 1)
    with contextlib.closing(_begin(config, given).records()) as made:
        return [record for window in made for record in window]


def generate_lines(config: Generate) -> Generator[str, None, None]:
    """The records of all completions as lines, or none of them if they go to `config.output`.

    The caller closes the generator.
    """
    work = _begin(config)
    if config.output is None:
        with contextlib.closing(work.records()) as made:
            for window in made:
                yield from map(as_line, window)
        return
    file = RecordFile(config.output, asked=_asked(work))
    with contextlib.closing(work.records(after=file.lines_kept(multiple=work.window))) as made:
        for window in made:
            file.append(window)
    file.finish()
    notices().print(f"in {config.output}")


def _begin(config: Generate, given: Sequence[tuple[str, Any]] | None = None) -> _Work:
    """Check the prompts, then load the student."""
    place = open_initial(config.run) if config.model is None else open_checkpoint(config.model)
    tokenizer, shape = place.tokenizer(), place.config
    if given is None:
        asked = prompts_of(config, tokenizer)
    else:
        asked = as_prompts(given, config=config, tokenizer=tokenizer)
    prompts = that_fit(asked, config=config, student=shape, tokenizer=tokenizer)
    if not prompts:
        raise ValueError(f"{config.prompts}: holds no prompts")
    if skipped := len(asked) - len(prompts):
        notices().print(f"left out {skipped:,} of {len(asked):,} prompts, which are too long")
    mesh = student_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    if config.model is None:
        graph, params = load_student(
            config.run, dtype=config.dtype, checkpoint=config.checkpoint, mesh=mesh
        )
    else:
        model = place.load(dtype=config.dtype, param_dtype="float32", mesh=mesh)
        graph, params = graph_and_parameters(model)
    chosen = config.sampling
    sampler = Sampler(
        graph,
        params,
        sampling=Sampling(config.max_tokens, chosen.temperature, chosen.top_p, config.seed),
        vocabulary=tokenizer.size,
        stop=tokenizer.end_ids,
        batch_rows=min(config.batch_rows, len(prompts) * chosen.samples),
        mesh=mesh,
    )
    needed = config.logprobs or config.output is not None
    writer = student_digest(nnx.merge(graph, params)) if needed else ""
    return _Work(config, tokenizer, prompts, sampler, writer)


def _asked(work: _Work) -> str:
    """A digest of all that decides the lines of a file."""
    config, chosen = work.config, work.config.sampling
    return digest(
        {
            "prompts": config.prompt if config.prompts is None else file_sha256(config.prompts),
            "chat": [config.chat, config.chat_date, *config.chat_variables],
            "sampling": [chosen.samples, chosen.temperature, chosen.top_p, config.seed],
            "shape": [config.max_tokens, work.sampler.batch_rows, config.dtype, config.skip_long],
            "logprobs": config.logprobs,
            "student": [work.writer, work.tokenizer.digest],
            "version": __version__,
        }
    )
