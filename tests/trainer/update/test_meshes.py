"""Training on one device equals training on eight, which another process simulates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from decant.trainer.loss.chunk_loss import HeadSums
from tests.formulas import dense
from tests.making.heads import head_inputs_with_tail, relative, sketched_logits
from tests.trainer.update.meshes_side import CASES, IDS, ROUTES, STEPS, exhausted, shape

ONE = (1, 1, 1)
EIGHT = [case for case in CASES if case[0] != ONE]


@pytest.fixture(scope="module")
def run(layered_cache, tmp_path_factory) -> tuple[dict, dict, dict]:
    """What `meshes_side` wrote: losses, facts about programs, and results of the head alone."""
    out = tmp_path_factory.mktemp("meshes")
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.update.meshes_side", layered_cache.path, out],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            # Threads of XLA's pool. By default there is one for each core; eight devices that wait
            # for each other in a collective may take them all, a deadlock.
            "NPROC": "32",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path.cwd()),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses, heads = (dict(np.load(out / f"{name}.npz")) for name in ("losses", "heads"))
    return losses, json.loads((out / "facts.json").read_text()), heads


@pytest.mark.parametrize(("mesh", "signal"), EIGHT)
def test_eight_devices_give_the_losses_of_one(run, mesh, signal):
    one, eight = (run[0][f"{shape} {signal}"] for shape in (ONE, mesh))
    assert len(one) == STEPS
    assert one[-1] < one[0] - 0.1  # it learns, so that a lost update would show
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.parametrize(("mesh", "signal"), EIGHT)
def test_weights_and_moments_are_sharded_and_stay_sharded(run, mesh, signal):
    facts = run[1][f"{mesh} {signal}"]
    _, fsdp, tensor = mesh
    assert facts["embedding"] == [520 // tensor, 32 // fsdp]
    assert facts["blocks/up"] == [2, 32 // fsdp, 64 // tensor]
    if signal == "adapter":
        assert facts["blocks/up_lora_a"] == [2, 32 // fsdp, 4]
        assert facts["blocks/up_lora_b"] == [2, 4, 64 // tensor]
        assert facts["blocks/output_lora_a"] == [2, 4 // tensor, 8, 4]
    assert facts["stays"]


@pytest.mark.parametrize(("mesh", "signal"), CASES)
def test_the_buffers_of_the_state_are_donated(run, mesh, signal):
    facts = run[1][f"{mesh} {signal}"]
    assert facts["deleted"]
    assert facts["donated"] >= facts["state"]


@pytest.mark.parametrize(("mesh", "signal"), [case for case in EIGHT if case[0][2] > 1])
def test_logits_are_never_gathered(run, mesh, signal):
    shapes = [[int(n) for n in s.split(",")] for s in run[1][f"{mesh} {signal}"]["gathers"]]
    assert [260, 32] in shapes, "over fsdp the embedding is, one device's rows of it"
    assert not [shape for shape in shapes if max(shape) >= 512]


@pytest.mark.parametrize(("tail", "kind"), ROUTES)
def test_a_shared_vocabulary_scores_like_the_dense_formula(run, tail, kind):
    """Four devices share 509 ids; padding columns have large logits."""
    names = [""] if (tail, kind) != ("prior", "forward_kl") else ["", "exhausted "]
    for name in names:
        teacher, hidden, unembedding, targets, tables = head_inputs_with_tail(tail, **shape(tail))
        prior = exhausted(targets) if name else tables.get("prior")
        settings = {"temperature": 2.0, "alpha": 0.7, "kind": kind, "mix": 0.3}
        rows = (teacher, hidden, unembedding, targets.labels, targets.mask)
        if tail == "sampled":
            expected = dense.sampled_loss(
                *rows,
                ids=targets.topk_ids,
                draws=(targets.tail_ids, targets.tail_logprobs, targets.tail_logweights),
                **settings,
            )
        elif tail == "prior":
            p = dense.with_prior(teacher, targets.topk_ids, prior, temperature=2.0)
            expected = dense.loss(*rows, p=p, **settings)
        elif tail == "sketch":
            logits = sketched_logits(targets, tables["sketch"])
            p = dense.with_shape(teacher, targets.topk_ids, logits, temperature=2.0)
            expected = dense.loss(*rows, p=p, **settings)
        elif tail == "counts":
            p = dense.counted(targets.count_ids, targets.counts, vocabulary=IDS)
            expected = dense.loss(*rows, p=p, **{**settings, "temperature": 1.0})
            lost = dense.entropy(p) - dense.entropy(np.exp(dense.log_softmax(teacher)))
            expected = (expected[0] + 0.7 * (targets.mask * lost).sum(), *expected[1:])
        elif tail is None:
            written = (targets.label_logprobs, targets.writer_logprobs)
            logits = hidden.astype(np.float64) @ unembedding
            total, d_logits = dense.on_policy_loss(
                logits, targets.labels, targets.mask, *written, clip=0.2, anchor=0.0, alpha=0.7
            )
            ce = dense.loss(*rows, temperature=1.0, alpha=0.0)[2]
            d_hidden = d_logits @ unembedding.T.astype(np.float64)
            d_unembedding = np.einsum("btd,btv->dv", hidden, d_logits)
            expected = (total, None, ce, d_hidden, d_unembedding)
        else:
            expected = dense.loss(*rows, softcap=3.0, **settings)
        got = [run[2][f"{name}{tail} {kind} {i}"] for i in range(3 + len(HeadSums._fields))]
        value, *sums, d_hidden, d_unembedding = got
        np.testing.assert_allclose(value, expected[0], rtol=2e-4 if tail == "counts" else 1e-5)
        np.testing.assert_allclose(HeadSums(*sums).ce, expected[2], rtol=1e-5)
        assert HeadSums(*sums).count == targets.mask.sum()
        assert relative(d_hidden, expected[3]) < 2e-5
        assert relative(d_unembedding, expected[4]) < 2e-5
