"""Gradients of float64 formulas by central differences, and how far two gradients are apart."""

import jax
import jax.numpy as jnp
import numpy as np


def slope(formula, x, *, step=1e-5):
    """∂formula/∂x of a number at a float64 array."""
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


def relative(a, b):
    """Largest difference of two trees as a share of the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-30)) for x, y in pairs)


def apart(a, b):
    """‖a − b‖ / ‖b‖ of two trees, the largest of their leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(_norm(np.float64(x) - np.float64(y)) / (_norm(y) or 1.0) for x, y in pairs)


def _norm(x):
    return float(np.linalg.norm(np.float64(x)))
