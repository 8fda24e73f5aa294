"""One teacher gives the same targets on meshes of one and of eight simulated devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decant.models import Decoder, ModelConfig, save_directory
from decant.models.mesh.sharding import teacher_mesh
from decant.pipelines.calibration.canary import canary_kl
from decant.schemas.targets.targets import Targets
from tests.making.caches import tokenizer_files
from tests.making.models import random_decoder

VOCABULARY = 1003
"""Number of ids. Eight devices add five columns of padding; the embedding has 1,024 rows."""
MESHES = ((1, 1), (2, 4), (8, 1), (1, 8))
K, DRAWS, COUNTS = 13, 6, 70

SCRIPT = """
import json, re, sys
import jax, numpy as np
from decant.pipelines.calibration.tail_prior import PriorSums
from decant.pipelines.teacher.loaded import LoadedTeacher
from decant.pipelines.teacher.outputs import OutputSpec
from decant.schemas.signals import TargetSpec
from decant.schemas.manifest.plan import TeacherMesh, PlannedTeacher
from decant.schemas.records.rows import Segment, build_row
from tests.pipelines.teacher.test_meshes import COUNTS, DRAWS, K, MESHES, VOCABULARY

assert len(jax.devices()) == 8
draw = np.random.default_rng(0)
def row(*lengths):
    parts = [Segment(draw.integers(0, VOCABULARY, n).astype(np.int32), np.ones(n, bool), 0, 0, 0)
             for n in lengths]
    return build_row(parts, length=24)
rows = [row(24), row(9, 15), row(20), row(5, 6, 7), row(24), row(24), row(2, 3), row(24)] * 2
spec = OutputSpec(TargetSpec(K, DRAWS, (0.5, 1.0), labels=True), counts=COUNTS)
gathers = {}
for data, tensor in MESHES:
    planned = PlannedTeacher(
        model=sys.argv[1], teacher_id="", dtype="float32", vocabulary_size=VOCABULARY,
        sequence_length=24, batch_rows=8, mesh=TeacherMesh(data, tensor),
    )
    teacher, prior = LoadedTeacher(planned), PriorSums(k=K)
    with teacher.run(rows, spec, observers=[prior]) as outputs:
        outputs = list(outputs)
    fields = {
        name: np.concatenate([getattr(x.targets, name) for x in outputs])
        for name in ("ids", "logprobs", "tail_logmass", "label_logprobs")
    }
    fields["count_ids"] = np.concatenate(
        [np.repeat(x.counts.ids.ravel(), x.counts.counts.ravel()) for x in outputs])
    fields["counts_near"] = np.array(sum(x.counts_near_edge for x in outputs))
    fields["tail_ids"] = np.concatenate([x.targets.draws.ids for x in outputs])
    fields["tail_logprobs"] = np.concatenate([x.targets.draws.logprobs for x in outputs])
    fields["near"] = np.array(sum(x.near_edge for x in outputs))
    result = prior.result()
    fields |= {"sums": result.sums, "counts": result.counts}
    np.savez(f"{sys.argv[2]}/{data}-{tensor}.npz", **fields)

    batch = teacher._read(rows[:8], ())
    inputs = teacher._token_inputs(rows[:8], spec.of_logits)
    programs = {
        "forward": teacher._forward.lower(
            teacher._weights, *(batch.inputs[n] for n in ("tokens", "segment_ids", "positions")),
            layers=()),
        "targets": teacher._targets.lower(
            batch.hidden, teacher._unembedding, inputs, spec=spec.of_logits,
            head=teacher._head),
    }
    gathers[f"{data}-{tensor}"] = {
        name: re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* all-gather\\(", low.compile().as_text())
        for name, low in programs.items()
    }
    gathers[f"{data}-{tensor}"]["head"] = teacher._unembedding.sharding.shard_shape(
        teacher._unembedding.shape)
print(json.dumps(gathers))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        tie_embeddings=True,
    )
    path = tmp_path_factory.mktemp("teacher")
    model: Decoder = random_decoder(config)
    # No token has these rows. If they collected mass, the targets would show it.
    model.embedding.set_value(model.embedding[...].at[VOCABULARY:].set(9.0))
    save_directory(model, path, tokenizer_files(VOCABULARY))
    return path


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory) -> tuple[dict[str, dict], dict[str, dict]]:
    """The targets on each mesh, and the shapes of the all-gathers in its programs."""
    out = tmp_path_factory.mktemp("out")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "32",  # fewer threads than devices deadlock in a collective
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path.cwd()),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(teacher), str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    by_mesh = {f"{d}-{t}": dict(np.load(out / f"{d}-{t}.npz")) for d, t in MESHES}
    return by_mesh, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["2-4", "8-1", "1-8"])
def test_eight_devices_find_what_one_finds(run, mesh):
    one, several = run[0]["1-1"], run[0][mesh]
    np.testing.assert_array_equal(np.sort(several["ids"]), np.sort(one["ids"]))
    for name in ("logprobs", "tail_logmass"):
        np.testing.assert_allclose(several[name], one[name], atol=1e-5)
    same = several["tail_ids"] == one["tail_ids"]
    assert (~same).sum() <= one["near"]
    np.testing.assert_allclose(
        several["tail_logprobs"][same], one["tail_logprobs"][same], atol=1e-5
    )
    np.testing.assert_allclose(several["label_logprobs"], one["label_logprobs"], atol=1e-5)
    assert (several["count_ids"] != one["count_ids"]).sum() <= one["counts_near"]
    np.testing.assert_array_equal(several["counts"], one["counts"])
    np.testing.assert_allclose(several["sums"], one["sums"], rtol=1e-4)
    ids, logprobs = one["ids"], one["logprobs"]
    again = Targets(several["ids"], several["logprobs"], several["tail_logmass"])
    assert canary_kl(ids, logprobs, [again]) < 1e-6


def test_no_id_that_is_padding_is_found_or_drawn(run):
    for fields in run[0].values():
        assert fields["ids"].max() < VOCABULARY
        assert fields["tail_ids"].max() < VOCABULARY
        assert fields["count_ids"].max() < VOCABULARY


@pytest.mark.parametrize(("mesh", "devices"), [("2-4", 4), ("1-8", 8)])
def test_logits_and_tables_are_never_gathered(run, mesh, devices):
    gathers = run[1][mesh]
    assert gathers["head"] == [32, -(-VOCABULARY // devices)]
    shapes = [[int(n) for n in shape.split(",")] for shape in gathers["targets"]]
    assert shapes, "the stages of top-k meet in a gather"
    assert max(shape[-1] for shape in shapes) <= devices * (K + 1)
    for shape in gathers["forward"]:
        assert "1024" not in shape.split(","), "the embedding is gathered"


def test_a_mesh_that_asks_for_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"data = 2, tensor = 4, expert = 1 needs 8 devices"):
        teacher_mesh(data=2, tensor=4)
