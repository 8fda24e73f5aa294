"""Training from a bucket: losses of the disk to the bit, also with a mirror that is too small."""

from pathlib import Path

from decant.trainer.config import Data, Evaluate, Loss, Student, Train
from decant.trainer.results.evaluate import evaluate
from decant.trainer.run.binding import read_run_settings
from decant.trainer.run.data_facts import main_cache
from decant.trainer.run.metrics_log import read_metrics
from decant.trainer.run.train import train
from tests.making.uploaded import upload


def run_of(cache, run, root, **data):
    config = Train(
        cache=Path(cache),
        run=run,
        student=Student(source=str(root / "teacher"), layers=1),
        data=Data(batch_rows=2, steps=8, shuffle="blocks", **data),
        loss=Loss(tail="bucket", chunk_tokens=64),
        evaluate_every=4,
        heldout_rows=2,
    )
    train(config)
    lines = read_metrics(run)
    return [(line["step"], line.get("loss"), line.get("heldout_ce")) for line in lines]


def test_losses_from_a_bucket_equal_those_from_disk_to_the_bit(
    cache, bucket, root, tmp_path, monkeypatch
):
    url = upload(cache.path, bucket)
    disk = run_of(cache.path, tmp_path / "disk", root)
    tight = {"mirror": tmp_path / "mirror", "mirror_bytes": 1 << 20}
    assert run_of(url, tmp_path / "remote", root, **tight) == disk
    assert main_cache(tmp_path / "remote") == url
    names = read_run_settings(tmp_path / "remote").keys()
    assert "data.shuffle" in names
    assert not any("mirror" in name for name in names), "another mirror may go on with the run"
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "other"))
    evaluate(Evaluate(run=tmp_path / "remote", heldout_rows=2))
    assert list((tmp_path / "other").iterdir()), "evaluated by the address that the run keeps"
