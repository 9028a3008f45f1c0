r"""Estimates of H_jj, the curvature that calibrates the mask form: (1 - alpha_j) / alpha_j = lam / (H_jj eta_j).

H is the diagonal of the generalised Gauss-Newton matrix of the loss. For a layer with input x and output gradient g of
one sample's loss, H = mean over samples of (sum over positions of g x^T)^2.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse.attach import Attachment, layers
from lightning_sparse.sample_gradients import Reduction, draw_residual, squared_gradients

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


class EmpiricalFisher(Curvature):
    """H from the training gradients themselves: free of extra passes, and fit for negative log-likelihoods.

    Wrong for a squared loss, where it vanishes with the residual: use :class:`InputMoment` or :class:`SampledFisher`.
    """

    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        known = layers(module, attachment.parameters)
        for name, layer in known.items():
            attachment.on_forward(layer, partial(self._on_forward, name))
        self._attach_fallback(attachment)

    def _on_forward(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._active and output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda grad: self._on_output_gradient(name, layer, x, grad.detach()))

    def _on_output_gradient(self, name: str, layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        value, used = squared_gradients(layer, x, grad, self.samples)
        self._add(name, value * self._sample_factor(len(x), used))


class SampledFisher(EmpiricalFisher):
    """H from gradients with labels drawn from the model itself: the generalised Gauss-Newton diagonal without bias.

    One more backward pass on the steps that update it. ``output`` names the module whose output the loss compares with
    the targets ("" is the LightningModule's own forward). "categorical" is for cross-entropy over dimension 1;
    "gaussian" for ``nn.MSELoss`` (curvature 2 / outputs per sample for a mean, 2 for a sum).
    """

    def __init__(
        self,
        likelihood: Literal["categorical", "gaussian"] = "categorical",
        output: str = "",
        decay: float = 0.9,
        every: int = 10,
        samples: int = 16,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(decay, every, samples, reduction)
        if likelihood not in ("categorical", "gaussian"):
            raise ValueError(f"likelihood must be 'categorical' or 'gaussian', got {likelihood!r}")
        self.likelihood, self.output = likelihood, output

    def reset(self) -> None:
        super().reset()
        self._seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self._prediction: Tensor | None = None

    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        known = layers(module, attachment.parameters)
        modules = dict(module.named_modules())
        if self.output not in modules:
            raise ValueError(f"curvature output {self.output!r} is no module of the model{_checks.closest(self.output, modules)}")
        for name, layer in known.items():
            attachment.on_forward(layer, partial(self._on_forward, name))
        attachment.on_forward(modules[self.output], lambda layer, inputs, output: self._on_prediction(output))
        self._attach_fallback(attachment)

    def _on_forward(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._active and output.requires_grad:
            self._seen.append((name, layer, inputs[0].detach(), output))

    def _on_prediction(self, output: Any) -> None:
        if self._active and isinstance(output, Tensor) and output.requires_grad:
            self._prediction = output

    def before_backward(self, scale: float) -> None:
        super().before_backward(1.0)  # the drawn gradients below are not scaled by the loss
        if self._seen and self._prediction is None:
            raise RuntimeError(
                f"SampledFisher saw no output of the module {self.output!r}; name the module whose output the loss takes, "
                "for example SampledFisher(output='network'), where training_step does not call self(x)"
            )
        if self._prediction is not None and self._seen:
            outputs = [output for *_, output in self._seen]
            drawn = draw_residual(self._prediction.detach(), self.likelihood, self.reduction, self.generator)
            grads = torch.autograd.grad(self._prediction, outputs, drawn, retain_graph=True, allow_unused=True)
            for (name, layer, x, _), grad in zip(self._seen, grads, strict=True):
                if grad is not None:
                    self._on_output_gradient(name, layer, x, grad)
        self._seen, self._prediction = [], None
        super().before_backward(scale)


class InputMoment(Curvature):
    """H_jj = scale * E[x_j^2]: exact for a linear model whose loss is scale/2 times the mean squared error per sample.

    ``scale`` is 1 for ||y - Xw||^2 / (2 n) and 2 / outputs for ``nn.MSELoss``. It knows nothing of the layers behind:
    for a deep regression network use :class:`SampledFisher` with likelihood "gaussian". Linear layers only.
    """

    def __init__(self, scale: float = 1.0, decay: float = 0.9, every: int = 1) -> None:
        super().__init__(decay, every)
        self.scale = _checks.positive("scale", scale)

    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        known = layers(module, attachment.parameters)
        for name in attachment.parameters:
            if not isinstance(known.get(name), nn.Linear):
                raise ValueError(f"InputMoment knows Linear layers only, {name!r} is none; use SampledFisher or select=['!{name}']")
            attachment.on_forward(known[name], partial(self._on_input, name))

    def _on_input(self, name: str, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._active and layer.training:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self._scale = 1.0
            self._add(name, (self.scale * (x * x).mean(0)).expand_as(layer.weight).clone())


def calibrated(eta: Tensor, curvature: Tensor, lam: float, ceiling: float) -> Tensor:
    """eta_j max(H_jj, lam / ceiling): with it in the place of eta_j, noise of strength lam realises lam * Omega.

    ``ceiling`` bounds lam / H_jj: where the loss hardly curves, the noise stays below that of an uncalibrated mask of
    that strength.
    """
    return eta * curvature.clamp(min=lam / ceiling)
