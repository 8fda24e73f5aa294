"""Runs one cell: capture unless it is done, train, measure, write the result."""

from __future__ import annotations

import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.quality.bytes import counts_bytes, record_bytes
from benchmarks.quality.judge import judge
from benchmarks.quality.study import (
    FIRST_SEED,
    ROWS,
    Cell,
    Study,
    cache_path,
    config_path,
    precompute_config,
    result_path,
    train_config,
)
from benchmarks.quality.teacher import DenseTeacher, dense_teacher, require_same_teacher
from benchmarks.quality.uncached import draw_ids_of_row, train_dense, train_fresh, train_rs_kd
from decant.models import save_directory
from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.capture.job import precompute
from decant.schemas import Cache, open_cache
from decant.schemas.disk.atomic import read_json, write_json
from decant.schemas.targets.counts import count_draws
from decant.trainer.config import Train
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student

SAMPLE_ROWS = 8
CALIBRATION_ROWS = 16
WARM_UP = 3
"""First updates that are not timed, because the first one compiles."""


class Workshop:
    """What cells share, made at first use: caches and the dense teacher."""

    def __init__(self, study: Study):
        self.study = study
        self._caches: dict[str, Cache] = {}

    def cache(self, capture: str) -> Cache:
        """The sealed cache of a capture; an unfinished capture is continued."""
        if capture not in self._caches:
            config = precompute_config(self.study, capture)
            precompute(config)  # For a sealed cache it only checks the settings.
            self._caches[capture] = open_cache(config.output)
        return self._caches[capture]

    @cached_property
    def teacher(self) -> DenseTeacher:
        """The dense teacher on the rows of all caches."""
        cache = self.cache(ROWS)
        teacher = dense_teacher(
            self.study.teacher,
            cache=cache,
            dtype=self.study.teacher_dtype,
            directory=self.study.work,
        )
        require_same_teacher(teacher, cache)
        return teacher

    def bytes_per_token(self, cell: Cell) -> float | None:
        """Bytes a token of the cell's targets; None if they are not stored."""
        if cell.method == "rs-kd":
            return self._rs_kd_bytes(cell.draws)
        stored = cell.cached and cell.alpha > 0
        return record_bytes(self.cache(cell.capture)) if stored else None

    def _rs_kd_bytes(self, draws: int) -> float:
        """Through the codec of counts, on a few rows, with tables of others."""
        rows = self.cache(ROWS).rows(split="train")[: SAMPLE_ROWS + CALIBRATION_ROWS]
        drawn = [draw_ids_of_row(self.teacher, int(row), draws=draws) for row in rows]
        mask = self.cache(ROWS).read(rows, signals=())["loss_mask"]
        return counts_bytes(
            count_draws(np.concatenate(drawn)[mask.reshape(-1)]),
            np.repeat(rows, mask.sum(1)),
            calibration=rows[SAMPLE_ROWS:],
            vocabulary=self.teacher.vocabulary,
        )


def run_cell(cell: Cell, shop: Workshop) -> dict[str, Any]:
    """The cell's result, read from its file or computed.

    Raises ValueError if the file's result has other settings.
    """
    study, path = shop.study, result_path(shop.study, cell)
    cache = shop.cache(cell.capture)
    config = train_config(study, cell, updates=_updates(cell, shop))
    settings = config_path(study, cell).read_text()
    if path.exists():
        result = read_json(path)
        if result["settings"] != settings:
            raise ValueError(
                f"{path}: computed with other settings than {config_path(study, cell)} now has; "
                "use another --work directory"
            )
        return result
    graph, params, seconds = _student(cell, config, shop)
    result = {
        "method": cell.method,
        "temperature": cell.temperature,
        "size": cell.size,
        "seed": cell.seed,
        "settings": settings,
        "bytes_per_token": shop.bytes_per_token(cell),
        "updates": config.data.steps,
        "seconds_per_update": float(np.median(seconds[WARM_UP:] or seconds)),
        **judge(
            graph, params, cache=cache, teacher=shop.teacher, batch_rows=config.data.batch_rows
        ),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}",
    }
    if cell.method in ("dense", "online"):
        # Time that a teacher in the loop adds; not part of `seconds_per_update`.
        result["teacher_seconds_per_update"] = shop.teacher.seconds_per_row * config.data.batch_rows
    if (cell.method, cell.temperature, cell.seed) == ("dense", 1.0, FIRST_SEED):
        _keep(graph, params, shop)
    write_json(path, result)
    for name in ("checkpoints", "initial"):  # Half a gigabyte a cell; the result is written.
        shutil.rmtree(config.run / name, ignore_errors=True)
    return result


def _student(cell: Cell, config: Train, shop: Workshop) -> tuple[nnx.GraphDef, Any, list[float]]:
    if cell.method == "rs-kd":
        return train_rs_kd(config, shop.teacher, draws=cell.draws, directory=shop.study.work)
    if cell.method == "fresh":
        return train_fresh(config, shop.teacher, draws=cell.draws)
    if not cell.cached:
        return train_dense(config, shop.teacher)
    train(config)
    lines = [line for line in read_metrics(config.run) if "loss" in line]
    if lines[-1]["step"] != config.data.steps:
        raise KeyboardInterrupt  # The trainer was stopped by a signal.
    graph, params = load_student(config.run, dtype=config.dtype)
    return graph, params, [line["step_seconds"] for line in lines]


def _updates(cell: Cell, shop: Workshop) -> int:
    """The study's number of updates; for `online`, as many as fit into the time of `record`."""
    study = shop.study
    if cell.method != "online":
        return study.updates
    record, dense = (
        _finished(study, Cell(method, 1.0, FIRST_SEED)) for method in ("record", "dense")
    )
    online = dense["seconds_per_update"] + dense["teacher_seconds_per_update"]
    return max(1, min(study.updates, int(study.updates * record["seconds_per_update"] / online)))


def _finished(study: Study, cell: Cell) -> dict[str, Any]:
    path = result_path(study, cell)
    if not path.exists():
        raise ValueError(
            f"{path}: run this cell first; its time decides the number of `online` updates"
        )
    return read_json(path)


def kept_student(study: Study) -> Path:
    """Directory of the first seed's densely trained student, which the angles need."""
    return study.work / "students" / "dense"


def _keep(graph: nnx.GraphDef, params: Any, shop: Workshop) -> None:
    path = kept_student(shop.study)
    shutil.rmtree(path, ignore_errors=True)
    tokenizer = tokenizer_of(open_cache(cache_path(shop.study, ROWS)))
    save_directory(nnx.merge(graph, params), path, tokenizer.files())
