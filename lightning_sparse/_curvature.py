"""The exponential mean that every curvature estimate keeps, and what the mask form does with it.

H is the diagonal of the generalised Gauss-Newton matrix of the loss. For a layer with input x and output gradient g of
one sample's loss, H = mean over samples of (sum over positions of g x^T)^2.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse._construction import Constructed
from lightning_sparse._finite import unfit
from lightning_sparse.attach import Attachment
from lightning_sparse.duality import Penalty
from lightning_sparse.sample_gradients import Reduction

Reduce = Callable[[Tensor], Tensor]


class Curvature(metaclass=Constructed):
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
        self._done: set[str] = set()  # what an earlier backward of this batch gave an estimate for
        self._active = False
        self._scale, self._batch = 1.0, 1
        self.generator: torch.Generator | None = None

    @abstractmethod
    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        """Install what records the batches' gradients."""

    def begin(self, step: int, batch: int, scale: float = 1.0) -> None:
        """Before a batch: record it if ``step`` is due. ``scale`` is what the loss was multiplied by before backward."""
        self._active, self._batch, self._scale = step % self.every == 0, max(batch, 1), scale
        self._done.clear()

    def before_backward(self, scale: float) -> None:
        """Between forward and backward, when the graph is alive; ``scale`` as in :meth:`begin`, now exact."""
        self._scale = scale

    def end(self, reduce: Reduce | None = None, parameters: Mapping[str, Tensor] | None = None, more: bool = False) -> None:
        """After backward: fold what was recorded into the mean; ``more`` backwards of the batch may record other weights.

        ``reduce`` averages a tensor over ranks; then every rank calls this after the same batches, with the same
        ``parameters``, and what a rank recorded nothing of (a layer that its batch did not use) is the mean of the others.
        """
        found = self._agreed(reduce, parameters) if reduce and parameters and self._active else self._pending.items()
        self._active &= more
        keep = self.decay**self.every
        for name, value in found:
            self._done.add(name)
            if unfit({name: value}):  # of a step that is skipped, or that ends the run
                continue
            old = self.mean.get(name)
            self.mean[name] = value * (1 - keep) if old is None else old.mul_(keep).add_(value, alpha=1 - keep)
            self.weight[name] = keep * self.weight.get(name, 0.0) + 1 - keep
        self._pending.clear()
        self._calls.clear()

    def _agreed(self, reduce: Reduce, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The mean over the ranks that recorded something, name by name in an order that all ranks share."""
        device = next(iter(parameters.values())).device
        shares = reduce(torch.tensor([float(name in self._pending) for name in parameters], device=device)).tolist()
        for (name, parameter), share in zip(parameters.items(), shares, strict=True):
            if share > 0:
                own = self._pending.get(name)
                yield name, reduce(torch.zeros_like(parameter) if own is None else own.detach().to(parameter.dtype)) / share

    def estimate(self, name: str) -> Tensor | None:
        """H_jj >= 0 of a parameter, None before the first update."""
        if name not in self.mean:
            return None
        mean, weight = self.mean[name], self.weight[name]
        return mean if weight == 1 else mean / weight  # which it soon is, to all digits: no pass over the weights then

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that continue the estimate exactly."""
        return {"mean": {name: value.clone() for name, value in self.mean.items()}, "weight": dict(self.weight)}

    def check_state(self, state: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise ValueError unless ``state`` is a :meth:`state_dict` of these parameters (of any, where there are none yet)."""
        if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in ("mean", "weight")):
            raise ValueError(f"the checkpoint's curvature must be a dict of 'mean' and 'weight' by parameter name, got {state!r:.80}")
        if state["mean"].keys() != state["weight"].keys() or (parameters and not state["mean"].keys() <= parameters.keys()):
            raise ValueError(f"the checkpoint's curvature is of other parameters: {sorted(map(str, state['mean']))[:5]}")
        for name, mean in state["mean"].items():
            if not (_is_estimate(mean, parameters.get(name)) and _is_share(state["weight"][name])):
                raise ValueError(f"the checkpoint's curvature of {name!r} is damaged; resume from another file")

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Continue from :meth:`state_dict`, on the parameters' devices."""
        self.mean = {name: value.to(parameters[name].device, copy=True) for name, value in state["mean"].items()}
        self.weight = dict(state["weight"])

    def _add(self, name: str, value: Tensor) -> None:
        """``value`` is the sum over ``samples`` of squared per-sample gradients of the mean (or summed) loss."""
        if name in self._done:
            return
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


def _is_estimate(mean: Any, parameter: Tensor | None) -> bool:
    """Finite and >= 0, shaped as the parameter is."""
    if not (isinstance(mean, Tensor) and mean.is_floating_point()):
        return False
    return (parameter is None or mean.shape == parameter.shape) and bool(((mean >= 0) & mean.isfinite()).all())


def _is_share(weight: Any) -> bool:
    return isinstance(weight, float) and 0 < weight < 1 + 1e-6  # it tends to 1, up to rounding


def noise_eta(penalty: Penalty, lam: float | Tensor, ceiling: float, w: Tensor, *estimate: Tensor) -> Tensor:
    """eta_hat(w), :func:`calibrated` where there is an ``estimate`` of H_jj."""
    eta = penalty.eta_hat(w)
    return calibrated(eta, estimate[0].to(eta), lam, ceiling) if estimate else eta


def calibrated(eta: Tensor, curvature: Tensor, lam: float | Tensor, ceiling: float) -> Tensor:
    """eta_j max(H_jj, lam / ceiling): with it in the place of eta_j, noise of strength lam realises lam * Omega.

    ``ceiling`` bounds lam / H_jj: where the loss hardly curves, the noise stays below that of an uncalibrated mask of
    that strength.
    """
    return curvature.clamp(min=lam / ceiling).mul_(eta)
