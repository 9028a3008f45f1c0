"""Process tensors in pieces: chunks of large ones, buckets of small ones, and buffers that are reused between steps.

Large tensors are split into chunks that fit the cache, because memory traffic on a CPU costs several times the arithmetic. Small
tensors are processed together, because calls cost more than their arithmetic. A *row* is one tensor from each column, all of one
shape: a weight, its gradient, its second moments. A *bucket* is a list of small rows whose columns are copied into one flat buffer
each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

PLAIN = (Tensor, nn.Parameter)  # types of tensors that are not split over processes
CHUNK = 1 << 18  # elements for each thread: a few float32 operands of that size fit the last-level cache, fewer cost more calls
SMALL = 1 << 16  # elements: larger tensors take longer than the calls of a few operations
FEW = 8  # fewer small tensors are not bucketed, because their calls cost less than copying them into a buffer
_PLANS = 16  # number of cached plans, because which gradients exist may change from step to step

Row = tuple[Tensor, ...]
Columns = Sequence[Sequence[Tensor]]
LARGE = (32 << 20) - (64 << 10)  # bytes: glibc maps blocks of 32 MiB and more anew, whatever its thresholds

# -- chunks ------------------------------------------------------------------------------------------------------------------


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


def map_large(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
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


# -- buckets -----------------------------------------------------------------------------------------------------------------


class _Bucket(NamedTuple):
    """Row numbers, the flat buffers of some columns, and each tensor's view into them; a single row has no buffer."""

    numbers: list[int]
    flat: Row = ()
    views: tuple[list[Tensor], ...] = ()


class Buckets:
    """Copies many small rows into flat buffers, and written columns back.

    Buffers and views are cached, because creating them costs as much as the computation. The cache is keyed by the tensors of
    the first column; buckets share the buffers.

    Args:
        group: groups the numbers of rows into buckets.
    """

    def __init__(self, group: Callable[[Sequence[Row]], list[list[int]]]) -> None:
        self._group = group
        self._plans: dict[Hashable, tuple[list[_Bucket], Sequence[Tensor]]] = {}
        self._buffers: dict[Hashable, Tensor] = {}

    def clear(self) -> None:
        """Release the buffers."""
        self._plans.clear()
        self._buffers.clear()

    def rows(self, columns: Columns, written: int = 1, whole: bool = False) -> Iterator[Row]:
        """Yield the chunks of each large row (or it ``whole``) and one flat row for each bucket.

        What is written to the first ``written`` columns is in their tensors once the next row is asked for.
        """
        for bucket in self._plan(columns, range(len(columns))):
            if not bucket.flat:
                row = tuple(column[bucket.numbers[0]] for column in columns)
                yield from [row] if whole else chunks(*row)
                continue
            for column, views in zip(columns, bucket.views, strict=True):
                torch._foreach_copy_(views, _members(column, bucket))
            yield bucket.flat
            for column, views in zip(columns[:written], bucket.views[:written], strict=True):
                torch._foreach_copy_(_members(column, bucket), views)

    def add_(self, targets: Sequence[Tensor], sources: Sequence[Tensor], function: Callable[[Tensor], Tensor], scale: float) -> None:
        """Compute ``target += scale * function(source)``; of a bucket only the sources are copied."""
        for bucket in self._plan((sources, targets), [0]):
            if not bucket.flat:
                for source, target in chunks(sources[bucket.numbers[0]], targets[bucket.numbers[0]]):
                    target.add_(function(source), alpha=scale)
                continue
            (flat,), (views,) = bucket.flat, bucket.views
            torch._foreach_copy_(views, _members(sources, bucket))
            flat.copy_(function(flat))
            torch._foreach_add_(_members(targets, bucket), views, alpha=scale)

    def _plan(self, columns: Columns, copied: Sequence[int]) -> list[_Bucket]:
        """Return the buckets of all rows, with buffers for the columns ``copied``."""
        key = (tuple(copied), chunk_size(), *_signature(columns))
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self.clear()
            buckets = self._group(list(zip(*columns, strict=True)))
            # the first column is kept, because the key holds the ids of its tensors
            self._plans[key] = [self._bucket(numbers, columns, copied) for numbers in buckets], columns[0]
        return self._plans[key][0]

    def _bucket(self, numbers: list[int], columns: Columns, copied: Sequence[int]) -> _Bucket:
        if len(numbers) == 1:
            return _Bucket(numbers)
        members = [_members(columns[column], _Bucket(numbers)) for column in copied]
        flat = tuple(self._buffer(column, tensors) for column, tensors in enumerate(members))
        views = tuple(list(_unflatten_dense_tensors(one, tensors)) for one, tensors in zip(flat, members, strict=True))
        return _Bucket(numbers, flat, views)

    def _buffer(self, column: int, tensors: Sequence[Tensor]) -> Tensor:
        """Return the buffer of a column, which all buckets share."""
        like, size = tensors[0], sum(tensor.numel() for tensor in tensors)
        key = (column, like.dtype, like.device)
        if key not in self._buffers or len(self._buffers[key]) < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size]


def _members(column: Sequence[Tensor], bucket: _Bucket) -> list[Tensor]:
    return [column[number] for number in bucket.numbers]


def _signature(columns: Columns) -> Iterator[Hashable]:
    """Yield all that the buckets depend on; no list or tuple for each tensor, because many of them trigger the garbage collector."""
    yield tuple(map(id, columns[0]))
    yield tuple([tensor.numel() for tensor in columns[0]])
    for column in columns:
        yield tuple([tensor.device for tensor in column])
        yield tuple([tensor.dtype for tensor in column])
        yield tuple([tensor.layout for tensor in column])
        yield tuple(map(type, column))


# -- buffers -----------------------------------------------------------------------------------------------------------------


def raise_malloc_thresholds() -> None:
    """Let malloc keep up to 64 MB of free memory, for the rest of the process.

    Call it once, before training on a CPU, if large intermediate results make steps slow: glibc returns a freed block of more
    than its threshold to the system, and a page fault for every 4 KB of the next one then costs several times the arithmetic.
    Freeing one block that was never touched raises both thresholds. Other allocators are not affected.
    """
    torch.empty(LARGE, dtype=torch.uint8)


class BufferPool:
    """Keeps CPU buffers of 32 MB and more between steps, because malloc would map them anew every time."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}

    def empty_like(self, tensor: Tensor, key: Hashable) -> Tensor:
        """Return memory like ``tensor``; if it is large, the buffer that was returned last under ``key``."""
        if not tensor.is_cpu or tensor.numel() * tensor.element_size() < LARGE:
            return torch.empty_like(tensor)
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.dtype, buffer.shape, buffer.stride()) != (tensor.dtype, tensor.shape, tensor.stride()):
            buffer = self._buffers[key] = torch.empty_like(tensor)
        return buffer

    def clear(self) -> None:
        """Release all buffers."""
        self._buffers.clear()
