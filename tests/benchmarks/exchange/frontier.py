"""Points of an arm (one per strength), its frontier by validation error, and interpolated test errors."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Runs = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """Means over seeds at one strength, in %: non-zero weights in the file, and errors."""

    lam: float
    share: float
    val_error: float
    test_error: float
    seeds: int = 1


def points(runs: Runs) -> list[Point]:
    """Return one point per strength of an arm's runs, sparsest first."""
    strengths = sorted({run["lam"] for run in runs})
    return sorted((_point([run for run in runs if run["lam"] == lam]) for lam in strengths), key=lambda point: point.share)


def _point(runs: Runs) -> Point:
    share, val_error, test_error = (statistics.mean(run[name] for run in runs) for name in ("nonzero_file", "val_error", "test_error"))
    return Point(runs[0]["lam"], share, val_error, test_error, len(runs))


def frontier(found: Sequence[Point]) -> list[Point]:
    """Return the points with a smaller validation error than all points of equal or higher sparsity, sparsest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.share, point.val_error)):
        if not best or point.val_error < best[-1].val_error:
            best.append(point)
    return best


def error_at(found: Sequence[Point], share: float) -> float | None:
    """Interpolate the frontier's test error at a share of non-zero weights (%), linearly in log(share).

    Above the frontier's densest point, as far as there are points that it beats, that point's: a sparser network serves there
    too. None outside of all points: nothing is extrapolated.
    """
    line = frontier(found)
    for left, right in itertools.pairwise(line):
        if left.share <= share <= right.share:
            t = math.log(share / left.share) / math.log(right.share / left.share)
            return left.test_error + t * (right.test_error - left.test_error)
    beaten = any(line[-1].share <= share <= point.share for point in found)
    return line[-1].test_error if beaten else next((point.test_error for point in line if point.share == share), None)
