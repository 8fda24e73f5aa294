"""Optimisers over stacked layers, against one layer at a time; schedules; what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from decant.trainer.config import Optimiser
from decant.trainer.update.optimiser import has_weight_decay, learning_rate, make_optimiser
from decant.trainer.update.parameter_names import names

LAYERS, D, H, K, F = 3, 8, 2, 4, 12


def parameters(seed=0, **sizes):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {
        "blocks": {
            "query": (LAYERS, D, H, K),
            "output": (LAYERS, H, K, D),
            "gate": (LAYERS, D, F),
            "attention_norm": (LAYERS, D),
            "query_bias": (LAYERS, H, K),
        },
        "embedding": (16, D),
        "final_norm": (D,),
    }
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    return jax.tree.map(lambda s: jnp.asarray(draw(s), jnp.float32), shapes, **is_shape)


def moved(config, *, updates=3):
    """The parameters and state after updates at a rate of 0.1 with random gradients."""
    transform, params = make_optimiser(config), parameters()
    state = transform.init(params)
    step = jax.jit(transform.update)
    for number in range(updates):
        direction, state = step(parameters(seed=10 + number), state, params)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, params, direction)
    return params, state


def newton_schulz(matrix):
    """Muon's quintic iteration on one matrix in float64 (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("name", "as_matrix"), [("query", (D, H * K)), ("output", (H * K, D)), ("gate", (D, F))]
)
def test_muon_orthogonalises_every_layer_s_matrix_by_itself(name, as_matrix):
    config = Optimiser(name="muon", clip_norm=1e9, weight_decay=0.0)
    after, _ = moved(config, updates=2)
    before, beta = parameters()["blocks"][name], 0.95
    gradients = [np.float64(parameters(seed=10 + i)["blocks"][name]) for i in range(2)]
    for layer in range(LAYERS):
        mean, expected = 0.0, np.float64(before[layer])
        for count, gradient in enumerate((g[layer].reshape(as_matrix) for g in gradients), 1):
            mean = beta * mean + (1 - beta) * gradient
            ahead = beta * mean / (1 - beta ** (count + 1))
            ahead += (1 - beta) * gradient / (1 - beta**count)
            move = newton_schulz(ahead) * 0.2 * max(as_matrix) ** 0.5
            expected = expected - 0.1 * move.reshape(expected.shape)
        np.testing.assert_allclose(after["blocks"][name][layer], expected, atol=1e-5)


def test_muon_leaves_embeddings_norms_and_biases_to_adam():
    muon, _ = moved(Optimiser(name="muon", clip_norm=1e9))
    adam, _ = moved(Optimiser(clip_norm=1e9))
    for got, expected in (
        (muon["embedding"], adam["embedding"]),
        (muon["final_norm"], adam["final_norm"]),
        (muon["blocks"]["attention_norm"], adam["blocks"]["attention_norm"]),
        (muon["blocks"]["query_bias"], adam["blocks"]["query_bias"]),
    ):
        np.testing.assert_array_equal(got, expected)
    assert float(jnp.abs(muon["blocks"]["gate"] - adam["blocks"]["gate"]).max()) > 0.01


def test_muon_s_updates_are_of_adam_s_size():
    """Their root mean square is near 0.2 for every shape, so that one learning rate fits both."""
    transform, params = make_optimiser(Optimiser(name="muon", weight_decay=0.0)), parameters()
    update = jax.jit(transform.update)
    direction, _ = update(parameters(seed=10), transform.init(params), params)
    for name in ("query", "output", "gate"):
        rms = float(jnp.sqrt(jnp.mean(direction["blocks"][name] ** 2)))
        assert 0.12 < rms < 0.24, name


def test_adafactor_treats_every_layer_as_optax_would_alone(monkeypatch):
    config = Optimiser(name="adafactor", clip_norm=1e9, weight_decay=0.0)
    # Factor arrays of this size too; optax's default minimum is 128.
    factored = optax.scale_by_factored_rms
    monkeypatch.setattr(
        "decant.trainer.update.optimiser.optax.scale_by_factored_rms",
        lambda: factored(min_dim_size_to_factor=4),
    )
    after, state = moved(config)
    # The factored moments of one axis, for each layer.
    assert (LAYERS, D) in {x.shape for x in jax.tree.leaves(state)}
    alone = optax.adafactor(0.1, min_dim_size_to_factor=4)
    step = jax.jit(alone.update)
    for name in ("query", "gate", "attention_norm"):
        for layer in range(LAYERS):
            one = parameters()["blocks"][name][layer]
            its = alone.init(one)
            for number in range(3):
                gradient = parameters(seed=10 + number)["blocks"][name][layer]
                move, its = step(gradient, its, one)
                one = optax.apply_updates(one, move)
            np.testing.assert_allclose(after["blocks"][name][layer], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_stay_to_the_bit_and_have_no_moments(name):
    freeze = ("embedding", "layers.*norm", "layers.0.gate")
    after, state = moved(Optimiser(name=name, freeze=freeze))
    before = parameters()
    np.testing.assert_array_equal(after["embedding"], before["embedding"])
    blocks = after["blocks"], before["blocks"]
    np.testing.assert_array_equal(*(b["attention_norm"] for b in blocks))
    np.testing.assert_array_equal(*(b["gate"][0] for b in blocks))
    assert all(not np.array_equal(*(b["gate"][i] for b in blocks)) for i in (1, 2))
    assert not np.array_equal(*(b["query"][0] for b in blocks))
    assert not np.array_equal(after["final_norm"], before["final_norm"])
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert before["embedding"].shape not in shapes
    assert before["blocks"]["attention_norm"].shape not in shapes
    assert before["blocks"]["gate"].shape not in shapes


def test_frozen_gradients_are_not_part_of_the_clipped_norm():
    """The other parameters move as if the frozen gradient were zero."""
    config = Optimiser(freeze=("embedding",), clip_norm=1.0, epsilon=1.0)
    params, gradient = parameters(), parameters(seed=10)
    transform = make_optimiser(config)
    huge = {**gradient, "embedding": gradient["embedding"] * 1e6}
    got, _ = transform.update(huge, transform.init(params), params)
    expected, _ = transform.update(gradient, transform.init(params), params)
    np.testing.assert_array_equal(got["final_norm"], expected["final_norm"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ("embeding",)}, r"no parameter is called 'embeding'; did you mean embedding\?"),
        ({"freeze": ("*",)}, "leaves nothing to train"),
        ({"no_decay": ("layers.0.gate",)}, "names layers.0.gate but not all of the 3 layers"),
    ],
)
def test_patterns_that_match_nothing_or_too_much_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_optimiser(Optimiser(**settings)).init(parameters())


def test_layers_have_names_of_their_own():
    array_names = names(parameters())
    assert array_names["blocks", "query"] == ["layers.0.query", "layers.1.query", "layers.2.query"]
    assert array_names[("final_norm",)] == ["final_norm"]


def test_weight_decay_leaves_norms_and_biases_alone():
    mask = has_weight_decay(parameters(), Optimiser())
    assert mask["embedding",]
    assert mask["blocks", "query"]
    assert not mask["final_norm",]
    assert not mask["blocks", "attention_norm"]
    assert not mask["blocks", "query_bias"]
    assert not has_weight_decay(parameters(), Optimiser(no_decay=("embedding",)))["embedding",]
    still = jax.tree.map(jnp.zeros_like, parameters())
    transform = make_optimiser(Optimiser(weight_decay=0.5))
    direction, _ = transform.update(still, transform.init(still), parameters())
    np.testing.assert_allclose(direction["embedding"], parameters()["embedding"] * 0.5)
    assert not direction["final_norm"].any()


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        # The peak is 1; 4 updates of warm-up, 24 in all; the end 0.2.
        ("cosine", {1: 0.25, 2: 0.5, 4: 1.0, 14: 0.6, 24: 0.2}),
        ("linear", {1: 0.25, 4: 1.0, 9: 0.8, 14: 0.6, 24: 0.2}),
        ("constant", {1: 0.25, 4: 1.0, 14: 1.0, 24: 1.0}),
        ("wsd", {1: 0.25, 4: 1.0, 12: 1.0, 18: 0.6, 24: 0.2}),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, at):
    config = Optimiser(
        learning_rate=1.0,
        warmup_steps=4,
        final_fraction=0.2,
        schedule=schedule,
        decay_fraction=0.5,
    )
    rate = learning_rate(config, steps=24)
    np.testing.assert_allclose([rate(step) for step in at], list(at.values()), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_a_run_as_short_as_its_warm_up_has_a_learning_rate(schedule):
    rate = learning_rate(Optimiser(schedule=schedule, warmup_steps=10), steps=3)
    assert all(0 < float(rate(step)) <= 1e-3 for step in (1, 2, 3))


def test_layers_are_numbered_through_blocks_without_and_with_experts():
    params = {
        "first_blocks": {"gate": np.zeros((2, 3))},
        "blocks": {"gate": np.zeros((2, 3)), "router": np.zeros((2, 3))},
        "head": np.zeros(3),
    }
    assert names(params) == {
        ("first_blocks", "gate"): ["layers.0.gate", "layers.1.gate"],
        ("blocks", "gate"): ["layers.2.gate", "layers.3.gate"],
        ("blocks", "router"): ["layers.2.router", "layers.3.router"],
        ("head",): ["head"],
    }
