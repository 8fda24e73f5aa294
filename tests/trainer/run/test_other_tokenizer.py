"""Students with another tokenizer than the teacher's learn from aligned caches."""

import numpy as np
import pytest
from flax import nnx

from decant.models import Decoder, ModelConfig
from decant.models.text.projection import project_vocabulary
from decant.pipelines.alignment.job import align
from decant.pipelines.config import Align
from decant.schemas import open_cache
from decant.trainer.config import Data, Evaluate, Loss, Optimiser, Student, Train
from decant.trainer.results.evaluate import evaluate
from decant.trainer.run.new_vocabulary import with_vocabulary
from decant.trainer.run.train import train
from tests.making import tokenizers

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture(scope="module")
def aligned(cache, tmp_path_factory):
    """The caches of both kinds of targets."""
    root = tmp_path_factory.mktemp("aligned")
    (root / "tokenizer").mkdir()
    for name, content in tokenizers.sentencepiece().files().items():
        (root / "tokenizer" / name).write_bytes(content)
    for targets in ("projected", "matched"):
        config = Align(
            tokenizer=str(root / "tokenizer"),
            cache=cache.path,
            output=root / targets,
            targets=targets,
        )
        align(config)
    return {targets: open_cache(root / targets) for targets in ("projected", "matched")}


def test_a_student_learns_by_gold_and_is_judged_on_any_cache_of_the_text(aligned, tmp_path):
    config = Train(
        cache=aligned["matched"].path,
        run=tmp_path / "run",
        student=Student(init="scratch", layers=1, **SHAPE),
        data=Data(batch_rows=4, steps=8),
        loss=Loss(alpha=0.6, divergence="gold", temperature=2.0, chunk_tokens=64),
        optimiser=Optimiser(learning_rate=1e-2, warmup_steps=1),
        evaluate_every=8,
        heldout_rows=None,
        quiet=True,
    )
    trained = train(config)
    assert trained.heldout["heldout_ce"] < 6.5  # at first ln 700 = 6.55
    assert trained.heldout["heldout_kl_by"] == "bound"
    judged = evaluate(Evaluate(run=config.run, cache=aligned["projected"].path, quiet=True))
    bits = trained.heldout["heldout_bits_per_byte"]
    assert judged["heldout_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_inputs_of_blocks_get_the_rows_of_the_same_tokens():
    own, new = tokenizers.byte_level(), tokenizers.sentencepiece()
    config = ModelConfig(
        **SHAPE,
        vocab_size=own.size,
        num_layers=1,
        head_dim=16,
        layer_input_dim=2,
        layer_input_rows=own.size - 100,
    )
    student = Decoder(config, rngs=nnx.Rngs(0))
    changed = with_vocabulary(student, own=own, new=new, size=new.size)
    assert changed.config.layer_input_rows == 0
    table, like = np.array(student.layer_embedding[...]), project_vocabulary(new, own).first
    assert (like >= len(table)).any()
    like = np.where(like < len(table), like, 0)  # what has no row of its own reads the first
    known = np.flatnonzero(like >= 0)
    np.testing.assert_array_equal(changed.layer_embedding[...][known], table[like[known]])


def test_gold_is_refused_by_name_for_projected_targets(aligned, tmp_path):
    config = Train(
        cache=aligned["projected"].path,
        run=tmp_path / "run",
        student=Student(init="scratch", layers=1, **SHAPE),
        loss=Loss(divergence="gold"),
    )
    with pytest.raises(ValueError, match=r"projected: does not say .* --targets matched"):
        train(config)
    assert not config.run.exists()


def test_matched_caches_know_the_size_of_the_teachers_vocabulary(aligned):
    matched = aligned["matched"]
    assert matched.manifest.parts[0].aligned.vocabulary == 512
    batch = matched.read(matched.rows()[:4])
    assert batch["topk_ids"].max() < matched.manifest.vocabulary_size
    assert np.isfinite(batch["unmatched_logprobs"]).any()
