"""Weights & Biases and MLflow, the real libraries, without a server."""

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import decant
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.trackers import FILE
from tests.making.caches import tiny_cache

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # the libraries' own
]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that an exception ended after update 5, and that then went on from update 4."""
    root = tmp_path_factory.mktemp("tracked")
    settings = {
        "cache": tiny_cache(root, k=8).path,
        "run": root / "run",
        "student": {"source": str(root / "teacher"), "layers": 1},
        "loss": {"tail": "bucket"},
        "data": {"steps": 6},
        "evaluate_every": 3,
        "checkpoint_every": 2,
        "heldout_rows": 2,
        "log": {"wandb": "project", "mlflow": "experiment"},
        "quiet": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")

        def end(metrics):
            if metrics["step"] == 5:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            decant.train(**settings, callbacks=[end])
        yield decant.train(**settings).run, f"sqlite:///{root}/mlflow.db"


def wandb_files(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format after seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:  # no header is split over two blocks
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_history(path: Path) -> list[dict[str, str]]:
    """The lines that W&B's own file holds: JSON texts by name."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    records = [messages.Record.FromString(data) for data in wandb_records(path.read_bytes())]
    return [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_weights_and_biases_gets_every_line_of_one_run(interrupted):
    pytest.importorskip("wandb")
    run, _ = interrupted
    first, second = wandb_files(run)
    assert first.stem.split("-")[-1] == second.stem.split("-")[-1]  # the same id
    logged = {int(x["step"]): float(x["loss"]) for x in wandb_history(second) if "loss" in x}
    lines = {x["step"]: x["loss"] for x in read_metrics(run) if "loss" in x}
    assert logged == {step: pytest.approx(lines[step]) for step in (5, 6)}
    steps = [int(x["step"]) for x in wandb_history(first) if "heldout_ce" in x]
    assert steps == [0, 3]


def test_mlflow_gets_every_line_of_one_run(interrupted):
    mlflow = pytest.importorskip("mlflow")
    run, store = interrupted
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("experiment")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_name == "run"
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["loss.alpha"] == "0.9"
    history = client.get_metric_history(tracked.info.run_id, "loss")
    lines = {x["step"]: x["loss"] for x in read_metrics(run) if "loss" in x}
    assert {point.step: point.value for point in history} == pytest.approx(lines)
    assert (run / FILE).exists()
