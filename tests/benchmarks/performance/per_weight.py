"""A form's floor for each weight, the bytes that must be read and written at the bandwidth of a large copy; costs on a line.

Whatever fits into registers is free: temporaries, random bits and arithmetic do not count, and before the forward, after
backward and after the step each array is read or written once. Weights, gradients and curvature are float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Bytes = tuple[tuple[str, float], ...]

ITEMS: dict[str, Bytes] = {
    "penalty": (("read w", 4), ("read g", 4), ("write g + lam w / eta_hat(w)", 4)),
    "prox": (("read w", 4), ("write the prox of w", 4)),  # at the learning rate's own metric: no second moments
    "mask": (
        ("read w", 4),
        ("read H", 4),
        ("write s w to a separate buffer, so that w needs no copy", 4),
        ("read g", 4),
        ("read w", 4),
        ("read s w, for s", 4),
        ("write s g", 4),
    ),
}


def bytes_of(form: str) -> float:
    """Return bytes per weight and step."""
    return sum(size for _, size in ITEMS[form])


def copier(count: int, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Make a function that copies ``count`` float32 three times and returns seconds per byte of the fastest copy.

    A byte is counted when it is read and when it is written. The arrays should be larger than the caches.
    """
    source, target = torch.ones(count), torch.zeros(count)

    def copy() -> float:
        taken = []
        for _ in range(3):
            start = clock()
            target.copy_(source)
            taken.append(clock() - start)
        return min(taken) / (2 * source.numel() * source.element_size())

    return copy


@dataclass(frozen=True)
class Line:
    """A line ``slope * count + start``, and the largest relative deviation of the points."""

    slope: float
    start: float
    stray: float


def line(points: Mapping[float, float]) -> Line:
    """Fit a line to {count: value} by least squares; through the origin for a single point."""
    counts, values = list(points), list(points.values())
    slope, start = statistics.linear_regression(counts, values) if len(points) > 1 else (values[0] / counts[0], 0.0)
    return Line(slope, start, max(abs(value / (slope * count + start) - 1) for count, value in points.items()))
