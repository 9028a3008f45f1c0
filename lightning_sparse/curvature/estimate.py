"""The exponential mean that every curvature estimate keeps, and the estimate from the training gradients.

H is the diagonal of the generalised Gauss-Newton matrix of the loss as it is averaged: over N labels, which are samples,
tokens or pixels. For a layer with input x and output gradient g of the batch's loss, H = N times the sum over samples of
(sum over positions of g x^T)^2.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_sparse import _checks, _output_curvature, elementwise
from lightning_sparse._construction import Constructed, typed
from lightning_sparse._group_curvature import GroupCurvature, observe
from lightning_sparse._labels import LabelCount, Labels, batch_size, graph_of_row
from lightning_sparse.layers import layers
from lightning_sparse.sample_gradients import Reduction, by_sample, squared_gradients
from lightning_sparse.state import check_curvature
from lightning_sparse.weights import Attachment

Reduce = Callable[[Tensor], Tensor]
CEILING, KEEP = 1.0, 0.97  # largest lam / H and smallest keep probability under which noise in a deep network costs what it should
EXACT = (10.0, 1e-3)  # the same where H is exact, or noise is not calibrated
_YOUNG = 3  # after n updates the past weighs at most n / (n + 3)
_MANY = 1 << 20  # updates of an estimate from a file that does not count them


class _Squares(NamedTuple):
    """The sum of ``used`` samples' squared gradients, of ``rows`` that there are: to be multiplied by the number of labels."""

    value: Tensor
    rows: int
    used: int


class Curvature(metaclass=Constructed):
    """An exponential mean of a diagonal curvature estimate, one tensor a weight, updated every ``every`` steps.

    Args:
        decay: weight of the past in the mean, per optimiser step; less early in a run, so that a mean over many steps forgets
            how the run began: after n updates at most n / (n + 3) at an update.
        every: optimiser steps between updates; between them nothing is recorded but for weights that the last update's batch
            did not use.
        samples: how many samples of a batch an update looks at where they are taken one by one.
        reduction: how the loss reduces over the batch, "mean" or "sum".
        labels: how many labels a "mean" averages over: None reads it from the loss (padding and ignore_index do not count); a
            whole number of labels a sample; or a function of the batch that returns their number in it. Where the loss cannot
            be read (it comes from compiled code, or backward() is called on it directly), None takes the batch's samples.

    Other layers than Linear and ConvNd, weights with several owners or calls, and compiled modules fall back to the batch
    gradient squared, times the number of labels for a mean: right up to the square of the full gradient, which vanishes at a
    minimum.
    """

    noise_limits: ClassVar[tuple[float, float]] = (CEILING, KEEP)  # AdaptiveMask's ceiling and alpha_min where none are given

    def __init__(
        self, decay: float = 0.99, every: int = 10, samples: int = 16, reduction: Reduction = "mean", labels: Labels = None
    ) -> None:
        self.decay = _checks.between("decay", decay, 0, 1, closed="l")
        self.every, self.samples = _checks.whole("every", every, 1), _checks.whole("samples", samples, 1)
        self.reduction = cast(Reduction, _checks.one_of("reduction", reduction, ("mean", "sum")))
        self.labels = labels if labels is None or callable(labels) else _checks.whole("labels", labels, 1)
        self.reset()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        return typed(self, self.settings())

    def reset(self) -> None:
        """Forget every estimate, before a new fit."""
        self.mean: dict[str, Tensor] = {}
        self.weight: dict[str, float] = {}
        self.factor = 1.0
        self.updates: dict[str, int] = {}
        self._pending: dict[str, Tensor | _Squares] = {}
        self._calls: dict[str, int] = {}  # of each layer in the batch that is being recorded
        self._done: set[str] = set()  # what an earlier backward of this batch gave an estimate for
        self._active = False
        self.is_due, self._step = False, -1  # this batch's update is of all weights
        self._met: set[str] = set()  # weights that the update of this step has an estimate for
        self._missed: set[str] = set()  # those that the last one had none for: the next batch that uses them makes up for it
        self._scale, self._batch = 1.0, 1
        self._count: LabelCount | None = None  # of a batch that was seen whole
        self._graphs: dict[int, Tensor] = {}  # by number of rows: the sample of each row, where samples are graphs
        self._doubt = ""
        self._told: set[str] = set()  # kinds of warnings
        self.fault = ""  # why H is not what it should be, once that was found
        self.generator: torch.Generator | None = None
        self._groups: GroupCurvature | None = None  # of weights that are masked together

    @abstractmethod
    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        """Install what records the batches' gradients."""

    def _observed(self, module: nn.Module, attachment: Attachment) -> Mapping[str, nn.Module]:
        """Return the layers that are observed, by the name of their weight; with groups of that of their first parameter."""
        self._groups = observe(attachment, module, self._wants)
        return layers(module, attachment.parameters) if self._groups is None else self._groups.layers

    def begin(self, step: int, batch: int = 1, scale: float = 1.0) -> None:
        """Before a batch: record it if ``step`` is due. ``scale`` is what the loss was multiplied by before backward."""
        self.is_due, self._batch, self._scale = step % self.every == 0, max(batch, 1), scale
        self._active = self.is_due or bool(self._missed)
        if step != self._step:
            self._step, self._met = step, set()
        self._count, self._graphs = None, {}  # ``batch`` is all that is known
        self._done.clear()

    def observe_batch(self, batch: Any) -> None:
        """After :meth:`begin`: the batch itself, which tells how many labels it has where the loss does not."""
        if self._active:
            self._batch, self._count = batch_size(batch) or 1, LabelCount(self.labels)
            self._count.begin(batch)
            self._graphs = graph_of_row(batch)

    def observe_loss(self, loss: Tensor) -> None:
        """Between forward and backward: the loss, whose backward tells how many labels it averages over."""
        if self._active and self._count is not None:
            self._count.listen(loss)

    def new_warnings(self) -> list[str]:
        """Return what the user should know of the estimate and was not told before."""
        name = type(self).__name__
        texts = {
            "doubt": f"{name} cannot read from the loss how many labels it averages over; {self._doubt}. If that is wrong, masks are "
            f"as much too strong: give the labels a sample, such as curvature={name}(labels=128), or a function of the batch that "
            "counts them; in manual optimisation call self.manual_backward(loss)",
            "fault": f"{name} draws gradients for this loss, but {self.fault}. H then comes from the "
            "training gradients, which vanish with the residual of a squared loss, and noise is stronger than it should be: use "
            "ReweightedPenalty, or a network without compiled parts and reentrant checkpoints",
        }
        new = {kind for kind, why in (("doubt", self._doubt), ("fault", self.fault)) if why} - self._told
        self._told |= new
        return [texts[kind] for kind in sorted(new)]

    def label_count(self) -> float:
        """The labels that this batch's loss averages over."""
        if self.reduction == "sum":
            return 1
        if self._count is None:
            return self._batch
        count = self._count.count(self._scale)
        self._doubt = self._doubt or self._count.doubt
        return count

    def before_backward(self, scale: float) -> None:
        """Between forward and backward, when the graph is alive; ``scale`` as in :meth:`begin`, now exact."""
        self._scale = scale

    def end(self, reduce: Reduce | None = None, parameters: Mapping[str, Tensor] | None = None, more: bool = False) -> None:
        """After backward: fold what was recorded into the mean; ``more`` backwards of the batch may record other weights.

        ``reduce`` averages a tensor over ranks; then every rank calls this after the same batches, with the same
        ``parameters``, and what a rank recorded nothing of (a layer that its batch did not use) is the mean of the others.
        """
        own = self._settled()
        found = self._agreed(own, reduce, parameters) if reduce and parameters and self._active else own.items()
        active, self._active = self._active, self._active and more
        past = self.decay**self.every
        for name, value in found:
            self._done.add(name)
            if elementwise.count_nonfinite({name: value}):  # of a step that is skipped, or that ends the run
                continue
            old, count = self.mean.get(name), self.updates.get(name, 0)
            keep = past if old is None else min(past, count / (count + _YOUNG))
            self.mean[name] = value * (1 - keep) if old is None else old.mul_(keep).add_(value, alpha=1 - keep)
            self.weight[name], self.updates[name] = keep * self.weight.get(name, 0.0) + 1 - keep, count + 1
        if active and not more:
            self._met |= self._done
            self._missed -= self._done
            if self.is_due and parameters:
                self._missed = {name for name, p in parameters.items() if p.requires_grad and name not in self._met}
        self._pending.clear()
        self._calls.clear()
        if self._count is not None:
            self._count.forget()

    def _settled(self) -> dict[str, Tensor]:
        """What was recorded, now that backward has told how many labels there are."""
        for name, squares in () if self._groups is None else self._groups.settled().items():
            self._add_squares(name, *squares)
        count = self.label_count() if any(isinstance(part, _Squares) for part in self._pending.values()) else 1.0
        return {
            name: part.value * (count * part.rows / part.used) / self._scale**2 if isinstance(part, _Squares) else part
            for name, part in self._pending.items()
        }

    def _agreed(self, recorded: Mapping[str, Tensor], reduce: Reduce, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The mean over the ranks that recorded something, name by name in an order that all ranks share."""
        device = next(iter(parameters.values())).device
        shares = reduce(torch.tensor([float(name in recorded) for name in parameters], device=device)).tolist()
        for (name, parameter), share in zip(parameters.items(), shares, strict=True):
            if share > 0:
                own = recorded.get(name)
                yield name, reduce(torch.zeros_like(parameter) if own is None else own.detach().to(parameter.dtype)) / share

    def estimate(self, name: str) -> Tensor | None:
        """H_jj >= 0 of a parameter, None before the first update."""
        if name not in self.mean:
            return None
        mean, weight = self.mean[name], self.weight[name]
        return mean if weight == self.factor == 1 else mean * (self.factor / weight)

    def scale_by(self, factor: float) -> None:
        """Multiply every estimate by ``factor`` from here on, in the place of an earlier factor."""
        self.factor = factor

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that continue the estimate exactly."""
        missed = {"missed": sorted(self._missed)} if self._missed else {}
        means = {name: value.clone() for name, value in self.mean.items()}
        return {"mean": means, "weight": dict(self.weight), "updates": dict(self.updates)} | missed

    def check_state(self, state: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise ValueError unless ``state`` is a :meth:`state_dict` of these parameters (of any, where there are none yet)."""
        check_curvature(state, parameters)

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Continue from :meth:`state_dict`, on the parameters' devices."""
        self.mean = {name: value.to(parameters[name].device, copy=True) for name, value in state["mean"].items()}
        self.weight = dict(state["weight"])
        self.updates = dict.fromkeys(self.mean, _MANY) | dict(state.get("updates", {}))
        self._missed = set(state.get("missed", ())) & parameters.keys()

    def _wants(self, name: str) -> bool:
        """This batch's gradient of a weight is to be recorded."""
        return self._active and name not in self._done and (self.is_due or name in self._missed)

    def _add(self, name: str, value: Tensor) -> None:
        """``value`` is H_jj of this batch, times the square of what the loss was multiplied by."""
        if self._wants(name):
            self._pending[name] = value / self._scale**2
            self._calls[name] = self._calls.get(name, 0) + 1

    def _add_squares(self, name: str, value: Tensor, rows: int = 1, used: int = 1) -> None:
        """``value`` is the sum over ``used`` of ``rows`` samples of the squared gradient of the batch's loss in each."""
        if self._wants(name):
            if used:  # a layer that got no rows tells nothing
                self._pending[name] = _Squares(value, rows, used)
            self._calls[name] = self._calls.get(name, 0) + 1


def calibrated(eta: Tensor, curvature: Tensor, lam: float | Tensor, ceiling: float) -> Tensor:
    """eta_j max(H_jj, lam / ceiling): with it in the place of eta_j, noise of strength lam realises lam * Omega.

    ``ceiling`` bounds lam / H_jj: where the loss hardly curves, the noise stays below that of an uncalibrated mask of
    that strength.
    """
    return curvature.clamp(min=lam / ceiling).mul_(eta)


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
        for name in attachment.parameters if self._groups is None else ():  # groups record their own
            attachment.on_gradient(name, partial(self._on_gradient, name))

    def reset(self) -> None:
        super().reset()
        self._parameters: dict[str, nn.Parameter] = {}
        self._outputs: list[Tensor] = []  # of the layers that are recorded
        self._loss: Tensor | None = None
        self._is_drawn = False  # this batch's H comes from drawn gradients, and the training gradients are not recorded

    def begin(self, step: int, batch: int = 1, scale: float = 1.0) -> None:
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
            if not inputs:  # a loss that the selected weights have no part in, as a discriminator's on detached samples
                return
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
        if not self._is_drawn and self._wants(name) and self._calls.get(name, 0) != 1:  # one call was read at the layer, before this
            self._pending.pop(name, None)
            self._add_squares(name, grad.detach() ** 2)

    def _on_output_gradient(self, name: str, layer: nn.Module, x: Tensor, grad: Tensor) -> None:
        # (T, B, ...) of a batch of B samples, told by the length of the batch's own first tensor, unless T = B
        if isinstance(layer, nn.Linear) and x.dim() > 2 and len(x) != self._batch == x.shape[1]:
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
