"""LoRA on a decoder: it computes what the merged matrices would, and begins without a change."""

import dataclasses

import numpy as np
import pytest

from decant.models import open_checkpoint
from decant.models.checkpoints.adapters import TARGETS, Lora, add_adapter, merged
from decant.models.decoder.blocks import LORA_A, LORA_B
from decant.models.parameters import parameters_by_path
from tests import paths
from tests.making.models import CONFIG, final_states, random_decoder


def adapted(*targets, config=CONFIG, rank=3, scaling=0.5, noise=0.0):
    """A decoder with an adapter whose B is random if there is `noise`."""
    model = random_decoder(config)
    add_adapter(model, Lora(rank, scaling, targets or ("all-linear",)), seed=5)
    draw = np.random.default_rng(0)
    for path, parameter in parameters_by_path(model).items():
        if path.endswith(LORA_B) and noise:
            random = draw.standard_normal(parameter.shape, np.float32)
            parameter.set_value((random * noise).astype(np.float32))
    return model


def test_a_new_adapter_changes_nothing():
    np.testing.assert_array_equal(final_states(adapted()), final_states(random_decoder()))


def test_a_begins_uniform_within_one_over_the_root_of_its_inputs():
    blocks = adapted(rank=16).blocks
    for name, inputs in (("query", 32), ("output", 32), ("down", 64)):
        a = np.asarray(getattr(blocks, name + LORA_A)[...])
        assert a.shape[-1] == 16
        bound = inputs**-0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not np.asarray(getattr(blocks, name + LORA_B)[...]).any()


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), ("all-linear",)])
def test_an_adapter_computes_what_its_merged_matrices_do(targets):
    model = adapted(*targets, noise=0.3)
    plain = merged(model)
    before = parameters_by_path(random_decoder())
    changed = {p for p, x in parameters_by_path(plain).items() if (x[...] != before[p][...]).any()}
    names = TARGETS.values() if targets == ("all-linear",) else [TARGETS[targets[0]]]
    assert changed == {f"blocks.{name}" for name in names}
    ours, theirs = np.asarray(final_states(model)), np.asarray(final_states(plain))
    assert np.abs(ours - np.asarray(final_states(random_decoder()))).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_merged_matrix_is_the_matrix_plus_the_scaled_product():
    model = adapted("o_proj", noise=0.3)
    a, b = (np.asarray(getattr(model.blocks, "output" + part)[...]) for part in (LORA_A, LORA_B))
    assert a.shape == (2, 4, 8, 3)
    assert b.shape == (2, 3, 32)
    expected = np.asarray(model.blocks.output[...], np.float64)
    expected += 0.5 * np.einsum("lhkr,lrd->lhkd", a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_array_equal(merged(model).blocks.output[...], expected.astype(np.float32))


def test_another_target_does_not_change_the_other_matrices():
    one, both = (adapted(*targets).blocks for targets in (("q_proj",), ("q_proj", "v_proj")))
    np.testing.assert_array_equal(one.query_lora_a[...], both.query_lora_a[...])


def test_unknown_targets_and_experts_are_refused_by_name():
    with pytest.raises(ValueError, match=r"targets: 'qproj' cannot be adapted.* q_proj, k_proj"):
        adapted("qproj")
    with pytest.raises(ValueError, match="'head' cannot be adapted"):
        adapted("head")
    experts = dataclasses.replace(
        CONFIG, num_experts=4, experts_per_token=2, family="qwen3_moe", qk_norm=True
    )
    with pytest.raises(ValueError, match="'up_proj' is a matrix of each expert"):
        adapted("up_proj", config=experts)
    model = adapted(config=experts)
    names = {path for path in parameters_by_path(model) if path.endswith(LORA_A)}
    assert names == {f"blocks.{name}{LORA_A}" for name in ("query", "key", "value", "output")}
    with pytest.raises(ValueError, match="targets is empty"):
        add_adapter(random_decoder(), Lora(2, 1.0, ()), seed=0)


def test_blocks_of_two_kinds_take_no_adapter():
    model = open_checkpoint(paths.GOLDEN / "families" / "glm4_moe").abstract()
    with pytest.raises(ValueError, match=r"the first 1 blocks of this model have no experts"):
        add_adapter(model, Lora(rank=2, scaling=1.0, targets=("q_proj",)), seed=0)
