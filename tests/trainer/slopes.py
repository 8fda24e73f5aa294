"""Gradients of float64 formulas by central differences."""

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
