"""The exponential mean that every curvature estimate keeps, and what the mask form does with it.

H is the diagonal of the generalised Gauss-Newton matrix of the loss. For a layer with input x and output gradient g of
one sample's loss, H = mean over samples of (sum over positions of g x^T)^2.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse.attach import Attachment
from lightning_sparse.sample_gradients import Reduction

Reduce = Callable[[Tensor], Tensor]


class Curvature(ABC):
    """An exponential mean of a diagonal curvature estimate, one tensor a weight, updated every ``every`` steps.

    Args:
        decay: weight of the past in the mean, per optimiser step.
        every: optimiser steps between updates; between them nothing is recorded.
        samples: how many samples of a batch an update looks at where they are taken one by one.
        reduction: how the loss reduces over the batch, "mean" or "sum".

    Other layers than Linear and ConvNd, weights with several owners or calls, and compiled modules fall back to the batch
    gradient squared, times the batch size for a mean: right up to the square of the full gradient, which vanishes at a
    minimum.
    """

    def __init__(self, decay: float = 0.9, every: int = 10, samples: int = 16, reduction: Reduction = "mean") -> None:
        self.decay = _checks.between("decay", decay, 0, 1, closed="l")
        self.every, self.samples = int(_checks.positive("every", every)), int(_checks.positive("samples", samples))
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.reduction: Reduction = reduction
        self.reset()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def reset(self) -> None:
        """Forget every estimate, before a new fit."""
        self.mean: dict[str, Tensor] = {}
        self.weight: dict[str, float] = {}
        self._pending: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}  # of each layer in the batch that is being recorded
        self._active = False
        self._scale, self._batch = 1.0, 1
        self.generator: torch.Generator | None = None

    @abstractmethod
    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        """Install what records the batches' gradients."""

    def begin(self, step: int, batch: int, scale: float = 1.0) -> None:
        """Before a batch: record it if ``step`` is due. ``scale`` is what the loss was multiplied by before backward."""
        self._active, self._batch, self._scale = step % self.every == 0, max(batch, 1), scale

    def before_backward(self, scale: float) -> None:
        """Between forward and backward, when the graph is alive; ``scale`` as in :meth:`begin`, now exact."""
        self._scale = scale

    def end(self, reduce: Reduce = lambda value: value) -> None:
        """After backward: fold what was recorded into the mean; ``reduce`` averages a tensor over ranks."""
        self._active = False
        keep = self.decay**self.every
        for name in sorted(self._pending):
            value = reduce(self._pending[name])
            old = self.mean.get(name)
            self.mean[name] = value * (1 - keep) if old is None else old.mul_(keep).add_(value, alpha=1 - keep)
            self.weight[name] = keep * self.weight.get(name, 0.0) + 1 - keep
        self._pending.clear()
        self._calls.clear()

    def estimate(self, name: str) -> Tensor | None:
        """H_jj >= 0 of a parameter, None before the first update."""
        return self.mean[name] / self.weight[name] if name in self.mean else None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that continue the estimate exactly."""
        return {"mean": {name: value.clone() for name, value in self.mean.items()}, "weight": dict(self.weight)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Continue from :meth:`state_dict`, on the parameters' devices."""
        self.mean = {name: value.to(parameters[name].device, copy=True) for name, value in state["mean"].items()}
        self.weight = dict(state["weight"])

    def _add(self, name: str, value: Tensor) -> None:
        """``value`` is the sum over ``samples`` of squared per-sample gradients of the mean (or summed) loss."""
        self._pending[name] = value / self._scale**2
        self._calls[name] = self._calls.get(name, 0) + 1

    def _sample_factor(self, batch: int, used: int) -> float:
        return batch * batch / used if self.reduction == "mean" else batch / used

    def _attach_fallback(self, attachment: Attachment) -> None:
        for name in attachment.parameters:
            attachment.on_gradient(name, partial(self._on_gradient, name))

    def _on_gradient(self, name: str, grad: Tensor) -> None:
        if self._active and self._calls.get(name, 0) != 1:  # one call was read at the layer, before this gradient came
            self._pending.pop(name, None)
            self._add(name, grad.detach() ** 2 * (self._batch if self.reduction == "mean" else 1))


def calibrated(eta: Tensor, curvature: Tensor, lam: float, ceiling: float) -> Tensor:
    """eta_j max(H_jj, lam / ceiling): with it in the place of eta_j, noise of strength lam realises lam * Omega.

    ``ceiling`` bounds lam / H_jj: where the loss hardly curves, the noise stays below that of an uncalibrated mask of
    that strength.
    """
    return eta * curvature.clamp(min=lam / ceiling)
