"""Per-sample weight gradients, squared and summed, and residuals drawn from the model: what curvature is estimated from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

Reduction = Literal["mean", "sum"]


def squared_gradients(layer: Any, x: Tensor, grad: Tensor, samples: int) -> tuple[Tensor, int]:
    """Sum over the batch's samples of (the sample's weight gradient)^2, and how many samples that took.

    ``x`` (B, ..., in) and ``grad`` (B, ..., out) of a Linear layer, or (B, C, ...) of a ConvNd. A Linear layer without
    positions takes the whole batch in one product; otherwise positions are summed before squaring, sample by sample.
    """
    x, grad = (x, grad) if x.dtype == grad.dtype == layer.weight.dtype else (x.to(layer.weight), grad.to(layer.weight))
    if isinstance(layer, nn.Linear) and x.dim() == 2:
        return (grad * grad).t() @ (x * x), len(x)
    used = min(len(x), samples)
    total = torch.zeros_like(layer.weight)
    for i in range(used):
        one = _linear_gradient(x[i], grad[i]) if isinstance(layer, nn.Linear) else _conv_gradient(layer, x[i : i + 1], grad[i : i + 1])
        total.addcmul_(one, one)
    return total, used


def each_gradient(layer: Any, attribute: str, x: Tensor, grad: Tensor, samples: int) -> Iterator[Tensor]:
    """Yield each of the first ``samples`` samples' gradient of a layer's "weight" or "bias"; batch norm's layers too."""
    w = getattr(layer, attribute)
    x, grad = x.to(w), grad.to(w)
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        x = _normalised(layer, x)
    for i in range(min(len(x), samples)):
        if attribute == "bias":
            yield grad[i].sum([dim for dim in range(grad.dim() - 1) if dim != _channel(layer, grad)])
        elif isinstance(layer, nn.Linear):
            yield _linear_gradient(x[i], grad[i])
        elif isinstance(layer, _CONVOLUTIONS):
            yield _conv_gradient(layer, x[i : i + 1], grad[i : i + 1])
        else:
            yield (grad[i] * x[i]).flatten(1).sum(1) if x.dim() > 2 else grad[i] * x[i]


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _channel(layer: Any, grad: Tensor) -> int:
    """Return the dimension of the channels in one sample's gradient."""
    return grad.dim() - 2 if isinstance(layer, nn.Linear) else 0


def _normalised(layer: Any, x: Tensor) -> Tensor:
    """Return what a batch norm layer multiplies by its weight."""
    own = layer.training or layer.running_mean is None
    mean, variance = (None, None) if own else (layer.running_mean, layer.running_var)
    return functional.batch_norm(x, mean, variance, training=own, eps=layer.eps)


def by_sample(rows: Tensor, sample: Tensor) -> Tensor:
    """Rows (N, D) of samples of different lengths as (B, T, D), with zeros after the rows of a sample that has fewer than T.

    ``sample`` (N) numbers the sample of each row from 0.
    """
    order = sample.argsort(stable=True)
    sizes = sample.bincount()
    place = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[sample[order]]
    found = rows.new_zeros(len(sizes), int(sizes.max()), rows.shape[1])
    found[sample[order], place] = rows[order]
    return found


def _linear_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _conv_gradient(layer: Any, x: Tensor, grad: Tensor) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.kernel_size)
    weight_gradient = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}[len(layer.kernel_size)]
    gradient: Tensor = weight_gradient(x, layer.weight.shape, grad, layer.stride, padding, layer.dilation, layer.groups)  # type: ignore[no-untyped-call]
    return gradient


def label_places(prediction: Tensor) -> int:
    """Labels that a prediction with its classes on dimension 1 can be compared with."""
    return prediction.shape[0] * math.prod(prediction.shape[2:])


def draw_residual(prediction: Tensor, likelihood: str, reduction: Reduction, generator: torch.Generator | None = None) -> Tensor:
    """dL/d prediction with the target drawn from the model: one draw whose square has the loss's curvature as its mean."""
    count = label_places(prediction) if likelihood == "categorical" else prediction.numel()
    share = 1.0 / count if reduction == "mean" else 1.0
    if likelihood == "categorical":
        chance = prediction.movedim(1, -1).softmax(-1)
        label = torch.multinomial(chance.reshape(-1, chance.shape[-1]), 1, generator=generator).reshape(chance.shape[:-1])
        return share * (chance - functional.one_hot(label, chance.shape[-1])).movedim(-1, 1)
    per_sample = prediction[0].numel() if reduction == "mean" else 1
    batch_share = 1.0 / len(prediction) if reduction == "mean" else 1.0
    return batch_share * math.sqrt(2.0 / per_sample) * torch.empty_like(prediction).normal_(generator=generator)
