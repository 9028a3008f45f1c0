"""How a loss curves in the network's outputs, read from its graph: what a squared loss's H is drawn from.

A loss is L = sum over labels i of k_i l(z_i), with k_i = 1/N for a mean over N. A backward pass from d_i = sqrt(k_i c_i) x_i, with c_i the
curvature of l and x_i a draw of mean 0 and variance 1, gives each weight a gradient whose square has the mean sum k_i c_i (dz_i/dw)^2.
That is the diagonal of the generalised Gauss-Newton matrix, for any layers between, whatever the residuals are. The training
gradients' squares would have the squared residuals in the place of c_i.

====================  ==============================================================================================
loss                  c, the curvature per label
====================  ==============================================================================================
(z - y)^2             2
Huber, smooth L1      l'(r) / r: the exact curvature within delta (beta), less and less outside, never 0
|z - y|               1 / mean |r|, twice the density of the residuals at 0 if they follow a Laplace distribution
cross-entropy         a label is drawn from the model in the place of x_i
binary cross-entropy  p (1 - p)
====================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_sparse._labels import Place, log_softmax_dim, log_softmax_shares, places
from lightning_sparse.noise import normal_like

Start = tuple[Tensor, Tensor]  # a tensor of the loss's graph, and the gradient that a backward pass starts from there
_SMALLEST = 1e-12


def drawn(loss: Tensor, scale: float, generator: torch.Generator | None = None) -> list[Start] | None:
    """Return where a backward pass for H starts, for a loss that was multiplied by ``scale``; the gradients are, too.

    None where the training gradients serve (a negative log-likelihood), or the loss is of a kind that is not known.
    """
    found = places(loss)
    if not any(place.kind in _RESIDUALS or _is_square(place) for place in found):
        return None
    outputs = [_output(place) for place in found]
    if any(output is None for output in outputs):
        return None
    above = torch.autograd.grad(loss, [GradientEdge(place.node, 0) for place in found], retain_graph=True, allow_unused=True)
    return [
        (output, _start(place, output, grad.detach(), scale, generator))
        for place, output, grad in zip(found, outputs, above, strict=True)
        if grad is not None and output is not None
    ]


def _is_square(place: Place) -> bool:
    """Return True for r ** 2, or r * r."""
    if place.kind == "Mul":
        first, *others = place.node.next_functions
        return bool(others == [first])
    return place.kind == "Pow" and bool(getattr(place.node, "_saved_exponent", None) == 2)


def _output(place: Place) -> Tensor | None:
    """Return the tensor that the loss uses there; None for another kind of loss."""
    if place.kind == "LogSoftmax":
        logs: Tensor = place.node._saved_result
        return logs
    if place.kind not in _CURVATURES and not _is_square(place):
        return None
    both = [getattr(place.node, f"_saved_{name}", None) for name in ("self", "target")]
    return next((tensor for tensor in both if isinstance(tensor, Tensor) and tensor.requires_grad), None)


def _start(place: Place, output: Tensor, above: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
    exact = torch.promote_types(output.dtype, torch.float32)
    value, above = output.detach().to(exact), above.to(exact)
    if place.kind == "LogSoftmax":
        return _drawn_label(value, log_softmax_shares(place.node, above), log_softmax_dim(place.node), scale, generator).to(output)
    if place.kind in _REDUCED and place.node._saved_reduction == 1:
        above = above / value.numel()
    curvature = torch.full_like(value, 2.0) if _is_square(place) else _CURVATURES[place.kind](place.node, value)
    size = (scale * above.abs() * curvature).sqrt()  # above = scale * k
    return (size * normal_like(size, generator)).to(output)


def _drawn_label(logs: Tensor, sizes: Tensor, dim: int, scale: float, generator: torch.Generator | None) -> Tensor:
    chance = logs.movedim(dim, -1).exp()
    label = torch.multinomial(chance.reshape(-1, chance.shape[-1]), 1, generator=generator).reshape(*chance.shape[:-1], 1)
    size = (scale * sizes).sqrt().unsqueeze(-1).to(chance)
    return torch.zeros_like(chance).scatter_(-1, label, -size).movedim(-1, dim)


def _residual(node: Any, value: Tensor) -> Tensor:
    target: Tensor = node._saved_target if not node._saved_target.requires_grad else node._saved_self
    return (value - target.detach().to(value)).abs()


def _huber(node: Any, value: Tensor) -> Tensor:
    return node._saved_delta / _residual(node, value).clamp(min=node._saved_delta)  # type: ignore[no-any-return]


def _smooth(node: Any, value: Tensor) -> Tensor:
    size = _residual(node, value)
    return 1 / size.clamp(min=node._saved_beta if node._saved_beta > 0 else float(size.mean().clamp(min=_SMALLEST)))


def _absolute(node: Any, value: Tensor) -> Tensor:
    return torch.ones_like(value) / value.abs().mean().clamp(min=_SMALLEST)


def _binary(node: Any, value: Tensor) -> Tensor:
    chance = value.sigmoid()
    curvature = chance * (1 - chance)
    if node._saved_pos_weight is not None:
        curvature = curvature * (1 + (node._saved_pos_weight - 1) * node._saved_target)
    return curvature if node._saved_weight is None else curvature * node._saved_weight


def _binary_of_chance(node: Any, value: Tensor) -> Tensor:
    curvature = 1 / (value * (1 - value)).clamp(min=1e-6)
    return curvature if node._saved_weight is None else curvature * node._saved_weight


_RESIDUALS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "MseLoss": lambda node, value: torch.full_like(value, 2.0),
    "HuberLoss": _huber,
    "SmoothL1Loss": _smooth,
    "Abs": _absolute,
}
_CURVATURES = _RESIDUALS | {"BinaryCrossEntropyWithLogits": _binary, "BinaryCrossEntropy": _binary_of_chance}
_REDUCED = ("MseLoss", "HuberLoss", "SmoothL1Loss", "BinaryCrossEntropyWithLogits", "BinaryCrossEntropy")
