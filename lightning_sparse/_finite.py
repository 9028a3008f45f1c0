"""Which tensors hold NaN or infinite values, at the price of one sum each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import shards
from lightning_sparse._joined import flattened, grouped


@torch.no_grad()
def unfit(tensors: Mapping[str, Tensor], nan_only: bool = False) -> dict[str, tuple[int, int]]:
    """{name: (NaN, inf)} of the tensors that hold such values; a collective for split ones.

    One sum settles it in the usual case: a value that is not finite cannot vanish in a sum, only seem to appear by overflow.
    """
    parts = {name: _values(tensor) for name, tensor in tensors.items()}
    sums = _sums(list(parts.values()))
    if not sums or not _anywhere(sums, tensors):
        return {}
    counted = {name: (_total(part.isnan(), tensors[name]), _total(part.isinf(), tensors[name])) for name, part in parts.items()}
    return {name: (nan, inf) for name, (nan, inf) in counted.items() if nan or (inf and not nan_only)}


def _sums(parts: list[Tensor]) -> list[Tensor]:
    """One sum for each part, or for many small ones together."""
    groups = grouped([(part,) for part in parts])
    joint = (parts[group[0]] if len(group) == 1 else flattened([parts[number] for number in group]) for group in groups)
    return [part.sum(dtype=torch.promote_types(part.dtype, torch.float32)) for part in joint]


def _anywhere(sums: list[Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """One of ``sums`` is not finite, on this process or, where a tensor is split, on another."""
    split = next((tensor for tensor in tensors.values() if shards.is_sharded(tensor)), None)
    if split is None and all(total.is_cpu for total in sums):  # an operation on them costs more than reading them
        return not all(math.isfinite(float(total)) for total in sums)
    together = torch.stack([total.to(sums[0]) for total in sums])
    if split is None:
        return not math.isfinite(float(together.sum()))
    return bool(shards.largest((~together.isfinite()).any().int(), split))


def _total(marks: Tensor, of: Tensor) -> int:
    return int(shards.total(marks.sum(), of))


def _values(tensor: Any) -> Tensor:
    """What a dense, sparse or split tensor holds here."""
    (part,) = shards.held((tensor,))
    return part._values() if part.is_sparse else part
