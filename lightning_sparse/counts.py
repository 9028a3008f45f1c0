"""What is counted about weights and keep probabilities: one rule for every figure that is logged, printed or saved.

Counts are Python integers, so 1e8 weights count exactly; shares are fractions in [0, 1]. Weights that share memory (tied
layers, also tied through a view such as a transpose) count once, under the first of their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

Counts = dict[str, tuple[int, int]]

LOG_ALPHA_FLOOR = -20.0  # log of a keep probability of 2e-9; below it the mask is zero for every purpose
BINS = 64
_CHUNK = 1 << 22  # elements binned at a time, to bound the memory of a histogram
_SMALLEST = 1e-30  # a range of |w| below this has no bins that float32 could tell apart


class Layer(NamedTuple):
    """One line of the per-layer table; ``keep_probability`` (mean alpha) is None where the form has none."""

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    sparsity: float
    keep_probability: float | None


class Histogram(NamedTuple):
    """``counts`` of B bins and their B + 1 ``edges``."""

    counts: list[int]
    edges: list[float]


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that do not repeat another's memory, in order: of tied ones the first stays."""
    seen: set[tuple[object, ...]] = set()
    kept = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel())
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            kept[name] = tensor
    return kept


def count_zeros(tensors: Mapping[str, Tensor], zeros: Mapping[str, Tensor] | None = None) -> Counts:
    """``{name: (zeros, size)}`` of tensors of any shape, tied ones once.

    A zero is an exact one: -0.0 is, NaN is not. ``zeros`` may give a boolean tensor per name that is True where a weight
    counts as zero (a threshold that has not been applied yet); then the values themselves do not matter.
    """
    found = {}
    for name, tensor in distinct(tensors).items():
        size = tensor.numel()
        count = int(zeros[name].count_nonzero()) if zeros is not None else size - int(tensor.detach().count_nonzero())
        found[name] = (count, size)
    return found


def share(counts: Counts) -> float:
    """Zeros over all weights, in [0, 1]; 0.0 where there is no weight at all."""
    return _ratio(sum(zeros for zeros, _ in counts.values()), sum(size for _, size in counts.values()))


def figures(counts: Counts) -> dict[str, float]:
    """The logged shares: ``sparsity/total`` and ``sparsity/<parameter name>``."""
    return {"sparsity/total": share(counts), **{f"sparsity/{name}": _ratio(*pair) for name, pair in counts.items()}}


def mean(tensors: Iterable[Tensor]) -> float:
    """Mean over all elements of all tensors (mean alpha, say); NaN where there is no element."""
    total, size = 0.0, 0
    for tensor in tensors:
        total += float(tensor.detach().sum(dtype=wide(tensor)))
        size += tensor.numel()
    return total / size if size else math.nan


def layers(weights: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> list[Layer]:
    """One :class:`Layer` per distinct weight; ``keep`` holds alpha by the same names and may lack some."""
    counts = count_zeros(weights)
    return [
        Layer(name, tuple(weights[name].shape), size, size - zeros, _ratio(zeros, size), mean([keep[name]]) if name in keep else None)
        for name, (zeros, size) in counts.items()
    ]


def log_alpha_histogram(keep: Iterable[Tensor], bins: int = BINS, floor: float = LOG_ALPHA_FLOOR) -> Histogram:
    """Histogram of log alpha over [floor, 0]; what lies below (alpha = 0 too) is counted in the first bin."""
    return histogram((alpha.detach().float().log().clamp(min=floor) for alpha in keep), floor, 0.0, bins)


def magnitude_histogram(weights: Iterable[Tensor], bins: int = BINS) -> Histogram:
    """Histogram of |w| over [0, max |w|], zeros in the first bin."""
    given = [weight.detach() for weight in weights]
    largest = max((_largest(weight) for weight in given), default=0.0)
    return histogram((weight.abs() for weight in given), 0.0, largest if largest > _SMALLEST else 1.0, bins)


def histogram(values: Iterable[Tensor], low: float, high: float, bins: int = BINS) -> Histogram:
    """Exact counts in ``bins`` equal bins over [low, high]; values outside fall in the outer bins, NaN and inf in none."""
    counts = torch.zeros(bins + 1, dtype=torch.int64)  # the last one takes what is not finite
    for tensor in values:
        for part in torch.split(tensor.detach().flatten(), _CHUNK):
            exact = part if part.dtype in (torch.float32, torch.float64) else part.float()
            index = ((exact - low) / (high - low) * bins).clamp(0, bins - 1)
            counts += torch.bincount(index.where(exact.isfinite(), bins).long(), minlength=bins + 1).cpu()
    return Histogram(counts[:bins].tolist(), [low + (high - low) * i / bins for i in range(bins + 1)])


def weight_in_use(module: nn.Module, name: str) -> tuple[str, Tensor]:
    """The name and value that the forward uses for parameter ``name`` of ``module``.

    Differs from the parameter where ``torch.nn.utils.prune`` (Lightning's ModelPruning) keeps ``weight_orig`` and a mask,
    and where a parametrisation computes ``weight``: both are reported as ``weight``, with the mask applied.
    Raises AttributeError for a name that the module lacks.
    """
    path, leaf = _plain(module, name)
    owner = module.get_submodule(path)
    with torch.no_grad():
        pruned = hasattr(owner, f"{leaf}_orig") and hasattr(owner, f"{leaf}_mask")
        value = getattr(owner, f"{leaf}_orig") * getattr(owner, f"{leaf}_mask") if pruned else getattr(owner, leaf)
    return f"{path}.{leaf}" if path else leaf, value.detach()


def _plain(module: nn.Module, name: str) -> tuple[str, str]:
    """The owning module's path and the attribute under which the forward reads parameter ``name``."""
    parts = name.split(".")
    if "parametrizations" in parts:
        parts = parts[: parts.index("parametrizations")] + [parts[parts.index("parametrizations") + 1]]
    path, leaf = ".".join(parts[:-1]), parts[-1]
    stem = leaf.removesuffix("_orig")
    return path, stem if hasattr(module.get_submodule(path), f"{stem}_mask") else leaf


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums over ``tensor`` are taken: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _largest(weight: Tensor) -> float:
    return float(weight.abs().nan_to_num(0.0, 0.0).max()) if weight.numel() else 0.0


def _ratio(zeros: int, size: int) -> float:
    return zeros / size if size else 0.0
