"""Cut large tensors into cache-sized chunks, because on a CPU memory traffic costs several times the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements for each thread: a few float32 operands of that size fit the last-level cache, fewer cost more calls


def chunk_size() -> int:
    """Return the elements of one chunk, for all threads together."""
    return CHUNK * torch.get_num_threads()


def chunks(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of one shape as flat views of ``size`` elements each, in memory order; writing to a view writes to its tensor.

    Small tensors, tensors on an accelerator, and tensors of different memory layout are yielded whole.
    """
    size = size or chunk_size()
    if tensors[0].numel() <= size or tensors[0].device.type != "cpu" or not same_layout(tensors):
        yield tensors
    else:
        yield from zip(*(flat_view(tensor).split(size) for tensor in tensors), strict=True)


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are dense, on one device, and have their elements in the same order in memory."""
    first = tensors[0]
    if any(tensor.device != first.device or tensor.layout != torch.strided for tensor in tensors):
        return False
    shape, order = first.shape, first.stride()
    same = all(tensor.shape == shape and tensor.stride() == order for tensor in tensors[1:])
    return same and (first.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(first)))


def flat_view(tensor: Tensor) -> Tensor:
    """View the elements of a dense tensor in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def map_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply an elementwise ``function`` chunk by chunk; the result has the memory layout of the first tensor."""
    cut = list(chunks(*tensors))
    if len(cut) == 1:
        return function(*tensors)
    first = function(*cut[0])
    result = torch.empty_like(tensors[0], dtype=first.dtype)
    targets = flat_view(result).split(len(first))
    targets[0].copy_(first)
    for target, part in zip(targets[1:], cut[1:], strict=True):
        target.copy_(function(*part))
    return result
