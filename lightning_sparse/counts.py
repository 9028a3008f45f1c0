"""Counts and histograms of weights and keep probabilities, used for every figure that is logged, printed or saved.

Counts are Python integers, so 1e8 weights are counted exactly. Shares are fractions in [0, 1]. Weights that share memory (tied
layers, also tied through a view such as a transpose) count once, under their first name. Weights sharded over processes
(FSDP2) give the counts of the full tensor on every rank; each function is then a collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse import elementwise

Counts = dict[str, tuple[int, int]]

LOG_ALPHA_FLOOR = -20.0  # log of a keep probability of 2e-9; below it the mask is practically always zero
BINS = 64
_CHUNK = 1 << 22  # elements per chunk, to bound the memory of a histogram
_SMALLEST = 1e-30  # float32 cannot tell the bins of a smaller range of |w| apart


class Layer(NamedTuple):
    """One line of the per-layer table. ``keep_probability`` (mean alpha) is None for a method without one."""

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    sparsity: float
    keep_probability: float | None


class Histogram(NamedTuple):
    """The ``counts`` of B bins and the B + 1 ``edges`` of the bins."""

    counts: list[int]
    edges: list[float]


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without duplicates in memory, in order: of tied tensors only the first."""
    seen: set[tuple[object, ...]] = set()
    first = {}
    for name, tensor in tensors.items():
        key = _memory(tensor)
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            first[name] = tensor
    return first


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Return a key for the memory of the elements."""
    # the storage object is part of the key because a rank's shard may be empty and then has no data pointer
    part = elementwise.local_part(tensor.detach())
    storage = part.untyped_storage()
    return tensor.device, storage.data_ptr() or storage._cdata, part.storage_offset(), tensor.numel()


def count_zeros(tensors: Mapping[str, Tensor], zeros: Mapping[str, Tensor] | None = None) -> Counts:
    """Count zeros: ``{name: (zeros, size)}`` of tensors of any shape, tied tensors once.

    Only exact zeros count: -0.0 does, NaN does not. ``zeros`` is an optional boolean zero mask per name (for a threshold not yet
    applied); the values of ``tensors`` are then ignored.
    """
    result = {}
    for name, tensor in distinct(tensors).items():
        size = tensor.numel()
        nonzero = _nonzero(tensor if zeros is None else zeros[name])
        result[name] = (size - nonzero if zeros is None else nonzero, size)
    return result


def _nonzero(tensor: Tensor) -> int:
    return int(elementwise.sum_shards(elementwise.local_part(tensor.detach()).count_nonzero(), tensor))


def share(counts: Counts) -> float:
    """Return the share of zeros among all weights, in [0, 1]; 0.0 if there are no weights."""
    return _ratio(sum(zeros for zeros, _ in counts.values()), sum(size for _, size in counts.values()))


def figures(counts: Counts) -> dict[str, float]:
    """Return the logged shares of zeros: ``sparsity/total`` and ``sparsity/<parameter name>``."""
    return {"sparsity/total": share(counts), **{f"sparsity/{name}": _ratio(*pair) for name, pair in counts.items()}}


def group_figures(left: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Return the logged shares of zero groups, ``sparsity/groups`` and ``sparsity/groups/<name>``; empty without groups.

    ``left`` holds (groups that are not zero, groups) by the name of a set of groups.
    """
    live, count = (sum(column) for column in zip(*left.values(), strict=True)) if left else (0, 0)
    shares = {f"sparsity/groups/{name}": 1 - live / count for name, (live, count) in left.items()}
    return {"sparsity/groups": 1 - live / count, **shares} if count else {}


def mean(tensors: Iterable[Tensor]) -> float:
    """Return the mean over all elements of all tensors (for example mean alpha); NaN if there are no elements."""
    total, size = 0.0, 0
    for tensor in tensors:
        total += float(elementwise.sum_shards(elementwise.local_part(tensor.detach()).sum(dtype=wide(tensor)), tensor))
        size += tensor.numel()
    return total / size if size else math.nan


def layers(weights: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> list[Layer]:
    """Return one :class:`Layer` per distinct weight. ``keep`` maps the same names to alpha and may lack some of them."""
    counts = count_zeros(weights)
    return [
        Layer(name, tuple(weights[name].shape), size, size - zeros, _ratio(zeros, size), mean([keep[name]]) if name in keep else None)
        for name, (zeros, size) in counts.items()
    ]


def log_alpha_histogram(keep: Iterable[Tensor], bins: int = BINS, floor: float = LOG_ALPHA_FLOOR) -> Histogram:
    """Return the histogram of log alpha over [floor, 0]. Values below ``floor`` (alpha = 0 too) count in the first bin."""
    logs = (elementwise.map_shards(lambda part: part.float().log().clamp(min=floor), alpha) for alpha in keep)
    return histogram(logs, floor, 0.0, bins)


def magnitude_histogram(weights: Iterable[Tensor], bins: int = BINS) -> Histogram:
    """Return the histogram of |w| over [0, max |w|], zeros in the first bin."""
    detached = [weight.detach() for weight in weights]
    largest = max((_largest(weight) for weight in detached), default=0.0)
    return histogram((elementwise.map_shards(torch.abs, weight) for weight in detached), 0.0, largest if largest > _SMALLEST else 1.0, bins)


def histogram(values: Iterable[Tensor], low: float, high: float, bins: int = BINS) -> Histogram:
    """Count values exactly in ``bins`` equal bins over [low, high]. Values outside count in the outer bins, NaN and inf in none."""
    counts = torch.zeros(bins + 1, dtype=torch.int64)  # the last bin counts NaN and inf
    for tensor in values:
        parts = torch.split(elementwise.local_part(tensor.detach()).flatten(), _CHUNK)
        counts += elementwise.sum_shards(torch.stack([_binned(part, low, high, bins) for part in parts]).sum(0), tensor).cpu()
    return Histogram(counts[:bins].tolist(), [low + (high - low) * i / bins for i in range(bins + 1)])


def _binned(part: Tensor, low: float, high: float, bins: int) -> Tensor:
    exact = part if part.dtype in (torch.float32, torch.float64) else part.float()
    index = ((exact - low) / (high - low) * bins).clamp(0, bins - 1)
    return torch.bincount(index.where(exact.isfinite(), bins).long(), minlength=bins + 1)


def weight_in_use(module: nn.Module, name: str) -> tuple[str, Tensor]:
    """Return the name and value that the forward uses for parameter ``name`` of ``module``.

    They differ from the parameter under ``torch.nn.utils.prune`` (Lightning's ModelPruning), which stores ``weight_orig`` and a
    mask, and under a parametrisation, which computes ``weight``. Both are returned as ``weight``, with the mask applied.
    Raises AttributeError for an unknown name.
    """
    path, leaf = _plain(module, name)
    owner = module.get_submodule(path)
    with torch.no_grad(), _still(owner):
        pruned = hasattr(owner, f"{leaf}_orig") and hasattr(owner, f"{leaf}_mask")
        value = getattr(owner, f"{leaf}_orig") * getattr(owner, f"{leaf}_mask") if pruned else getattr(owner, leaf)
    return f"{path}.{leaf}" if path else leaf, value.detach()


@contextmanager
def _still(owner: nn.Module) -> Iterator[None]:
    """Put parametrisations in evaluation mode for a while."""
    # because spectral_norm in training mode updates its estimate each time the weight is read
    lists = getattr(owner, "parametrizations", None)
    training = [part for part in lists.modules() if part.training] if isinstance(lists, nn.Module) else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _plain(module: nn.Module, name: str) -> tuple[str, str]:
    """Return the path of the owning module and the attribute by which the forward reads parameter ``name``."""
    parts = name.split(".")
    if "parametrizations" in parts:
        parts = parts[: parts.index("parametrizations")] + [parts[parts.index("parametrizations") + 1]]
    path, leaf = ".".join(parts[:-1]), parts[-1]
    stem = leaf.removesuffix("_orig")
    return path, stem if hasattr(module.get_submodule(path), f"{stem}_mask") else leaf


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype for sums over ``tensor``: float64, or float32 on MPS because MPS has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _largest(weight: Tensor) -> float:
    part = elementwise.local_part(weight)
    size = part.abs().nan_to_num(0.0, 0.0).max() if part.numel() else part.new_zeros(())
    return float(elementwise.max_shards(size, weight))


def _ratio(zeros: int, size: int) -> float:
    return zeros / size if size else 0.0
