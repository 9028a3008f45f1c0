"""Elementwise work piece by piece: what one step of it leaves in the cache, the next one finds there.

An operation after another over a whole tensor reads and writes all of it each time; on a CPU that costs several times the
arithmetic, and every intermediate result is as large as the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

SIZE = 1 << 18  # elements for each thread: a few float32 operands of that size fit the last-level cache, fewer cost more calls


def pieces(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike into views of their elements in memory order; writing to a view writes to its tensor.

    A piece has ``size`` elements, by default SIZE for each thread. They come whole, in one piece, where they are small, on an
    accelerator (which has its own way with memory), or do not lie in memory alike.
    """
    size = size or SIZE * torch.get_num_threads()
    if tensors[0].numel() <= size or tensors[0].device.type != "cpu" or not alike(tensors):
        yield tensors
    else:
        yield from zip(*(flat(tensor).split(size) for tensor in tensors), strict=True)


def alike(tensors: Sequence[Tensor]) -> bool:
    """All dense on one device, without gaps, in one order of elements."""
    first = tensors[0]
    if any(tensor.device != first.device or tensor.layout != torch.strided for tensor in tensors):
        return False
    shape, order = first.shape, first.stride()
    same = all(tensor.shape == shape and tensor.stride() == order for tensor in tensors[1:])
    return same and (first.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(first)))


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in their order in memory: a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def mapped(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function``, which works element by element, of the tensors, piece by piece; in memory as the first of them is."""
    cut = list(pieces(*tensors))
    if len(cut) == 1:
        return function(*tensors)
    first = function(*cut[0])
    result = torch.empty_like(tensors[0], dtype=first.dtype)
    targets = flat(result).split(len(first))
    targets[0].copy_(first)
    for target, part in zip(targets[1:], cut[1:], strict=True):
        target.copy_(function(*part))
    return result


def over(number: float | Tensor, tensor: Tensor) -> Tensor:
    """number / tensor in one pass; of a plain number torch takes the reciprocal first, then the product."""
    if not isinstance(number, Tensor):
        number = torch.tensor(number, dtype=torch.result_type(tensor, 1.0), device="cpu")
    return torch.div(number, tensor)
