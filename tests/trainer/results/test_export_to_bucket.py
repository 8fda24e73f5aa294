"""Exports in buckets: the files of one on this machine, which teachers and students start from."""

import json

import numpy as np
from flax import nnx

from decant.models import open_checkpoint
from decant.store import open_store
from decant.store.objects import ObjectStore
from decant.trainer.__main__ import main
from decant.trainer.config import Adapter, Data, Student, Train
from decant.trainer.run.train import train
from decant.trainer.run.trained_student import load_student
from tests.making.caches import write_teacher
from tests.making.models import final_states


def objects(bucket: str) -> dict[str, bytes]:
    store = open_store(bucket)
    return {key: store.get(key) for key, _ in store.list()}


def test_it_has_the_bytes_of_one_on_the_disk_and_is_read_from_there(
    noisy_run, bucket, tmp_path, capsys
):
    store = open_store(bucket)
    store.put("student/notes.txt", b"mine")
    store.put("student/adapter_model.safetensors", b"of an earlier adapter")
    for place in (tmp_path / "student", f"{bucket}/student"):
        capsys.readouterr()
        assert main(["export", f"--run={noisy_run.run}", f"--output={place}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == f"{bucket}/student"
    expected = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    assert objects(f"{bucket}/student") == {**expected, "notes.txt": b"mine"}
    here, there = (open_checkpoint(place) for place in (tmp_path / "student", f"{bucket}/student"))
    assert there.tokenizer().digest == here.tokenizer().digest
    np.testing.assert_array_equal(final_states(there.load()), final_states(here.load()))


def test_an_adapter_in_a_bucket_stands_on_the_base_that_it_names(
    drawn_cache, root, bucket, tmp_path
):
    source = write_teacher(root / "base", seed=3)
    adapter = Adapter(rank=2, targets=("q_proj",))
    student = Student(init="checkpoint", source=str(source), adapter=adapter)
    data = Data(batch_rows=2, steps=2)
    run = Train(cache=drawn_cache.path, run=tmp_path / "run", student=student, data=data)
    train(run)
    url = f"{bucket}/adapter"
    assert main(["export", f"--run={run.run}", f"--output={url}"]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= objects(url).keys()
    states = final_states(open_checkpoint(url).load())
    expected = final_states(nnx.merge(*load_student(run.run, dtype="float32")))
    np.testing.assert_allclose(states, expected, atol=0.05)  # its base is bfloat16 in the run


def test_weights_come_last_and_earlier_ones_go_first(noisy_run, bucket, monkeypatch):
    """Looked at before every object that is sent, as a kill there would leave it."""
    command = ["export", f"--run={noisy_run.run}", f"--output={bucket}"]
    assert main(command) == 0
    upload, seen = ObjectStore.upload, []

    def watched(self, key, path):
        seen.append((key, "model.safetensors" in objects(bucket)))
        upload(self, key, path)

    monkeypatch.setattr(ObjectStore, "upload", watched)
    assert main(command) == 0
    assert seen[-1][0] == "model.safetensors"
    assert len(seen) > 3
    assert not any(weights for _, weights in seen)


def test_what_forbids_writing_is_said_before_the_work(
    noisy_run, bucket, s3_server, monkeypatch, capsys
):
    for name, value in s3_server.environment(s3_server.reader).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("decant.trainer.results.export.load_checkpoint", None)
    assert main(["export", f"--run={noisy_run.run}", f"--output={bucket}"]) == 1
    assert "no permission to write" in capsys.readouterr().err
