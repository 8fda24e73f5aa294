"""AdamW, its learning rate over a run, and what weight decay pulls at."""

from __future__ import annotations

from typing import Any

import jax
import optax

from trainer.config import Optimiser


def optimiser(config: Optimiser) -> optax.GradientTransformation:
    """AdamW up to its learning rate, which is applied outside: it follows `state.step`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def learning_rate(config: Optimiser, *, steps: int) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def decayed(params: dict[str, Any]) -> dict[str, Any]:
    """Which parameters weight decay pulls at. By name: stacked norms are matrices in shape."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("norm", "bias")), params
    )
