"""Counts and sketches of a cache in PyTorch: rows, the loss, and the Hugging Face trainer."""

import numpy as np
import pytest

import decant
from decant.trainer.judging.headline import ESTIMATES
from tests.formulas import dense
from tests.making.caches import tiny_cache, write_teacher
from tests.making.companions import DRAWS, RANK, with_companions
from tests.making.grown import make_grown
from tests.making.resealed import copy_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
decant_torch = pytest.importorskip("decant.torch")
judging = pytest.importorskip("decant.torch.judging")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tails")


@pytest.fixture(scope="module")
def cache(root):
    """Every position has counts and a sketch."""
    plain = tiny_cache(root, draws=4)
    return with_companions(copy_of(plain, root / "with"))


@pytest.fixture(scope="module")
def grown(root):
    """Two parts, each with a sketch head of its own."""
    both = make_grown(root / "grown").cache
    return with_companions(copy_of(both, root / "both"), seeds=lambda part: part)


def test_rows_hold_counts_and_sketches_or_those_that_are_asked_for(cache):
    rows = decant_torch.Rows(cache)
    batch, read = rows[[3, 1]], cache.read(cache.rows("train")[[3, 1]])
    for name, shape in (("count_ids", DRAWS), ("counts", DRAWS), ("sketch", RANK)):
        assert batch[name].shape == (2, 64, shape)
        np.testing.assert_array_equal(batch[name].numpy(), read[name])
    assert batch["sketch_basis"].tolist() == [0, 0]
    collated = torch.utils.data.default_collate([rows[0], rows[1]])
    assert collated["sketch_basis"].shape == (2,)
    only = next(iter(decant_torch.batches(cache, targets=("sketch",))))
    assert {"sketch", "sketch_basis"} < only.keys()
    assert not {"counts", "count_ids"} & only.keys()
    assert not {"counts", "sketch"} & decant_torch.Rows(cache, targets=())[0].keys()


def test_a_batch_may_mix_parts_whose_sketches_have_bases_of_their_own(grown):
    numbers = grown.rows("train")
    chosen = np.array([0, 1, len(numbers) - 2, len(numbers) - 1])
    batch = decant_torch.Rows(grown)[chosen]
    assert batch["sketch_basis"].tolist() == [0, 0, 1, 1]
    heads, counted = grown.sketch_heads(), batch["loss_mask"].numpy()
    logits = np.random.default_rng(0).normal(size=(*counted.shape, 512)).astype(np.float32)
    expected = 0.0
    for row, t in zip(*np.nonzero(counted), strict=True):
        head = heads[int(chosen[row] > 1)]
        shape = np.float64(batch["sketch"][row, t].numpy()) @ np.float64(head.head) + head.bias
        kept = np.isfinite(batch["topk_logprobs"][row, t].numpy())
        ids = batch["topk_ids"][row, t].numpy()[kept]
        # At T = 4, which is a node, the mass needs no interpolation.
        p = np.exp(batch["topk_logprobs"][row, t].numpy()[kept] / 4)
        mass = np.exp(batch["tail_logmass"][row, t, dense.BETAS.tolist().index(1 / 4)].item())
        shape[ids] = -np.inf
        target = mass * np.exp(dense.log_softmax(shape / 4))
        target[ids] = p
        target /= target.sum()
        logq = dense.log_softmax(np.float64(logits[row, t]) / 4)
        expected += (target * (np.log(target) - logq)).sum()
    got = decant_torch.loss_on_logits(
        torch.tensor(logits),
        batch,
        temperature=4.0,
        alpha=1.0,
        sketch=decant_torch.sketch_tables(heads),
    )
    assert got.item() == pytest.approx(16 * expected / counted.sum(), rel=1e-5)


@pytest.fixture(scope="module")
def checkpoint(root):
    return write_teacher(root / "student", seed=5, tie_embeddings=False)


def trainer(checkpoint, cache, output, **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        str(output),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=3e-3,
    )
    return decant_torch.DistillationTrainer(model, arguments, train_dataset=cache, **settings)


@pytest.mark.parametrize(("temperature", "tail"), [(1.0, "counts"), (4.0, "sketch")])
def test_the_trainer_chooses_a_tail_reads_it_alone_and_learns(
    cache, checkpoint, tmp_path, temperature, tail
):
    ours = trainer(checkpoint, cache, tmp_path, temperature=temperature)
    assert ours.distillation.tail == tail
    batch = ours.train_dataset[range(4)]
    assert {"counts", "sketch"} & batch.keys() == {tail}
    logits = ours.model.eval()(**decant_torch.packed_inputs(batch)).logits
    tables = decant_torch.sketch_tables(cache.sketch_heads())
    expected = decant_torch.loss_on_logits(logits, batch, temperature=temperature, sketch=tables)
    torch.testing.assert_close(ours.compute_loss(ours.model, batch), expected, rtol=1e-5, atol=0)
    before = ours.evaluate()
    ours.train()
    after = ours.evaluate()
    assert after["eval_ce"] < before["eval_ce"]
    assert after["eval_loss"] < before["eval_loss"]


WEAK = (
    "tail = bucket: At T = 4 a student learns little from it (docs/benchmarks.md); better are tail "
    "= sketch"
)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [({"temperature": 4.0, "tail": "bucket"}, [WEAK]), ({"temperature": 4.0}, []), ({}, [])],
)
def test_a_tail_that_teaches_little_at_this_temperature_is_told(
    cache, checkpoint, tmp_path, monkeypatch, settings, warned
):
    lines = []
    monkeypatch.setattr("decant.torch.hf_trainer._LOG.warning", lambda *line: lines.append(line))
    trainer(checkpoint, cache, tmp_path, **settings)
    assert [line[0] % line[1:] for line in lines] == warned


def test_a_jsd_at_temperature_1_takes_the_sketch(cache, checkpoint, tmp_path):
    assert trainer(checkpoint, cache, tmp_path, divergence="jsd").distillation.tail == "sketch"


def test_a_cache_without_a_sketch_is_refused_with_what_to_add(cache, checkpoint, tmp_path):
    plain = cache.path.with_name("cache")
    with pytest.raises(ValueError, match=r"no sketch, which tail = sketch learns from.* --signals"):
        trainer(checkpoint, plain, tmp_path, temperature=4.0, tail="sketch")


@pytest.fixture(scope="module")
def judged(root, cache):
    """Caches by the estimate that each allows."""
    plain = tiny_cache(root, output=root / "undrawn")
    return {
        "draws": cache,
        "counts": with_companions(copy_of(plain, root / "counted")),
        "sketch": with_companions(copy_of(plain, root / "sketched"), signals=("sketch",)),
        "to counts": tiny_cache(root, k=0, counts=20, output=root / "headless"),
    }


@pytest.mark.parametrize("name", ["draws", "counts", "sketch", "to counts"])
def test_students_are_judged_by_the_estimate_and_value_of_the_trainer(judged, name):
    """A student that knows nothing but the ids' order."""
    cache = judged[name]
    logits = np.linspace(-2, 2, 512, dtype=np.float32)
    got = decant_torch.evaluate(
        lambda batch: torch.tensor(logits).expand(*batch["tokens"].shape, 512), cache
    )
    expected = decant.evaluate(
        cache, lambda tokens, *_: np.broadcast_to(logits, (*tokens.shape, 512))
    )
    assert got["heldout_kl_by"] == expected["heldout_kl_by"] == name
    assert got["heldout_kl"] == got[f"heldout_{judging.headline(cache).measure}"]
    shared = got.keys() & expected.keys() - {"heldout_kl_by"}
    bits = "heldout_bits_per_byte"
    assert {"heldout_kl", "heldout_ce", "heldout_agreement", bits} <= shared
    assert ("heldout_kl_bound" in got) == (name != "to counts")
    for key in shared:
        assert got[key] == pytest.approx(expected[key], rel=1e-5), key


def test_the_headlines_are_the_trainer_s_in_its_order():
    ours = [x for x in vars(judging).values() if isinstance(x, judging.Headline)]
    assert [tuple(x) for x in ours] == [(x.name, x.measure, x.tail) for x in ESTIMATES]
