"""Draw small curves as SVG for notebooks, in the text colour of light and dark themes, without the import of matplotlib."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

_WIDE, _TALL, _MARGIN = 200, 110, 24  # of one panel, in pixels
_STYLE = 'style="font:11px sans-serif" fill="currentColor"'


def panels(title: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float], float | None]]) -> str:
    """Return HTML with a title and, side by side, one panel for each (name, x, y, top): x rising from 0, y from 0 to ``top``.

    ``top`` is None for the largest y. Values of y that are not finite leave a gap.
    """
    drawn = "".join(
        f'<g transform="translate({number * (_WIDE + 2 * _MARGIN) + _MARGIN},{_MARGIN})">{_panel(*curve)}</g>'
        for number, curve in enumerate(curves)
    )
    size = f'width="{len(curves) * (_WIDE + 2 * _MARGIN)}" height="{_TALL + 2 * _MARGIN}"'
    label = html.escape(f"{', '.join(name for name, *_ in curves)} of {title}")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" {size}>{drawn}</svg>'
    return f"<code>{html.escape(title)}</code><br>{svg}"


def _panel(name: str, x: Sequence[float], y: Sequence[float], limit: float | None) -> str:
    right, top = x[-1], limit or max([value for value in y if math.isfinite(value)], default=0.0)
    scale = _TALL / top if top > 0 else 0.0
    lines: list[list[str]] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            lines[-1].append(f"{a / right * _WIDE:.1f},{_TALL - b * scale:.1f}")
        elif lines[-1]:
            lines.append([])
    axes = f'<path d="M0,0V{_TALL}H{_WIDE}" fill="none" stroke="currentColor" stroke-opacity="0.5"/>'
    curve = "".join(f'<polyline points="{" ".join(points)}" fill="none" stroke="#5b8def" stroke-width="2"/>' for points in lines if points)
    words = ((4, -8, "start", f"{name}, 0 to {top:.3g}"), (0, _TALL + 14, "middle", "0"), (_WIDE, _TALL + 14, "middle", f"w = {right:g}"))
    texts = (f'<text x="{at}" y="{down}" text-anchor="{anchor}" {_STYLE}>{html.escape(text)}</text>' for at, down, anchor, text in words)
    return f"{axes}{curve}{''.join(texts)}"
