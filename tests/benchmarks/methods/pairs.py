"""Similar methods, by their trajectories: density at the start, steepest decrease, rows that coincide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from lightning_sparse.reproduction.figures import Trajectories, mean_and_band
from lightning_sparse.reproduction.rows import EPOCHS, Row

DENSE, SPAN, CLIFF, BOUND = 0.9, 25, 2.0, 0.1
_LEAST = 1e-7  # because a share of 0 has no logarithm
_ABOUT = f"""Shares of non-zero weights (%), mean over the seeds of [trajectories.csv](reproduction/trajectories.csv). A run is "dense at
first" if the share is at least {100 * DENSE:.0f} % after epoch 1; it has a "cliff" if the share then decreases by a factor of
{CLIFF:g} or more within {SPAN} epochs. "Fall" is the largest factor of decrease within {SPAN} epochs, with these epochs; "at the end"
is the factor over the last {SPAN} epochs. The distance of two trajectories is the largest difference in log10 of the share over all
epochs ({BOUND:g} is a factor of {10**BOUND:.2f}). "Own seeds" is the largest distance between two seeds of a row, "nearest" the row
with the smallest distance. Two rows coincide if their distance is below {BOUND:g}."""


def markdown(rows: Sequence[Row], found: Trajectories) -> str:
    """Return the table, groups and pairs of the rows with trajectories."""
    drawn = [row for row in rows if row.recipe in found]
    if not drawn:
        return "Not run yet."
    means = {row.title: share(found[row.recipe]) for row in drawn}
    head = ["method", *(f"epoch {epoch}" for epoch in EPOCHS), "fall", "at the end", "own seeds", "nearest"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in drawn:
        cells = [
            *_shares(means[row.title]),
            _told(means[row.title]),
            _last(means[row.title]),
            _own(found[row.recipe]),
            _nearest(row.title, means),
        ]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    return "\n".join([_ABOUT, "", *lines, "", *groups(means), _coinciding(means)])


def share(seeds: dict[int, list[dict[str, float]]]) -> np.ndarray:
    """Return the share of non-zero weights after each epoch, in [0, 1], as mean over seeds."""
    return mean_and_band(seeds, "nonzero")[:, 1]


def fall(curve: np.ndarray, span: int = SPAN) -> tuple[float, int, int]:
    """Return the largest factor of decrease within ``span`` epochs, with its first and last epoch (the first if tied)."""
    logs = np.log(np.maximum(curve, _LEAST))
    pairs = ((first, last) for first in range(len(curve)) for last in range(first, min(first + span, len(curve) - 1) + 1))
    first, last = max(pairs, key=lambda pair: (logs[pair[0]] - logs[pair[1]], -pair[0]))
    return float(np.exp(logs[first] - logs[last])), first + 1, last + 1


def gap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference of two shares in log10 over their common epochs."""
    length = min(len(one), len(other))
    logs = [np.log10(np.maximum(curve[:length], _LEAST)) for curve in (one, other)]
    return float(np.abs(logs[0] - logs[1]).max())


def kind(curve: np.ndarray) -> str:
    """Classify a trajectory."""
    if curve[0] < DENSE:
        return "sparse from the first epoch"
    return "dense at first, then a cliff" if fall(curve)[0] >= CLIFF else "dense at first, then a slow decline"


def groups(means: dict[str, np.ndarray]) -> Iterable[str]:
    """Return one list item per class of runs."""
    kinds = {title: kind(curve) for title, curve in means.items()}
    for name in sorted(set(kinds.values()), reverse=True):
        yield f"- **{name}**: {'; '.join(title for title, own in kinds.items() if own == name)}."


def _coinciding(means: dict[str, np.ndarray]) -> str:
    gaps = {pair: gap(means[pair[0]], means[pair[1]]) for pair in combinations(means, 2)}
    close = [f"{one} with {other} ({gaps[one, other]:.3f})" for one, other in gaps if gaps[one, other] < BOUND]
    return f"- **coinciding**: {'; '.join(close) or 'no two rows'}."


def _shares(curve: np.ndarray) -> list[str]:
    return [f"{100 * curve[epoch - 1]:.1f}" if epoch <= len(curve) else "" for epoch in EPOCHS]


def _told(curve: np.ndarray) -> str:
    factor, first, last = fall(curve)
    return f"{factor:.1f}x, {first} to {last}"


def _last(curve: np.ndarray) -> str:
    return f"{curve[-SPAN - 1] / max(curve[-1], _LEAST):.1f}x" if len(curve) > SPAN else ""


def _own(seeds: dict[int, list[dict[str, float]]]) -> str:
    curves = [share({0: lines}) for lines in seeds.values()]
    return f"{max(gap(*pair) for pair in combinations(curves, 2)):.3f}" if len(curves) > 1 else ""


def _nearest(title: str, means: dict[str, np.ndarray]) -> str:
    gaps = {other: gap(means[title], curve) for other, curve in means.items() if other != title}
    best = min(gaps, key=lambda other: gaps[other], default=None)
    return "" if best is None else f"{best} ({gaps[best]:.3f})"
