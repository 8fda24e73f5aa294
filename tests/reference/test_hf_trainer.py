"""Hugging Face models and their Trainer on a cache: packed rows, loss, accumulation, resuming."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.trainer.loss.chunk_loss import Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.targets import BatchTargets
from tests.making.caches import tiny_cache, write_teacher
from tests.making.companions import with_companions
from tests.paths import ROOT, environment

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
decant_torch = pytest.importorskip("decant.torch")

pytestmark = [
    pytest.mark.reference,
    # A Trainer on a machine without an accelerator asks for pinned memory all the same.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def cache(root):
    return tiny_cache(root, draws=4)


@pytest.fixture(scope="module")
def checkpoint(root):
    """A student with the teacher's tokenizer and other weights, as Hugging Face files."""
    return write_teacher(root / "student", seed=5, tie_embeddings=False)


def student(checkpoint, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, **options
    )


def trainer(model, cache, output, **options):
    settings = {
        name: options.pop(name)
        for name in ("temperature", "alpha", "tail", "divergence", "eval_dataset")
        if name in options
    }
    arguments = transformers.TrainingArguments(
        str(output),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy=options.pop("save_strategy", "no"),
        logging_steps=1,
        **{"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 3e-3, **options},
    )
    return decant_torch.DistillationTrainer(model, arguments, train_dataset=cache, **settings)


def weights(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def same_weights(a, b, *, within=0.0):
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=within, msg=name)


@pytest.mark.parametrize(
    ("rows", "accumulated", "tail"), [(1, 1, "sketch"), (1, 2, "counts"), (2, 1, "counts")]
)
def test_an_update_that_draws_half_of_the_tokens_learns_from_the_sketch(
    cache, checkpoint, tmp_path, rows, accumulated, tail
):
    here = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    richer = with_companions(here, draws=lambda part: 4)  # of 64 positions a row, 512 tokens
    size = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    made = trainer(student(checkpoint), richer, tmp_path / "run", **size)
    assert made.distillation.tail == tail
    counts_only = decant_torch.Rows(richer, targets=["counts"])
    made = trainer(student(checkpoint), counts_only, tmp_path / "run", **size)
    assert made.distillation.tail == "counts"


def test_a_resumed_run_does_not_change_the_tail_that_was_chosen_for_it(cache, checkpoint, tmp_path):
    here = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    richer = with_companions(here, draws=lambda part: 4)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    small, large = ({**saving, "per_device_train_batch_size": rows} for rows in (1, 2))
    begun = trainer(student(checkpoint), richer, tmp_path / "run", **small)
    begun.train()
    assert begun.distillation.tail == "sketch"
    trainer(student(checkpoint), richer, tmp_path / "run", **small).train(True)
    other = trainer(student(checkpoint), richer, tmp_path / "run", **large)
    with pytest.raises(ValueError, match=r"with tail = sketch, .* is counts .*tail=\"sketch\" to"):
        other.train(resume_from_checkpoint=True)
    chosen = trainer(student(checkpoint), richer, tmp_path / "run", tail="counts", **large)
    chosen.train(resume_from_checkpoint=True)
    # A checkpoint of an older release does not say: it learned from counts, whatever the update.
    data = tmp_path / "run" / "checkpoint-1" / "decant-data.json"
    data.write_text(
        json.dumps({k: v for k, v in json.loads(data.read_text()).items() if k != "tail"})
    )
    trainer(student(checkpoint), richer, tmp_path / "run", **large).train(True)
    with pytest.raises(ValueError, match=r"with tail = counts, .* is sketch "):
        trainer(student(checkpoint), richer, tmp_path / "run", **small).train(True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flatten", [False, True])
@torch.no_grad()
def test_a_packed_row_has_the_logits_of_its_documents_one_by_one(
    cache, checkpoint, attention, flatten
):
    model = student(checkpoint, attn_implementation=attention).eval()
    rows = decant_torch.Rows(cache)
    segments = torch.stack([row["segment_ids"] for row in rows])
    packed = (segments.max(1).values > 1).nonzero()[:3, 0].tolist()
    assert len(packed) == 3
    batch = rows[packed]
    logits = model(**decant_torch.packed_inputs(batch, flatten=flatten)).logits
    logits = logits.reshape(*batch["tokens"].shape, -1)
    documents = 0
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max().item() + 1):
            at = segments == segment
            alone = model(batch["tokens"][row, at][None]).logits[0]
            torch.testing.assert_close(logits[row, at], alone, rtol=1e-4, atol=1e-4)
            documents += 1
    assert documents >= 6


@torch.no_grad()
def test_the_mask_for_ones_own_attention_is_what_transformers_makes(cache, checkpoint):
    batch = decant_torch.Rows(cache)[range(8)]
    mask = decant_torch.attention_mask(batch["segment_ids"])
    model = student(checkpoint, attn_implementation="sdpa").eval()
    ours = model(
        batch["tokens"], attention_mask=mask, position_ids=batch["positions"], use_cache=False
    ).logits
    theirs = model(**decant_torch.packed_inputs(batch)).logits
    at = batch["loss_mask"]
    torch.testing.assert_close(ours[at], theirs[at], rtol=1e-4, atol=1e-4)


class Forgetful(transformers.LlamaForCausalLM):
    """A model that does not know where documents begin."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


def test_a_model_that_lets_documents_see_each_other_is_refused(cache, checkpoint, tmp_path):
    decant_torch.require_separate_segments(student(checkpoint))
    leaking = Forgetful.from_pretrained(checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match="Forgetful lets the documents of a packed row see each"):
        trainer(leaking, cache, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "alpha": 0.5, "tail": "prior", "divergence": "jsd"},
    ],
)
def test_at_step_0_the_loss_is_that_of_our_trainer(cache, checkpoint, tmp_path, settings):
    model = open_checkpoint(checkpoint).load()
    numbers = cache.rows("train")[:4]
    batch = {name: jnp.asarray(x) for name, x in cache.read(numbers).items()}
    hidden, _ = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    filled = {"temperature": 1.0, "alpha": 0.9, "tail": "sampled", "divergence": "forward_kl"}
    filled |= settings
    recipe = Recipe(filled.pop("divergence"), 0.5, filled.pop("tail"))
    expected, sums = distillation_loss(
        hidden,
        model.unembedding(),
        BatchTargets.of(batch),
        prior=jnp.asarray(cache.tail_prior()),
        recipe=recipe,
        **filled,
    )
    ours = trainer(student(checkpoint), cache, tmp_path, **settings)
    got = ours.compute_loss(ours.model.eval(), decant_torch.Rows(cache)[range(4)])
    assert ours._fused
    assert got.item() == pytest.approx(float(expected / sums.count), rel=1e-5)
    ours._fused = False
    whole = ours.compute_loss(ours.model, decant_torch.Rows(cache)[range(4)])
    torch.testing.assert_close(whole, got, rtol=1e-5, atol=0)


def test_with_several_gpus_in_one_process_logits_are_taken_which_are_gathered(
    cache, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    assert not trainer(student(checkpoint), cache, tmp_path)._fused


def test_the_student_learns_and_is_judged_on_held_out_rows(cache, checkpoint, tmp_path):
    ours = trainer(student(checkpoint), cache, tmp_path, max_steps=12, eval_strategy="no")
    before = ours.evaluate()
    ours.train()
    after = ours.evaluate()
    for name in ("loss", "kl", "kl_bound", "ce", "perplexity"):
        assert after[f"eval_{name}"] < before[f"eval_{name}"], name
    judged = decant_torch.evaluate(
        lambda batch: ours.model(**decant_torch.packed_inputs(batch)).logits, cache, batch_rows=5
    )
    assert judged["heldout_kl_by"] == "draws"
    for name, value in judged.items():
        if name != "heldout_kl_by":
            assert after[name.replace("heldout", "eval")] == pytest.approx(value, rel=1e-4), name


def test_microbatches_change_nothing_but_rounding(cache, checkpoint, tmp_path):
    """The rows of an update hold different numbers of counted tokens."""
    whole = trainer(student(checkpoint), cache, tmp_path, max_steps=2, optim="sgd")
    whole.train()
    pieces = trainer(
        student(checkpoint),
        cache,
        tmp_path,
        max_steps=2,
        optim="sgd",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    pieces.train()
    same_weights(weights(whole.model), weights(pieces.model), within=1e-6)
    losses = [
        [line["loss"] for line in each.state.log_history if "loss" in line]
        for each in (whole, pieces)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(cache, checkpoint, tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    straight = trainer(student(checkpoint), cache, tmp_path / "a", **options)
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": 3, **options}
    trainer(student(checkpoint), cache, tmp_path / "b", **saving).train()
    resumed = trainer(student(checkpoint), cache, tmp_path / "b", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    same_weights(weights(straight.model), weights(resumed.model))
    resumed._data["rows_id"] = "another"
    with pytest.raises(
        ValueError, match=r"checkpoint-6: learned from other data: rows_id '\w+', now"
    ):
        resumed.train(resume_from_checkpoint=True)


def test_two_processes_learn_what_one_learns_with_twice_the_microbatches(
    cache, checkpoint, tmp_path
):
    options = {"max_steps": 2, "optim": "sgd", "per_device_train_batch_size": 2}
    alone = trainer(student(checkpoint), cache, tmp_path, gradient_accumulation_steps=2, **options)
    alone.train()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(cache.path), str(checkpoint), str(tmp_path / "out"), json.dumps(options)]
    subprocess.run(
        [*command, "tests/reference/two_processes_side.py", *arguments],
        check=True,
        cwd=ROOT,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    same_weights(weights(alone.model), torch.load(tmp_path / "out" / "weights.pt"), within=1e-6)
    ours = json.loads((tmp_path / "out" / "evaluated.json").read_text())
    for name, value in alone.evaluate().items():
        if name.rsplit("_", 1)[-1] in ("loss", "kl", "ce", "agreement", "tokens"):
            assert ours[name] == pytest.approx(value, rel=1e-5), name


def test_in_bfloat16_the_student_learns_too(cache, checkpoint, tmp_path):
    exact = trainer(student(checkpoint), cache, tmp_path, max_steps=4)
    exact.train()
    rounded = trainer(student(checkpoint), cache, tmp_path, max_steps=4, bf16=True)
    rounded.train()
    first, last = rounded.state.log_history[0]["loss"], rounded.state.log_history[3]["loss"]
    assert last < first
    assert last == pytest.approx(exact.state.log_history[3]["loss"], rel=2e-2)


def test_what_does_not_fit_is_refused(cache, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="drawn from at T up to 1, but temperature is"):
        trainer(student(checkpoint), cache, tmp_path, temperature=2.0, tail="sampled")
    small = student(checkpoint)
    small.resize_token_embeddings(500)
    with pytest.raises(ValueError, match="its tokenizer has 512 tokens, but the student has 500"):
        trainer(small, cache, tmp_path)
