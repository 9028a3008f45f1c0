"""Which tensors hold NaN or infinite values, at the price of one pass over them."""

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


_LARGE = 1 << 20  # elements: a sum, which only reads them, is faster than the call for many


def doubtful(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Those of ``gradients`` that are not known to be finite: it may be all of them, if one is not.

    One call, the one that GradScalers are made of, looks at all that are dense, on the CPU, and not large; it writes to each of
    them what is there.
    """
    easy = [grad for grad in gradients.values() if type(grad) in shards.PLAIN and _is_easy(grad)]
    if not _are_finite(easy):
        return gradients
    if len(easy) == len(gradients):
        return {}
    seen = set(map(id, easy))
    return {name: grad for name, grad in gradients.items() if id(grad) not in seen}


def _is_easy(grad: Tensor) -> bool:
    return grad.is_cpu and grad.layout == torch.strided and grad.numel() <= _LARGE


def _are_finite(tensors: list[Tensor]) -> bool:
    found, one = torch.zeros((), device="cpu"), torch.ones((), device="cpu")
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
    except RuntimeError:  # elements that share memory, or a type it does not know
        return False
    return found.item() == 0


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
    (part,) = shards.held_of((tensor,))
    return part._values() if part.is_sparse else part
