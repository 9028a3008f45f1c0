"""Estimates of the curvature from labels that are drawn from the model, and from a linear layer's inputs."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse._labels import Labels, read_categorical
from lightning_sparse.curvature.estimate import EXACT, Curvature, EmpiricalFisher
from lightning_sparse.sample_gradients import Reduction, draw_residual, label_places
from lightning_sparse.weights import Attachment


class SampledFisher(EmpiricalFisher):
    """H from gradients with labels drawn from the model itself: the generalised Gauss-Newton diagonal without bias.

    It takes one more backward pass on the steps that update it.

    Args:
        likelihood: "categorical" for cross-entropy, wherever its classes lie and whichever labels it ignores (where the loss
            cannot be read, over dimension 1 of ``output``, each position a label); "gaussian" for ``nn.MSELoss`` (curvature
            2 / outputs per sample for a mean, 2 for a sum).
        output: the name of the module whose output the loss compares with the targets; "" is the LightningModule's own
            forward.
    """

    def __init__(
        self,
        likelihood: Literal["categorical", "gaussian"] = "categorical",
        output: str = "",
        decay: float = 0.99,
        every: int = 10,
        samples: int = 16,
        reduction: Reduction = "mean",
        labels: Labels = None,
    ) -> None:
        super().__init__(decay, every, samples, reduction, labels)
        if likelihood not in ("categorical", "gaussian"):
            raise ValueError(f"likelihood must be 'categorical' or 'gaussian', got {likelihood!r}")
        self.likelihood, self.output = likelihood, output

    def reset(self) -> None:
        super().reset()
        self._seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self._prediction: Tensor | None = None
        self._drawn: float = 1  # labels in the loss that they were drawn for

    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        modules = dict(module.named_modules())
        if self.output not in modules:
            raise ValueError(f"curvature output {self.output!r} is no module of the model{_checks.closest(self.output, modules)}")
        super().attach(module, attachment)
        attachment.on_forward(modules[self.output], lambda layer, inputs, output: self._on_prediction(output))

    def _on_forward(self, name: str, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._wants_layer(name) and output.requires_grad and layer.weight.requires_grad:
            self._seen.append((name, layer, inputs[0].detach(), output))

    def _on_prediction(self, output: Any) -> None:
        if self._active and isinstance(output, Tensor) and output.requires_grad:
            self._prediction = output

    def begin(self, step: int, batch: int = 1, scale: float = 1.0) -> None:
        super().begin(step, batch, scale)
        self._seen, self._prediction, self._loss = [], None, None  # of forwards without a backward, or a bare one

    def observe_loss(self, loss: Tensor) -> None:
        self._loss = loss if self._active and self.labels is None else None

    def label_count(self) -> float:
        return self._drawn

    def before_backward(self, scale: float) -> None:
        Curvature.before_backward(self, scale)
        if self._seen and self._prediction is None:
            raise RuntimeError(
                f"SampledFisher saw no output of the module {self.output!r}; name the module whose output the loss takes, "
                "for example SampledFisher(output='network'), where training_step does not call self(x)"
            )
        if self._prediction is not None and self._seen:
            outputs = [output for *_, output in self._seen]
            drawn, self._drawn = self._draw(self._prediction, scale)
            grads = torch.autograd.grad(
                [tensor for tensor, _ in drawn], outputs, [residual for _, residual in drawn], retain_graph=True, allow_unused=True
            )
            for (name, layer, x, _), grad in zip(self._seen, grads, strict=True):
                if grad is not None:
                    self._on_output_gradient(name, layer, x, grad)
        self._seen, self._prediction, self._loss = [], None, None

    def _draw(self, prediction: Tensor, scale: float) -> tuple[list[tuple[Tensor, Tensor]], float]:
        """Tensors of the graph with the loss's gradient in each for drawn labels, and how many labels the loss averages over."""
        given = None if self._count is None or self.labels is None or self.reduction == "sum" else self._count.count()
        count = 1.0 if self.reduction == "sum" else float(len(prediction) if self.likelihood == "gaussian" else label_places(prediction))
        read = read_categorical(self._loss, scale) if self._loss is not None and self.likelihood == "categorical" else None
        if read is not None and not (prediction.dim() == 2 and read.is_plain(prediction, count)):
            return read.drawn(self.generator), read.labels
        exact = prediction.detach().to(torch.promote_types(prediction.dtype, torch.float32))
        residual = draw_residual(exact, self.likelihood, self.reduction, self.generator) * scale  # which keeps fp16 from underflow
        if given is not None and self.likelihood == "categorical":
            residual, count = residual * (count / given), given
        return [(prediction, residual.to(prediction))], count


class InputMoment(Curvature):
    """H_jj = scale * E[x_j^2]: exact for a linear model whose loss is scale/2 times the mean squared error per sample.

    It knows nothing of the layers behind: for a deep regression network use :class:`SampledFisher` with likelihood
    "gaussian". Linear layers only.

    Args:
        scale: 1 for ||y - Xw||^2 / (2 n), 2 / outputs for ``nn.MSELoss``.
    """

    noise_limits = EXACT

    def __init__(self, scale: float = 1.0, decay: float = 0.9, every: int = 1) -> None:
        super().__init__(decay, every)
        self.scale = _checks.positive("scale", scale)

    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        known = self._observed(module, attachment)
        if self._groups is not None:
            raise ValueError("InputMoment knows the curvature of single weights; with groups use EmpiricalFisher or SampledFisher")
        for name in attachment.parameters:
            if not isinstance(known.get(name), nn.Linear):
                raise ValueError(f"InputMoment knows Linear layers only, {name!r} is none; use SampledFisher or select=['!{name}']")
            attachment.on_forward(known[name], partial(self._on_input, name))

    def _on_input(self, name: str, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._active and layer.training and inputs[0].numel():
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self._scale = 1.0
            self._add(name, (self.scale * (x * x).mean(0)).expand_as(layer.weight).clone())
