"""Find NaN and infinite values in many tensors, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.elementwise import shards
from lightning_sparse.elementwise.engine import are_finite, bucket_rows, can_check, flatten


@torch.no_grad()
def count_nonfinite(tensors: Mapping[str, Tensor], nan_only: bool = False) -> dict[str, tuple[int, int]]:
    """Return {name: (NaN, inf)} of the tensors that hold such values; a collective for split ones.

    One sum is enough in the usual case, because a value that is not finite cannot vanish in a sum; it can only appear by overflow.
    """
    parts = {name: _values(tensor) for name, tensor in tensors.items()}
    sums = _sums(list(parts.values()))
    if not sums or not _any_nonfinite(sums, tensors):
        return {}
    counted = {name: (_count(part.isnan(), tensors[name]), _count(part.isinf(), tensors[name])) for name, part in parts.items()}
    return {name: (nan, inf) for name, (nan, inf) in counted.items() if nan or (inf and not nan_only)}


def maybe_nonfinite(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the gradients that may contain NaN or inf. The check is collective: one bad gradient returns all of them.

    :func:`are_finite` checks at once all gradients that it can check.
    """
    easy = [grad for grad in gradients.values() if can_check(grad)]
    if not are_finite(easy):
        return gradients
    if len(easy) == len(gradients):
        return {}
    seen = set(map(id, easy))
    return {name: grad for name, grad in gradients.items() if id(grad) not in seen}


def _sums(parts: list[Tensor]) -> list[Tensor]:
    """Sum each part, or a bucket of small ones together."""
    groups = bucket_rows([(part,) for part in parts])
    merged = (parts[group[0]] if len(group) == 1 else flatten([parts[number] for number in group]) for group in groups)
    return [part.sum(dtype=torch.promote_types(part.dtype, torch.float32)) for part in merged]


def _any_nonfinite(sums: list[Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether one of ``sums`` is not finite, here or, where a tensor is split, on another process."""
    split = next((tensor for tensor in tensors.values() if shards.is_sharded(tensor)), None)
    if split is None and all(total.is_cpu for total in sums):  # because an operation on them costs more than reading them
        return not all(math.isfinite(float(total)) for total in sums)
    stacked = torch.stack([total.to(sums[0]) for total in sums])
    if split is None:
        return not math.isfinite(float(stacked.sum()))
    return bool(shards.max_shards((~stacked.isfinite()).any().int(), split))


def _count(marks: Tensor, of: Tensor) -> int:
    return int(shards.sum_shards(marks.sum(), of))


def _values(tensor: Any) -> Tensor:
    """Return what a dense, sparse or split tensor holds here."""
    (part,) = shards.local_parts((tensor,))
    return part._values() if part.is_sparse else part
