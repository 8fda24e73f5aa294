"""The trainer's command line: train, evaluate, export, plot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from schemas.settings import parse
from trainer.config import Evaluate, Export, Plot, Train

COMMANDS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "export": Export,
    "plot": Plot,
}


def main(arguments: Sequence[str]) -> int:
    """Run one command; errors that the user can mend are printed without a traceback."""
    if not arguments or arguments[0] not in COMMANDS:
        asked = arguments[0] if arguments else None
        help_wanted = asked in ("-h", "--help")
        text = (
            "usage: python -m trainer COMMAND [CONFIG.toml] [--flag value …]\n"
            "       python -m trainer train [CONFIG.toml] [--flag value …] --sweep SWEEP.toml\n\n"
        ) + "\n".join(f"  {name:<10}{config.__doc__}" for name, config in COMMANDS.items())
        unknown = f"unknown command {asked!r}\n" if asked and not help_wanted else ""
        print(unknown + text, file=sys.stdout if help_wanted else sys.stderr)
        return 0 if help_wanted else 2
    name, *rest = arguments
    try:
        if name == "train" and "--sweep" in rest:
            return _sweep(rest)
        config = parse(COMMANDS[name], rest, program=f"python -m trainer {name}")
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
    from trainer.sweep import read_sweep, sweep

    return 0 if sweep(read_sweep(Path(path[0]), rest)) else 1


def _command(name: str) -> Callable:
    # Imported here, so that --help and a config typo do not wait for jax.
    if name == "plot":
        from trainer.plot import plot

        return lambda config: print(plot(config))
    if name == "train":
        from trainer.loop import train

        return train
    if name == "export":
        from trainer.export import export

        return lambda config: print(export(config))
    from rich.console import Console

    from trainer.loop import evaluate

    return lambda config: Console().print_json(data=evaluate(config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
