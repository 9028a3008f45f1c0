"""torchmetrics metrics of a sparse network.

Each metric is a ratio. Numerator and denominator are both summed over ranks, so all ranks return the same value and replicated
weights are not counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sparse import _checks, counts, elementwise
from lightning_sparse.masked_loss import duality_gap, duality_gap_samples

__all__ = ["Compression", "DualityGap", "KeepProbability", "Sparsity", "duality_gap", "duality_gap_samples"]

Tensors = Mapping[str, Tensor] | Iterable[Tensor] | Tensor


def _named(tensors: Tensors) -> dict[str, Tensor]:
    if isinstance(tensors, Tensor):
        return {"0": tensors}
    _checks.tensors(tensors, "metric(weights)", listed=True)
    named = dict(tensors) if isinstance(tensors, Mapping) else {str(i): tensor for i, tensor in enumerate(tensors)}
    wrong = next((value for value in named.values() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise TypeError(f"expected tensors, a mapping of names to tensors or one tensor, got a {type(wrong).__name__} among them")
    return named


class _Plotted(Metric):
    """Base class of the metrics: not differentiable, with ``plot``."""

    is_differentiable = False
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot ``val`` with torchmetrics: a result of ``compute``, a list of results over time, or None to compute now."""
        return self._plot(val, ax)


class Sparsity(_Plotted):
    """Share of exact zeros among the weights, in [0, 1]. Tied weights count once.

    ``update`` takes a mapping of names to tensors (``select.select(module, None)`` returns one), an iterable of tensors, or
    one tensor. ``compute`` returns a scalar, or with ``per_parameter`` a dict of ``total`` and one entry per name. Several
    updates are averaged. Lightning resets a logged metric at the end of each epoch. Raises ValueError if the names change
    before ``reset``.

    Args:
        per_parameter: also compute the share of each parameter.
        kwargs: the arguments of torchmetrics.Metric.
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    zeros: Tensor
    sizes: Tensor

    def __init__(self, per_parameter: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.per_parameter = per_parameter
        self.names: tuple[str, ...] = ()
        self.add_state("zeros", torch.tensor(0), dist_reduce_fx="sum")  # one count per name after the first update
        self.add_state("sizes", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, weights: Tensors) -> None:
        """Count the zeros of ``weights``."""
        by_name = counts.count_zeros(_named(weights))
        pairs = torch.tensor([*by_name.values()], dtype=torch.int64, device=self.zeros.device).reshape(-1, 2)
        if self.zeros.dim() and self.names != tuple(by_name):
            raise ValueError(f"the weights were {list(self.names)} before and are {list(by_name)} now; call reset() in between")
        self.names = tuple(by_name)
        self.zeros, self.sizes = self.zeros + pairs[:, 0], self.sizes + pairs[:, 1]

    def compute(self) -> Tensor | dict[str, Tensor]:
        total = _share(self.zeros.sum(), self.sizes.sum())
        if not self.per_parameter:
            return total
        return {"total": total, **dict(zip(self.names, _share(self.zeros, self.sizes), strict=True))}


class Compression(_Plotted):
    """Number of weights divided by number of non-zero weights, >= 1. Tied weights count once.

    inf if all weights are zero, 1 before the first update. It does not measure memory or time, because zeros in a dense
    tensor cost as much as other values. Input as in :class:`Sparsity`.

    Args:
        kwargs: the arguments of torchmetrics.Metric.
    """

    higher_is_better = True
    plot_lower_bound = 1.0
    nonzero: Tensor
    size: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nonzero", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("size", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, weights: Tensors) -> None:
        """Count the non-zeros of ``weights``."""
        for zeros, size in counts.count_zeros(_named(weights)).values():
            self.nonzero = self.nonzero + (size - zeros)
            self.size = self.size + size

    def compute(self) -> Tensor:
        empty = self.size == 0
        return torch.where(empty, 1.0, self.size.double() / self.nonzero)  # float64 is exact up to 1e15 weights


class KeepProbability(_Plotted):
    """Mean keep probability alpha over all weights, in [0, 1]. NaN before the first update. Input as in :class:`Sparsity`.

    Args:
        kwargs: the arguments of torchmetrics.Metric.
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    total: Tensor
    size: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("size", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, alpha: Tensors) -> None:
        """Add the keep probabilities ``alpha``. Raises ValueError if one lies outside [0, 1]."""
        for name, tensor in _named(alpha).items():
            part = elementwise.local_part(tensor.detach())
            if int(elementwise.sum_shards(((part < 0) | (part > 1) | part.isnan()).count_nonzero(), tensor)):  # the same on every rank
                full = elementwise.full_tensor(tensor.detach())
                raise ValueError(f"keep probabilities lie in [0, 1]; those of {name!r} reach from {full.min():g} to {full.max():g}")
            self.total = self.total + elementwise.sum_shards(part.sum(dtype=torch.float64), tensor).to(self.total.device)
            self.size = self.size + tensor.numel()

    def compute(self) -> Tensor:
        return self.total / self.size


class DualityGap(_Plotted):
    """Mean of duality gaps E_s L(s * w) - L(w) - (lam / 2) sum w^2 / eta_hat, as :func:`duality_gap` returns for a batch.

    The mean is over the values of all ranks, because ranks see different batches. NaN before the first update.

    Args:
        kwargs: the arguments of torchmetrics.Metric.
    """

    higher_is_better = None
    total: Tensor
    size: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("size", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, gap: float | Tensor | Sequence[float]) -> None:
        """Add one value or several."""
        values = torch.as_tensor(gap, dtype=torch.float64, device=self.total.device).detach()
        self.total = self.total + values.sum()
        self.size = self.size + values.numel()

    def compute(self) -> Tensor:
        return self.total / self.size


def _share(zeros: Tensor, sizes: Tensor) -> Tensor:
    return zeros.double() / sizes.clamp(min=1)
