"""Floor of an arm's extra time: the bytes that it must read and write, at the bandwidth of a copy.

Counts are of float32 values, 4 bytes each. What happens at one moment of a step is one pass, in which each value is read or
written once; what happens before the forward, in it, after backward and after the optimiser's step are different ones, and
a product of matrices is a pass of its own. Arithmetic, random numbers and the multiplications themselves are not in it, so
it is a floor and no forecast.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_sparse.layers import LAYERS
from lightning_sparse.select import default_selection
from performance.arms import COMPILED
from performance.jobs import Job

_SIZE = 4  # bytes of a float32
_LARGE = 1 << 26  # values: far beyond any cache


@dataclass(frozen=True)
class Traffic:
    """Bytes per step for each selected weight, and for each value that enters, leaves or returns to a selected layer.

    A value returns where the loss has a gradient in it: not to a network's first layer.
    """

    why: str
    weight: float = 0.0
    entering: float = 0.0
    returning: float = 0.0
    leaving: float = 0.0


# in values for each weight: once in ten steps the mean of the curvature's estimates is read and written
_CURVATURE = 2 / 10

# Noise on outputs makes, for each layer, a second product: of the inputs' squares with the variances of the weights.
# entering: read x, write its square; the product reads that, and again for the variances' gradient
_ENTERING = 2 + 1 + 1
# returning: the backward product writes the squares' gradient; read it, x and the gradient in x, write that
_RETURNING = 1 + 4
# leaving: the product writes the variance; read it and the mean, write the draw and the output; backward: read the gradient,
# the draw and the variance, write the variance's gradient, which the backward product reads
_LEAVING = 1 + 4 + 4 + 1
_NOISE = {"entering": _SIZE * _ENTERING, "returning": _SIZE * _RETURNING, "leaving": _SIZE * _LEAVING}

TRAFFIC = {
    "penalty": Traffic("before the step: read w, g; write g", _SIZE * 3),
    "prox": Traffic("after the step: read w, v; write w", _SIZE * 3),
    "prox exact": Traffic("after the step: read w, v; write w", _SIZE * 3),
    # the masked w stands beside w, and the forward reads it in w's place; w over the masked w is the mask, for the gradient
    "mask": Traffic(
        "before the forward: read w, H, write the masked w; after backward: read g, w, the masked w, write g; H",
        _SIZE * (3 + 4 + _CURVATURE),
    ),
    "mask local": Traffic(
        "before the forward: read w, H, write variances; two products: read them, write their gradient; before the step: read "
        "that, w, H, g, write g; H; squares of the inputs, noise on the outputs, and the backward of both",
        _SIZE * (3 + 2 + 5 + _CURVATURE),
        **_NOISE,
    ),
    # theta is a parameter of the optimiser's, so that its gradient is written and read
    "variational dropout": Traffic(
        "before the forward: read theta, write variances; two products: read them, write their gradient; before the step: read "
        "that, w, theta, g, write g and theta's; Adam on theta: read theta, m, v, g, write theta, m, v; the rest as mask local",
        _SIZE * (2 + 2 + 6 + 7),
        **_NOISE,
    ),
}
MONITOR = Traffic("at an epoch's end: read w", _SIZE)  # bytes an epoch


def of_arm(arm: str, job: Job) -> Traffic | None:
    """Return the traffic of ``arm`` per step; None for arms without extra work."""
    if arm == "monitor":
        return replace(MONITOR, weight=MONITOR.weight / job.epoch)
    return TRAFFIC.get(arm.removesuffix(COMPILED))


@dataclass(frozen=True)
class Size:
    """Sizes of a job's selected layers: weights, and values that enter, return to and leave them per step."""

    weights: int
    entering: int
    returning: int
    leaving: int

    def bytes_of(self, traffic: Traffic) -> float:
        passed = self.entering * traffic.entering + self.returning * traffic.returning + self.leaving * traffic.leaving
        return self.weights * traffic.weight + passed


def size_of(job: Job) -> Size:
    """Count the sizes with one batch through a new network."""
    module = job.build()
    passed: list[tuple[int, int, int]] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        passed.append((x.numel(), x.numel() if x.requires_grad else 0, output.numel()))

    for layer in (one for one in module.modules() if isinstance(one, LAYERS)):
        layer.register_forward_hook(count)
    module(job.inputs(job.batch))
    return Size(sum(weight.numel() for weight in default_selection(module).values()), *map(sum, zip(*passed, strict=True)))


def bandwidth(values: int = _LARGE, times: int = 21) -> float:
    """Measure the bandwidth of a copy of ``count`` float32 values (bytes read and written per second, median of some copies)."""
    source, target = torch.ones(values), torch.ones(values)
    inner = max(1, (1 << 20) // values)  # a small copy is repeated, so that the clock's own time does not count
    found = []
    for _ in range(times):
        began = time.perf_counter()
        for _ in range(inner):
            target.copy_(source)
        found.append(2 * _SIZE * values * inner / (time.perf_counter() - began))
    return statistics.median(found[1:])
