r"""Estimates of H_jj, the curvature that calibrates the mask form: (1 - alpha_j) / alpha_j = lam / (H_jj eta_j).

H is the diagonal of the generalised Gauss-Newton matrix of the loss as it is averaged: over N labels, which are samples,
tokens or pixels. For a layer with input x and output gradient g of the batch's loss, H = N times the sum over samples of
(sum over positions of g x^T)^2: the gradients of a sample's labels are summed before they are squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_sparse import _checks, _output_curvature
from lightning_sparse._curvature import EXACT, Curvature, Reduce, calibrated
from lightning_sparse._labels import Labels, read_categorical
from lightning_sparse.sample_gradients import Reduction, by_sample, draw_residual, label_places, squared_gradients
from lightning_sparse.weights import Attachment

__all__ = ["Curvature", "EmpiricalFisher", "InputMoment", "SampledFisher", "calibrated"]


class EmpiricalFisher(Curvature):
    """H from the training gradients themselves: free of extra passes, and fit for negative log-likelihoods.

    For a squared loss they vanish with the residual. Where the loss's graph shows one (a square, MSELoss, HuberLoss, SmoothL1Loss or
    L1Loss, alone or beside others), H comes from one more backward pass in the steps that update it, from gradients in the
    network's outputs that are drawn with the loss's curvature: the Gauss-Newton diagonal without bias, for weights on the fall-back path,
    too (of Huber and L1 losses with l'(r) / r, see ``_output_curvature``). Where the graph shows none, as in compiled code
    or with a backward() that is called on the loss directly, use :class:`InputMoment` or :class:`SampledFisher` for a squared loss.
    Samples lie along dimension 0 of a layer's input; along dimension 1 of a Linear layer's where only that is as long as the
    batch's first tensor. Where the batch itself is sequence-first, (T, B), each step of it is taken for a sample. Of a
    torch_geometric batch each graph is a sample, also for layers whose rows are its nodes or edges.
    """

    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        for name, layer in self._observed(module, attachment).items():
            attachment.on_forward(layer, partial(self._on_forward, name))
        self._parameters.update(attachment.parameters if self._groups is None else self._groups.parameters)
        self._attach_fallback(attachment)

    def reset(self) -> None:
        super().reset()
        self._parameters: dict[str, nn.Parameter] = {}
        self._outputs: list[Tensor] = []  # of the layers that are recorded
        self._loss: Tensor | None = None
        self._is_drawn = False  # this batch's H comes from drawn gradients, and the training gradients are not recorded

    def begin(self, step: int, batch: int, scale: float = 1.0) -> None:
        super().begin(step, batch, scale)
        self._outputs, self._loss, self._is_drawn = [], None, False

    def observe_loss(self, loss: Tensor) -> None:
        super().observe_loss(loss)
        self._loss = loss if self._active else None

    def before_backward(self, scale: float) -> None:
        super().before_backward(scale)
        loss, outputs, self._loss, self._outputs = self._loss, self._outputs, None, []
        starts = None if loss is None or not loss.requires_grad else _output_curvature.drawn(loss, scale, self.generator)
        if starts:
            wanted = [name for name in self._parameters if self._groups is not None or self._wants(name)]
            inputs = outputs + [self._parameters[name] for name in wanted if self._parameters[name].requires_grad]
            try:
                torch.autograd.grad([at for at, _ in starts], inputs, [grad for _, grad in starts], retain_graph=True, allow_unused=True)
            except RuntimeError as error:  # compiled code and reentrant checkpoints allow a single backward
                self.fault = f"a second backward pass ends in {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            else:
                self._is_drawn = True

    def label_count(self) -> float:
        return 1 if self._is_drawn else super().label_count()  # the drawn gradients are divided by it already

    def end(self, reduce: Reduce | None = None, parameters: Mapping[str, Tensor] | None = None, more: bool = False) -> None:
        super().end(reduce, parameters, more)
        self._is_drawn, self._outputs, self._loss = False, [], None

    def _on_forward(self, name: str, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._wants_layer(name) and output.requires_grad and layer.weight.requires_grad:
            x = inputs[0].detach()
            self._outputs.append(output)
            output.register_hook(lambda grad: None if self._is_drawn else self._on_output_gradient(name, layer, x, grad.detach()))

    def _wants(self, name: str) -> bool:
        return not (self._is_drawn and self._groups is not None) and super()._wants(name)

    def _on_gradient(self, name: str, grad: Tensor) -> None:
        if not self._is_drawn:
            super()._on_gradient(name, grad)

    def _on_output_gradient(self, name: str, layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        if self._is_sequence_first(layer, x):
            x, grad = x.transpose(0, 1), grad.transpose(0, 1)
        if x.dim() < (2 if isinstance(layer, nn.Linear) else cast(nn.Parameter, layer.weight).dim()):  # one sample, not in a batch
            x, grad = x[None], grad[None]
        if isinstance(layer, nn.Linear) and x.dim() == 2 and (sample := self._graphs.get(len(x))) is not None:
            x, grad = by_sample(x, sample), by_sample(grad, sample)
        if self._groups is not None:
            self._groups.add(name, layer, x, grad, self.samples)
            return
        value, used = squared_gradients(layer, x, grad, self.samples)
        self._add_squares(name, value, len(x), used)

    def _wants_layer(self, name: str) -> bool:
        return self._wants(name) if self._groups is None else self._groups.wants_layer(name)

    def _is_sequence_first(self, layer: nn.Module, x: Tensor) -> bool:
        """(T, B, ...) of a batch of B samples: seen by the length of the batch's own first tensor, unless T = B."""
        return isinstance(layer, nn.Linear) and x.dim() > 2 and len(x) != self._batch == x.shape[1]


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
        known = self._observed(module, attachment)
        modules = dict(module.named_modules())
        if self.output not in modules:
            raise ValueError(f"curvature output {self.output!r} is no module of the model{_checks.closest(self.output, modules)}")
        for name, layer in known.items():
            attachment.on_forward(layer, partial(self._on_forward, name))
        attachment.on_forward(modules[self.output], lambda layer, inputs, output: self._on_prediction(output))
        self._attach_fallback(attachment)

    def _on_forward(self, name: str, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._wants_layer(name) and output.requires_grad and layer.weight.requires_grad:
            self._seen.append((name, layer, inputs[0].detach(), output))

    def _on_prediction(self, output: Any) -> None:
        if self._active and isinstance(output, Tensor) and output.requires_grad:
            self._prediction = output

    def begin(self, step: int, batch: int, scale: float = 1.0) -> None:
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
