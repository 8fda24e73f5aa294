"""Weights & Biases and MLflow, as callbacks of the metrics log; each is optional.

A run's directory remembers the tracker's run in `trackers.json`, so that a continued run goes on in
the same one. Lines after the newest checkpoint are logged a second time then, with equal values.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from decant.schemas.disk.atomic import read_json, write_json
from decant.trainer.config import Log
from decant.trainer.run.metrics_log import Callback

FILE = "trackers.json"


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

    `settings` are what the run is bound to, by dotted name. A tracker that fails, for example
    because its server is gone, ends the run with a ValueError that names it.
    """
    with contextlib.ExitStack() as stack:
        opened: list[Callback] = []
        for name, title, open_ in (
            ("wandb", log.wandb, functools.partial(_wandb, quiet=quiet)),
            ("mlflow", log.mlflow, _mlflow),
        ):
            if title:
                with _named(name):
                    log_line = stack.enter_context(open_(title, run, settings))
                opened.append(_named(name)(log_line))
        yield opened


@contextlib.contextmanager
def _named(tracker: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"log.{tracker}: {error}. The run is safe: the same command goes on from its newest "
            f"checkpoint; without log.{tracker} it does so without the tracker"
        ) from error


@contextlib.contextmanager
def _wandb(
    project: str, run: Path, settings: Mapping[str, Any], *, quiet: bool
) -> Iterator[Callback]:
    wandb = importlib.import_module("wandb")
    tracked = wandb.init(
        project=project,
        id=_remembered(run, f"wandb {project}", make=lambda: uuid.uuid4().hex),
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
    mlflow = importlib.import_module("mlflow")
    # The client, and not `mlflow.start_run`, whose active run may be the caller's.
    client, entities = mlflow.MlflowClient(), mlflow.entities

    def begin() -> str:
        found = client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else client.create_experiment(experiment)
        id_ = client.create_run(where, run_name=run.resolve().name).info.run_id
        known = [entities.Param(_plain(name), str(value)) for name, value in settings.items()]
        client.log_batch(id_, params=known)
        return id_

    id_ = _remembered(run, f"mlflow {experiment}", make=begin)
    client.update_run(id_, status="RUNNING")

    def log_line(metrics: dict[str, Any]) -> None:
        at = {"timestamp": int(time.time() * 1000), "step": metrics["step"]}
        values = _numbers(metrics).items()
        client.log_batch(id_, metrics=[entities.Metric(_plain(n), x, **at) for n, x in values])

    status = "FAILED"
    try:
        yield log_line
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
