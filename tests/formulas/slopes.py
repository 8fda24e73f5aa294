"""Gradients of float64 formulas by central differences, and distances between gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def slope(formula, x, *, step=1e-5):
    """∂formula/∂x at the float64 array x, for a formula that returns a number."""
    x = np.array(x, np.float64)
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        kept = x[at]
        x[at] = kept + step
        above = formula(x)
        x[at] = kept - step
        out[at] = (above - formula(x)) / (2 * step)
        x[at] = kept
    return out


def relative_error(a, b):
    """Largest |a − b| of two trees, relative to the largest |b| of the same leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-30)) for x, y in pairs)


def relative_distance(a, b):
    """Largest ‖a − b‖ / ‖b‖ over the leaves of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(_norm(np.float64(x) - np.float64(y)) / (_norm(y) or 1.0) for x, y in pairs)


def _norm(x):
    return float(np.linalg.norm(np.float64(x)))
