"""The commands as functions, for Python and notebooks: settings in, results out.

Every function takes the settings object of its command, the path of a config file, or nothing; then
settings by keyword, which change those. A dict stands for a table of the file:

    decant.train("student.toml", run="runs/b", data={"steps": 100})

Modules of jax and Beam are imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from decant.command_line.config_file import read_settings
from decant.command_line.python_values import override
from decant.command_line.settings import parse_settings
from decant.schemas import Cache, open_cache

if TYPE_CHECKING:
    from decant.pipelines.config import Precompute
    from decant.trainer.config import Evaluate, Generate, Train
    from decant.trainer.run.trained import Trained

Settings = TypeVar("Settings")


def precompute(config: Precompute | str | Path | None = None, **settings: Any) -> Cache:
    """Run a teacher over a corpus and seal the cache of what it says, as `decant precompute` does.

    Returns the sealed cache, opened; `cache.manifest` says what it holds. Called again, it goes on
    where it stopped, and takes in what is new in the corpus or the settings.

    ```python
    cache = decant.precompute(
        corpus={"files": ["texts/*.txt"]}, teacher={"model": "teacher/"}, output="runs/mine"
    )
    ```

    `config` is a `PrecomputeConfig` or a config file's path; see `decant precompute --help` for the
    settings. ValueError or FileNotFoundError for wrong settings and files, before the teacher runs;
    RuntimeError if a worker fails. Ctrl-C stops it, and units that are done are kept.
    """
    from decant.pipelines.capture.job import precompute as capture
    from decant.pipelines.config import Precompute

    chosen = _settings(Precompute, config, settings)
    capture(chosen)
    return open_cache(chosen.output)


def train(
    config: Train | str | Path | None = None,
    *,
    callbacks: Sequence[Callable[[dict[str, Any]], object]] = (),
    **settings: Any,
) -> Trained:
    """Train a student from a sealed cache, as `decant train` does.

    Returns the run: `heldout` is its last judgement, `metrics` its last update's line, `checkpoint`
    its newest checkpoint, and `finished` whether all updates are done. Called again with the same
    settings, it goes on from the newest checkpoint.

    ```python
    run = decant.train(cache="runs/mine", run="runs/a", data={"steps": 100}, callbacks=[print])
    print(run.heldout["heldout_ce"])
    ```

    Args:
        config: a `TrainConfig`, or the path of a config file.
        callbacks: each is called with a dict of the metrics of every line of `metrics.jsonl`, after
            the line was written: of an update (it has `loss`), or held out (`heldout_ce`). With
            several processes it is called in the first. An exception that it raises ends the run;
            the newest checkpoint stays, and the run can go on from it.
        settings: as `decant train --help` lists them.

    ValueError for settings that do not fit the caches, the devices or the run. In the main thread
    the first Ctrl-C or SIGTERM ends the run after the current update and saves it; then
    `finished` is False.
    """
    from decant.trainer.config import Train
    from decant.trainer.run.train import train as train_student

    return train_student(_settings(Train, config, settings), callbacks=callbacks)


def evaluate_run(config: Evaluate | str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Judge a run's student on held-out rows, as `decant evaluate` does; returns the measures.

    ```python
    decant.evaluate_run(run="runs/a")["heldout_ce"]
    ```

    Also writes them to `evaluation.json` in the run. `config` is an `EvaluateConfig` or a config
    file's path. For a model that decant did not train see `decant.evaluate`.
    """
    from decant.trainer.config import Evaluate
    from decant.trainer.results.evaluate import evaluate

    return evaluate(_settings(Evaluate, config, settings))


def generate(
    prompts: Sequence[str | Mapping[str, Any]],
    config: Generate | str | Path | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """What a run's student writes after each prompt, as records of `decant generate --jsonl`.

    ```python
    decant.generate(["The river"], run="runs/a", samples=4, logprobs=True)
    ```

    Args:
        prompts: texts, or mappings with `prompt` or `messages`, as lines of `--prompts`.
        config: a `Generate`, or the path of a config file.
        settings: as `decant generate --help` lists them; `prompt`, `prompts` and `output` have no
            effect.

    Records are in the order of the prompts, one for each sample. ValueError for a prompt that is
    none or too long.
    """
    from decant.trainer.config import Generate
    from decant.trainer.results.generate import generate_records

    return generate_records(_settings(Generate, config, {"jsonl": True, **settings}), prompts)


def _settings(
    kind: type[Settings], config: Settings | str | Path | None, changes: dict[str, Any]
) -> Settings:
    """The settings that a caller means. ValueError for a name or value that `kind` does not have.

    Paths in a file are read as on the command line; paths in `changes` as they are.
    """
    if config is None:
        config = kind()
    elif isinstance(config, str | Path):
        # Not `parse`, which ends the process if the path is a wrong command line.
        files = [read_settings(kind, Path(config))]
        config = parse_settings(kind, files, program=f"decant {kind.__name__.lower()}")
    elif not isinstance(config, kind):
        raise ValueError(
            f"expected {kind.__name__} settings, a config file's path or settings by keyword; got "
            f"{type(config).__name__}"
        )
    return override(config, changes)
