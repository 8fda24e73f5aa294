"""The trainer's command line: train, evaluate, export, generate, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from decant.settings import parse
from decant.trainer.config import Evaluate, Export, Generate, Report, Train

COMMANDS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
    "generate": Generate,
    "report": Report,
}


def main(arguments: Sequence[str]) -> int:
    """Run one command; errors that the user can mend are printed without a traceback."""
    if not arguments or arguments[0] not in COMMANDS:
        asked = arguments[0] if arguments else None
        help_wanted = asked in ("-h", "--help")
        text = (
            "usage: decant COMMAND [CONFIG.toml] [--flag value …]\n"
            "       decant train [CONFIG.toml] [--flag value …] --sweep SWEEP.toml\n\n"
        ) + "\n".join(f"  {name:<10}{config.__doc__}" for name, config in COMMANDS.items())
        unknown = f"unknown command {asked!r}\n" if asked and not help_wanted else ""
        print(unknown + text, file=sys.stdout if help_wanted else sys.stderr)
        return 0 if help_wanted else 2
    name, *rest = arguments
    if name == "report" and rest and not rest[0].startswith("-") and not rest[0].endswith(".toml"):
        rest = ["--runs", *rest]
    try:
        if name == "train" and "--sweep" in rest:
            return _sweep(rest)
        config = parse(COMMANDS[name], rest, program=f"decant {name}")
        _command(name)(config)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _sweep(arguments: list[str]) -> int:
    """`train [CONFIG.toml] [--flag value …] --sweep SWEEP.toml`, the file and flags for all."""
    at = arguments.index("--sweep")
    path, rest = arguments[at + 1 : at + 2], arguments[:at] + arguments[at + 2 :]
    if not path:
        raise ValueError("--sweep: name the file that says which students; see the README")
    from decant.trainer.results.sweep import read_sweep, sweep

    return 0 if sweep(read_sweep(Path(path[0]), rest)) else 1


def _command(name: str) -> Callable:
    # Imported here, so that --help and a config typo do not wait for jax.
    if name == "report":
        from decant.trainer.results.report import report

        return lambda config: print(report(config))
    if name == "train":
        from decant.trainer.run.train import train

        return train
    if name == "export":
        from decant.trainer.results.export import export

        return lambda config: print(export(config))
    return _generate if name == "generate" else _evaluate


def _generate(config: Generate) -> None:
    from decant.trainer.results.generate import generate

    for number, text in enumerate(generate(config)):
        print(f"── sample {number}, seed {config.seed} ──\n{text}\n")


def _evaluate(config: Evaluate) -> None:
    from rich.console import Console

    from decant.trainer.results.evaluate import as_table, evaluate

    judgement = evaluate(config)
    if config.table:
        Console(width=None if sys.stdout.isatty() else 200).print(as_table(judgement))
    else:
        print(json.dumps(judgement, indent=2))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
