"""`python -m decant.trainer COMMAND …`: run a command that trains, judges or exports students."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from decant.command_line.arguments import sorted_arguments
from decant.command_line.closed_output import exit_with, is_left_by_reader
from decant.command_line.menu import STUDENTS, menu, unknown
from decant.command_line.result import Result, show
from decant.command_line.settings import SWITCHES, parse
from decant.foreign import tell
from decant.store.urls import is_url, url_of
from decant.trainer.config import Evaluate, Export, Generate, Report, Train
from decant.trainer.run.freed_memory import keep_freed_memory

# Every function here imports its job itself, so that --help and a typo in a config file do not
# wait for jax.


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; a user's mistakes are told without a traceback."""
    if not arguments or arguments[0] not in COMMANDS:
        asked = arguments[0] if arguments else ""
        text = menu({"Commands": STUDENTS})
        if asked in ("-h", "--help"):
            tell(text)
            return 0
        tell(unknown(asked, STUDENTS) if asked else text, file=sys.stderr)
        return 2
    keep_freed_memory()
    try:
        return COMMANDS[arguments[0]](list(arguments[1:]))
    except (ValueError, OSError, FloatingPointError) as error:
        if is_left_by_reader(error):
            raise  # `exit_with` then ends quietly
        tell(f"error: {error}", file=sys.stderr)
    except MemoryError as error:
        tell(f"error: not enough memory. {error}", file=sys.stderr)
    return 1


@dataclass(frozen=True)
class TrainOrSweep(Train):
    """Train a student from a sealed cache. The same command again resumes from the newest
    checkpoint."""

    sweep: Path | None = None
    """Train every student of this TOML file, one after another, and compare them. The config file
    and the flags hold for all of them."""


def _train(arguments: list[str]) -> int:
    """`train [CONFIG.toml] [--flag value …] [--sweep SWEEP.toml]`."""
    given = sorted_arguments(TrainOrSweep, arguments, program="decant train")
    if sweeps := [flag for flag in given.flags if flag.startswith("--sweep=")]:
        flags = [flag for flag in given.flags if flag not in sweeps]
        return _sweep(Path(sweeps[-1].removeprefix("--sweep=")), given.config, flags)
    parsed = parse(TrainOrSweep, arguments, program="decant train")
    config = Train(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(Train)})
    from decant.trainer.run.processes import is_first_process
    from decant.trainer.run.train import train

    trained = train(config)
    if not is_first_process():
        return 0
    run = config.run
    if trained.finished:
        line = f"finished: all {trained.steps:,} updates are done and saved in {run}"
        following = [
            ["decant", "evaluate", run],
            ["decant", "generate", run],
            ["decant", "export", run],
        ]
    else:
        line = f"stopped after update {trained.step:,} of {trained.steps:,}; saved in {run}"
        same = [word for word in arguments if word not in SWITCHES]
        line += (
            f". To continue, run the same command again: {shlex.join(['decant', 'train', *same])}"
        )
        following = []
    return show(Result(line, trained.document(), next=following), config)


def _sweep(path: Path, shared: Path | None, flags: Sequence[str]) -> int:
    """Train every student of a sweep file; the config file and the flags hold for all of them."""
    from decant.trainer.results.sweep import read_sweep, sweep

    config = read_sweep(path, shared, flags)
    return show(sweep(config), next(iter(config.students.values())))


def _evaluate(arguments: list[str]) -> int:
    config = parse(Evaluate, arguments, program="decant evaluate", about=("run",))

    from decant.trainer.results.evaluate import FILE, evaluate
    from decant.trainer.results.evaluation_tables import as_table, details_table
    from decant.trainer.results.judged_on import describe

    judgement = evaluate(config)
    line = (
        f"evaluated {config.run} after update {judgement['step']:,} on "
        f"{describe(judgement)}; kept in {config.run / FILE}"
    )
    following = [
        ["decant", "report", config.run],
        ["decant", "export", config.run],
    ]
    tables = as_table(judgement), details_table(judgement)
    # Each row's figures are for comparisons: nobody wants to scroll past them.
    shown = {name: value for name, value in judgement.items() if name != "kl_by_row"}
    result = Result(line, shown, details=lambda c: c.print(*tables), next=following)
    return show(result, config)


def _report(arguments: list[str]) -> int:
    config = parse(Report, arguments, program="decant report", about=("runs",))
    from decant.trainer.results.report import report

    page = report(config)
    line = f"wrote {page}: open it in a browser"
    return show(Result(line, {"page": page, "runs": config.runs}), config)


def _generate(arguments: list[str]) -> int:
    config = parse(Generate, arguments, program="decant generate", about=("run",))
    from decant.trainer.results.generate import generate, generate_lines

    if config.writes_records:
        with contextlib.closing(generate_lines(config)) as lines:
            for line in lines:
                tell(line)
        return 0
    samples = config.sampling.samples
    for number, text in enumerate(generate(config)):
        prompt = "" if config.prompts is None else f"prompt {number // samples}, "
        tell(f"── {prompt}sample {number % samples}, seed {config.seed} ──\n{text}\n")
    return 0


def _export(arguments: list[str]) -> int:
    config = parse(Export, arguments, program="decant export", about=("run", "output"))
    from decant.trainer.results.export import export

    export(config)
    written = url_of(config.output) or config.output
    readers = "student.source and teacher.model"
    if not is_url(config.output):
        readers = f"transformers, {readers}"
    line = f"wrote {written}: {readers} can read it"
    return show(Result(line, {"output": written, "run": config.run}), config)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
    "generate": _generate,
    "export": _export,
}
"""By name: a function of the arguments after the name, which returns the exit status."""

if __name__ == "__main__":
    exit_with(main)
