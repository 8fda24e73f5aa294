"""Weights & Biases and MLflow, as callbacks of the metrics log; each is optional.

A run's directory remembers the tracker's run in `trackers.json`, so that a continued run goes on in
the same one. Lines after the newest checkpoint are logged a second time then, with equal values.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Log

FILE = "trackers.json"
Callback = Callable[[dict[str, Any]], object]
"""Called with the metrics of every line of `metrics.jsonl`."""


def check_trackers(log: Log) -> None:
    """ValueError if a tracker that the settings ask for is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(log, name) and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"log.{name} is set, but {name} is not installed; install it with `pip install "
                f"'decant-distill[{name}]'`, or leave out log.{name}"
            )


@contextlib.contextmanager
def trackers(
    log: Log, *, run: Path, settings: Mapping[str, Any], quiet: bool
) -> Iterator[list[Callback]]:
    """The callbacks that `log` asks for; at the end each tracker is told whether the run failed.

    `settings` are what the run is bound to, by dotted name.
    """
    with contextlib.ExitStack() as stack:
        callbacks = []
        if log.wandb:
            callbacks.append(stack.enter_context(_wandb(log.wandb, run, settings, quiet=quiet)))
        if log.mlflow:
            callbacks.append(stack.enter_context(_mlflow(log.mlflow, run, settings)))
        yield callbacks


@contextlib.contextmanager
def _wandb(
    project: str, run: Path, settings: Mapping[str, Any], *, quiet: bool
) -> Iterator[Callback]:
    import wandb  # pyright: ignore[reportMissingImports]  (optional)

    id_ = _remembered(run, f"wandb {project}", make=lambda: uuid.uuid4().hex)
    tracked = wandb.init(
        project=project,
        id=id_,
        name=run.resolve().name,
        dir=str(run),
        config=dict(settings),
        resume="allow",
        reinit="create_new",
        # Our progress bar would be recorded line by line.
        settings=wandb.Settings(console="off", silent=quiet),
    )
    # W&B's own step only grows, so it would drop lines that a continued run logs again.
    tracked.define_metric("*", step_metric="step")
    failed = True
    try:
        yield lambda metrics: tracked.log({"step": metrics["step"], **_numbers(metrics)})
        failed = False
    finally:
        tracked.finish(exit_code=int(failed))


@contextlib.contextmanager
def _mlflow(experiment: str, run: Path, settings: Mapping[str, Any]) -> Iterator[Callback]:
    import mlflow  # pyright: ignore[reportMissingImports]  (optional)
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

    # The client, and not `mlflow.start_run`, whose active run may be the caller's.
    client = mlflow.MlflowClient()

    def begin() -> str:
        found = client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else client.create_experiment(experiment)
        id_ = client.create_run(where, run_name=run.resolve().name).info.run_id
        values = [Param(_plain(name), str(value)) for name, value in settings.items()]
        client.log_batch(id_, params=values)
        return id_

    id_ = _remembered(run, f"mlflow {experiment}", make=begin)
    client.update_run(id_, status="RUNNING")

    def log(metrics: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        values = _numbers(metrics).items()
        step = metrics["step"]
        client.log_batch(id_, metrics=[Metric(_plain(n), v, now, step) for n, v in values])

    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    finally:
        client.set_terminated(id_, status=status)


def _remembered(run: Path, name: str, *, make: Callable[[], str]) -> str:
    """The id that the run's directory remembers under `name`; the first time a new one."""
    path = run / FILE
    known = read_json(path) if path.exists() else {}
    if not isinstance(known.get(name), str):
        known[name] = make()
        write_json(path, known)
    return known[name]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line, without its step."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _plain(name: str) -> str:
    """A setting's or metric's name as MLflow allows it: `loss.hidden.0.weight`."""
    return name.replace("[", ".").replace("]", "").replace(" ", "_")
