"""A histogram as inline SVG, coloured by the page's style."""

from __future__ import annotations

import numpy as np

from decant.foreign import escaped
from decant.pipelines.inspection.contents import shares

_WIDTH, _HEIGHT, _LEFT, _BASE = 340, 190, 40, 150
_TOP = 12


def svg(values: np.ndarray, edges: np.ndarray, *, title: str, unit: str) -> str:
    """Bars of the values' shares in the bins; values beyond the last edge are in the last bin."""
    found = shares(values, edges)
    width = (_WIDTH - _LEFT - 12) / len(found)
    highest = max(float(found.max()), 1e-9)
    scale = (_BASE - _TOP) / highest
    bars = [
        f'<rect x="{_LEFT + i * width + 0.75:.1f}" y="{_BASE - share * scale:.1f}" '
        f'width="{width - 1.5:.1f}" height="{share * scale:.1f}">'
        f"<title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {share:.1%}</title></rect>"
        for i, share in enumerate(found.tolist())
    ]
    every = max(1, len(found) // 5)
    ticks = [
        f'<text x="{_LEFT + i * width:.1f}" y="{_BASE + 16}" text-anchor="middle">'
        f"{edges[i]:.3g}</text>"
        for i in range(0, len(edges), every)
    ]
    levels = [
        f'<text x="{_LEFT - 6}" y="{_BASE - level * scale + 4:.1f}" text-anchor="end">'
        f"{level:.0%}</text>"
        for level in (0.0, highest)
    ]
    summary = f"{title}: the fullest bin holds {highest:.0%} of the positions"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(summary)}">'
        f'<line x1="{_LEFT}" y1="{_BASE}" x2="{_WIDTH - 12}" y2="{_BASE}"/>'
        f"{''.join(bars)}{''.join(ticks)}{''.join(levels)}"
        f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escaped(unit)}</text></svg>"
    )
