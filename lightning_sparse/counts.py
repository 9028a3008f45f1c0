"""What is counted about weights and keep probabilities: one rule for every figure that is logged, printed or saved.

Counts are Python integers, so 1e8 weights count exactly; shares are fractions in [0, 1]. Weights that share memory (tied
layers, also tied through a view such as a transpose) count once, under the first of their names. Weights that are split
over processes (FSDP2) count as a whole, the same on every rank: there each function here is a collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse import shards

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
        key = _memory(tensor)
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            kept[name] = tensor
    return kept


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Where the elements lie; a process may hold none of a split tensor, whose storage then still tells it from others."""
    part = shards.local(tensor.detach())
    storage = part.untyped_storage()
    return tensor.device, storage.data_ptr() or storage._cdata, part.storage_offset(), tensor.numel()


def count_zeros(tensors: Mapping[str, Tensor], zeros: Mapping[str, Tensor] | None = None) -> Counts:
    """``{name: (zeros, size)}`` of tensors of any shape, tied ones once.

    A zero is an exact one: -0.0 is, NaN is not. ``zeros`` may give a boolean tensor per name that is True where a weight
    counts as zero (a threshold that has not been applied yet); then the values themselves do not matter.
    """
    found = {}
    for name, tensor in distinct(tensors).items():
        size = tensor.numel()
        marked = _nonzero(tensor if zeros is None else zeros[name])
        found[name] = (size - marked if zeros is None else marked, size)
    return found


def _nonzero(tensor: Tensor) -> int:
    return int(shards.total(shards.local(tensor.detach()).count_nonzero(), tensor))


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
        total += float(shards.total(shards.local(tensor.detach()).sum(dtype=wide(tensor)), tensor))
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
    logs = (shards.elementwise(lambda part: part.float().log().clamp(min=floor), alpha) for alpha in keep)
    return histogram(logs, floor, 0.0, bins)


def magnitude_histogram(weights: Iterable[Tensor], bins: int = BINS) -> Histogram:
    """Histogram of |w| over [0, max |w|], zeros in the first bin."""
    given = [weight.detach() for weight in weights]
    largest = max((_largest(weight) for weight in given), default=0.0)
    return histogram((shards.elementwise(torch.abs, weight) for weight in given), 0.0, largest if largest > _SMALLEST else 1.0, bins)


def histogram(values: Iterable[Tensor], low: float, high: float, bins: int = BINS) -> Histogram:
    """Exact counts in ``bins`` equal bins over [low, high]; values outside fall in the outer bins, NaN and inf in none."""
    counts = torch.zeros(bins + 1, dtype=torch.int64)  # the last one takes what is not finite
    for tensor in values:
        parts = torch.split(shards.local(tensor.detach()).flatten(), _CHUNK)
        counts += shards.total(torch.stack([_binned(part, low, high, bins) for part in parts]).sum(0), tensor).cpu()
    return Histogram(counts[:bins].tolist(), [low + (high - low) * i / bins for i in range(bins + 1)])


def _binned(part: Tensor, low: float, high: float, bins: int) -> Tensor:
    exact = part if part.dtype in (torch.float32, torch.float64) else part.float()
    index = ((exact - low) / (high - low) * bins).clamp(0, bins - 1)
    return torch.bincount(index.where(exact.isfinite(), bins).long(), minlength=bins + 1)


def weight_in_use(module: nn.Module, name: str) -> tuple[str, Tensor]:
    """The name and value that the forward uses for parameter ``name`` of ``module``.

    Differs from the parameter where ``torch.nn.utils.prune`` (Lightning's ModelPruning) keeps ``weight_orig`` and a mask,
    and where a parametrisation computes ``weight``: both are reported as ``weight``, with the mask applied.
    Raises AttributeError for a name that the module lacks.
    """
    path, leaf = _plain(module, name)
    owner = module.get_submodule(path)
    with torch.no_grad(), _still(owner):
        pruned = hasattr(owner, f"{leaf}_orig") and hasattr(owner, f"{leaf}_mask")
        value = getattr(owner, f"{leaf}_orig") * getattr(owner, f"{leaf}_mask") if pruned else getattr(owner, leaf)
    return f"{path}.{leaf}" if path else leaf, value.detach()


@contextmanager
def _still(owner: nn.Module) -> Iterator[None]:
    """Parametrisations in evaluation mode: in training, spectral_norm's estimate moves each time the weight is read."""
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
    part = shards.local(weight)
    size = part.abs().nan_to_num(0.0, 0.0).max() if part.numel() else part.new_zeros(())
    return float(shards.largest(size, weight))


def _ratio(zeros: int, size: int) -> float:
    return zeros / size if size else 0.0
