"""The basis of sketches, compared with its definition in float64, on meshes of one and of eight."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decant.models import open_checkpoint, save_directory
from decant.models.parameters import parameters_by_path
from decant.schemas.codecs.sketch_field import step_size
from decant.schemas.records.rows import Segment, build_row
from tests.formulas import sampling
from tests.making.caches import write_teacher

VOCABULARY, LENGTH, RANK, CAP, K, BATCH_ROWS = 1003, 24, 6, 4.0, 5, 8
"""Number of ids; eight devices add five columns of padding, and the embedding has 1,024 rows."""
MESHES = ((1, 1), (2, 4), (1, 8))
CAPPED = {
    "family": "gemma3",
    "windows": (12, None),
    "window_rope_theta": 100.0,
    "query_scalar": 6.0,
    "final_softcap": CAP,
    "qk_norm": True,
    "post_norms": True,
    "norm_adds_one": True,
    "scale_embedding": True,
    "activation": "gelu_tanh",
}
SCRIPT = """
import sys
import numpy as np
from decant.pipelines.calibration.sketch_basis import SketchSums, find_basis, lost_variance
from decant.pipelines.teacher.loaded import LoadedTeacher
from decant.pipelines.teacher.outputs import OutputSpec
from decant.schemas.codecs.sketch_field import step_size
from decant.schemas.manifest.plan import PlannedTeacher, TeacherMesh
from tests.pipelines.calibration.test_sketch_basis import (
    BATCH_ROWS, LENGTH, MESHES, RANK, VOCABULARY, K, rows,
)
for data, tensor in MESHES:
    planned = PlannedTeacher(
        model=sys.argv[1], teacher_id="", dtype="float32", vocabulary_size=VOCABULARY,
        sequence_length=LENGTH, batch_rows=BATCH_ROWS, mesh=TeacherMesh(data, tensor),
    )
    teacher, sums = LoadedTeacher(planned), SketchSums()
    with teacher.run(rows(), OutputSpec(), observers=[sums]) as outputs:
        list(outputs)
    moments = sums.moments()
    fields = {"metric": moments.metric, "covariance": moments.covariance}
    for name, rank in (("some", RANK), ("full", None)):
        basis, share = find_basis(sums, moments, rank=rank)
        lost = lost_variance(moments, basis.mean, basis.projection)
        fields |= {f"{name}-{key}": value for key, value in {
            "mean": basis.mean, "projection": basis.projection, "head": basis.head.head,
            "bias": basis.head.bias, "deviations": basis.deviations, "share": share, "lost": lost,
        }.items()}
    step = step_size(fields["some-deviations"], 1.0)
    basis, _ = find_basis(sums, moments, rank=RANK)
    for name, how in (
        ("offsets", (0.0, False)), ("rounded", (step, False)), ("dithered", (3 * step, True)),
    ):
        found = sums.with_offsets(basis, k=K, step=how[0], dither=how[1])
        fields[name] = found.head.offsets
    np.savez(f"{sys.argv[2]}/{data}-{tensor}.npz", **fields)
"""


def rows() -> list:
    """Rows with padding and with tokens that are not counted."""
    draw = np.random.default_rng(0)

    def row(*lengths: int):
        parts = [
            Segment(draw.integers(0, VOCABULARY, n).astype(np.int32), draw.random(n) < 0.8, 0, 0, 0)
            for n in lengths
        ]
        return build_row(parts, length=LENGTH)

    return [row(24), row(9, 15), row(20), row(5, 6, 7), row(24), row(24), row(2, 3), row(24)] * 3


@pytest.fixture(scope="module", params=["capped", pytest.param("plain", marks=pytest.mark.slow)])
def teacher(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    fields = CAPPED if request.param == "capped" else {}
    checkpoint = open_checkpoint(write_teacher(path / "quiet", vocabulary=1024, **fields))
    model = checkpoint.load()
    for name, parameter in parameters_by_path(model).items():
        if name.startswith("blocks.") and "norm" not in name:
            parameter.set_value(parameter[...] * 8)
    model.embedding.set_value(model.embedding[...].at[VOCABULARY:].set(9.0))  # no token's rows
    save_directory(model, path / "teacher", checkpoint.tokenizer().files())
    return path / "teacher"


@pytest.fixture(scope="module")
def found(teacher, tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
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
    return {f"{d}-{t}": dict(np.load(out / f"{d}-{t}.npz")) for d, t in MESHES}


@pytest.fixture(scope="module")
def dense(teacher) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Counted states [n, D] and the unembedding [D, V], float64; the cap."""
    model = open_checkpoint(teacher).load()
    every = rows()
    arrays = (np.stack([getattr(r, n) for r in every]) for n in ROW)
    states, _ = model(*arrays)
    mask = np.stack([row.loss_mask for row in every])
    unembedding = np.asarray(model.unembedding(), np.float64)[:, :VOCABULARY]
    return np.asarray(states, np.float64)[mask], unembedding, model.config.final_softcap


ROW = ("tokens", "segment_ids", "positions")


def test_metric_and_covariance_are_those_of_the_definition(found, dense):
    states, w, cap = dense
    z = states @ w
    slope = np.ones_like(z)
    if cap:
        z = cap * np.tanh(z / cap)
        slope = 1 - (z / cap) ** 2
    p = np.exp(sampling.log_softmax(z / 2))
    share = p.mean(0)
    columns = w * ((p * slope).sum(0) / p.sum(0))
    centred = columns - (columns @ share)[:, None]
    metric = (centred * share) @ centred.T
    covariance = np.cov(states.T, bias=True)
    for fields in found.values():
        np.testing.assert_allclose(fields["metric"], metric, atol=2e-5 * np.abs(metric).max())
        np.testing.assert_allclose(
            fields["covariance"], covariance, atol=2e-5 * np.abs(covariance).max()
        )


def test_no_other_basis_of_the_rank_keeps_more_of_the_logits_variance(found, dense):
    states, _, _ = dense
    fields = found["1-1"]
    g, mean = fields["metric"], states.mean(0)
    values, vectors = np.linalg.eigh(g)
    half = vectors * np.sqrt(np.maximum(values, 0))
    variances = np.linalg.eigvalsh(half.T @ np.cov(states.T, bias=True) @ half)[::-1]
    np.testing.assert_allclose(fields["some-deviations"] ** 2, variances[:RANK], rtol=1e-3)
    kept = variances[:RANK].sum() / variances.sum()
    np.testing.assert_allclose(fields["some-share"], kept, rtol=1e-3)
    np.testing.assert_allclose(fields["some-lost"], variances[RANK:].sum(), rtol=1e-2)
    sketch = (states - mean) @ fields["some-projection"]
    np.testing.assert_allclose(sketch.std(0), fields["some-deviations"], rtol=1e-3)


@pytest.mark.parametrize("kind", ["some", "full"])
def test_the_head_gives_the_logits_of_the_state_that_the_sketch_keeps(found, dense, kind):
    states, w, _ = dense
    fields = {n.removeprefix(f"{kind}-"): x for n, x in found["1-1"].items() if kind in n}
    np.testing.assert_allclose(fields["bias"], fields["mean"] @ w, atol=1e-4)
    # In the states' own space: A = Kᵀ·W, and K·Pᵀ leaves alone what is in its range.
    back = np.linalg.lstsq(w.T, fields["head"].T, rcond=None)[0]
    np.testing.assert_allclose(back.T @ w, fields["head"], atol=1e-4 * np.abs(fields["head"]).max())
    np.testing.assert_allclose(
        fields["projection"].T @ back, np.eye(len(fields["head"])), atol=2e-3
    )
    if kind == "full":
        sketch = (states.astype(np.float32) - fields["mean"]) @ fields["projection"]
        logits = sketch @ fields["head"] + fields["bias"]
        np.testing.assert_allclose(logits, states @ w, atol=5e-5)


@pytest.mark.parametrize("mesh", ["2-4", "1-8"])
def test_eight_devices_find_the_basis_that_one_finds(found, mesh):
    one, several = found["1-1"], found[mesh]
    for name in ("projection", "head", "bias", "deviations"):
        expected = one[f"some-{name}"]
        np.testing.assert_allclose(
            several[f"some-{name}"], expected, atol=2e-3 * np.abs(expected).max()
        )


def _tail_shares(logits, tail, mass, beta):
    """Softmax at β over each row's tail, times the tail's mass."""
    shares = np.where(tail, np.exp(beta * (logits - logits.max(1, keepdims=True))), 0)
    return shares / shares.sum(1, keepdims=True) * mass


def _sums(fields, dense, *, beta, offsets, step, dither=0.0):
    """Sums over the sample by id: the teacher's tail shares, their squares, the sketches'."""
    states, w, cap = dense
    z = cap * np.tanh(states @ w / cap) if cap else states @ w
    p = np.exp(sampling.log_softmax(beta * z))
    order = np.argsort(-z, axis=1, kind="stable")
    tail = np.ones(z.shape, bool)
    np.put_along_axis(tail, order[:, :K], False, axis=1)
    sketch = (states - fields["some-mean"]) @ fields["some-projection"]
    sketch = (np.round(sketch / step + dither) - dither) * step if step else sketch
    head = fields["some-head"].astype(np.float16).astype(np.float64)
    estimated = sketch @ head + fields["some-bias"] + offsets
    estimated = cap * np.tanh(estimated / cap) if cap else estimated
    p = np.where(tail, p, 0)
    q = _tail_shares(estimated, tail, p.sum(1, keepdims=True), beta)
    return p.sum(0), (p * p).sum(0), q.sum(0)


@pytest.mark.parametrize(("name", "steps"), [("offsets", 0.0), ("rounded", 1.0), ("dithered", 3.0)])
def test_offsets_are_those_of_the_definition(found, dense, name, steps):
    fields = found["1-1"]
    step = step_size(fields["some-deviations"], 1.0) * steps
    states, *others = dense
    places = np.concatenate([np.flatnonzero(row.loss_mask) for row in rows()])
    dither = np.zeros(1)
    if name == "dithered":
        dither = places[:, None] * 2654435769 % 2**32 / 2**32 - 0.5
    first_batch = states[: sum(int(row.loss_mask.sum()) for row in rows()[:BATCH_ROWS])]
    assert len(first_batch) < len(states) / 2
    for i, beta in enumerate((0.25, 0.5, 1.0)):
        expected = np.zeros(VOCABULARY)
        for sample in (first_batch, states):
            own = (sample, *others)
            sums = _sums(
                fields, own, beta=beta, offsets=expected, step=step, dither=dither[: len(sample)]
            )
            own, squares, sketched = (np.maximum(x, 1e-300) for x in sums)
            positions = own**2 / squares
            expected = expected + positions / (positions + 3) * np.log(own / sketched) / beta
        got = fields[name][i]
        # A number that is rounded to the other side in float32 moves the sums a little.
        np.testing.assert_allclose(got, expected, atol=2e-2 if steps else 2e-3)


def test_with_offsets_the_tails_of_the_sample_give_each_id_what_the_teacher_gives(found, dense):
    fields = found["1-1"]
    for beta, offsets in zip((0.25, 0.5, 1.0), fields["offsets"], strict=True):
        off = []
        for offset in (0 * offsets, offsets):
            own, _, sketched = _sums(fields, dense, beta=beta, offsets=offset, step=0)
            off.append(np.abs(own - sketched).sum() / own.sum())
        assert off[1] < off[0] / 5, off


@pytest.mark.parametrize("mesh", ["2-4", "1-8"])
def test_eight_devices_find_the_offsets_that_one_finds(found, mesh):
    np.testing.assert_allclose(found[mesh]["offsets"], found["1-1"]["offsets"], atol=5e-3)
