"""Buckets contain every row once, and values written to a bucket reach its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from rows import MIXED
from torch import Tensor, nn

from lightning_sparse.elementwise import pieces
from lightning_sparse.elementwise.engine import bucket_rows
from lightning_sparse.elementwise.pieces import Buckets, BufferPool


def test_each_row_is_in_one_bucket_of_its_kind() -> None:
    tensors = [*MIXED, *(tensor.double() for tensor in MIXED), torch.zeros(4, 4).to_sparse(), *MIXED[:3]]
    groups = bucket_rows([(tensor,) for tensor in tensors])
    assert sorted(itertools.chain(*groups)) == list(range(len(tensors)))
    shared = [group for group in groups if len(group) > 1]
    assert [{tensors[number].dtype for number in group} for group in shared] == [{torch.float32}, {torch.float64}]
    assert all(tensors[number].numel() <= pieces.SMALL and not tensors[number].is_sparse for group in shared for number in group)


def test_a_bucket_has_a_bounded_size_and_few_rows_stay_alone() -> None:
    rows = [(torch.zeros(10),) for _ in range(100)]
    assert [len(group) for group in bucket_rows(rows, size=95, few=2)] == [9] * 11 + [1]
    assert bucket_rows(rows[:7]) == [[number] for number in range(7)]
    assert len(bucket_rows(rows[:8])) == 1
    assert bucket_rows([]) == []


LAYOUTS: list[Callable[[Tensor], Tensor]] = [lambda t: t, lambda t: t.t() if t.dim() == 2 else t, lambda t: nn.Parameter(t)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "transposed", "parameters"])
def test_written_columns_are_copied_back_and_others_are_not(layout: Callable[[Tensor], Tensor]) -> None:
    targets, sources, others = ([layout(tensor.clone()) for tensor in MIXED] for _ in range(3))
    with torch.no_grad():
        for target, other, source in Buckets(bucket_rows).rows((targets, others, sources), written=2):
            target.add_(source.square())
            other.neg_()
            source.zero_()  # a bucket is a copy
    for before, target, other in zip(MIXED, targets, others, strict=True):
        assert torch.equal(target, layout(before) + layout(before).square())
        assert torch.equal(other, -layout(before))
    assert [bool((source == 0).all()) for source in sources].count(False) == len(MIXED) - 2  # the large and the empty tensor


def test_channels_last_tensors_share_a_bucket() -> None:
    images = [torch.randn(3, 2, 4, 5).to(memory_format=torch.channels_last) for _ in range(9)]
    copies = [image.clone() for image in images]
    for (part,) in Buckets(bucket_rows).rows([images]):
        part.mul_(2)
    assert all(torch.equal(image, 2 * copy) for image, copy in zip(images, copies, strict=True))


COPIES: list[Callable[[Tensor], Tensor]] = [torch.clone, lambda t: nn.Parameter(t.clone()), lambda t: t.clone().double()]


@pytest.mark.parametrize("copy", COPIES, ids=["plain", "parameters", "double"])
def test_add_adds_to_each_target(copy: Callable[[Tensor], Tensor]) -> None:
    sources, cached = [*map(copy, MIXED)], Buckets(bucket_rows)
    with torch.no_grad():
        for _ in range(2):
            targets = [torch.ones_like(tensor) for tensor in MIXED]
            cached.add_(targets, sources, torch.square, scale=-0.5)
            for before, source, target in zip(MIXED, sources, targets, strict=True):
                assert torch.equal(source, before.to(source.dtype))
                torch.testing.assert_close(target, 1 - 0.5 * before.square())


def test_buffers_are_reused_and_each_tensor_gets_its_own_values() -> None:
    """Alternates tensors of equal size and different shapes; each has its own views of the shared buffer."""
    cached, addresses = Buckets(bucket_rows), set()
    tall, wide = ([torch.full(size, 3.0) for _ in range(9)] for size in ((8, 2), (2, 8)))
    for tensors in (tall, wide, tall, wide, tall[:8] + wide[:1]):
        for (part,) in cached.rows([tensors]):
            part.add_(1)
            addresses.add(part.data_ptr())
        del part
    assert len(addresses) == 1
    assert [int(tensor[0, 0]) for tensor in (*tall, *wide)] == [6] * 8 + [5] + [6] + [5] * 8


def test_a_changed_dtype_or_size_of_the_same_tensors_is_detected() -> None:
    cached, tensors = Buckets(bucket_rows), [torch.zeros(2, 2) for _ in range(40)]
    for first in range(30):
        for (part,) in cached.rows([tensors[first : first + 9]]):
            part.add_(1)
    assert [int(tensor[0, 0]) for tensor in tensors] == [min(n + 1, 9, 30, 38 - n) if n < 38 else 0 for n in range(40)]
    for tensor in tensors:
        tensor.data = tensor.data.double()
    for (part,) in cached.rows([tensors[29:38]]):
        assert part.dtype == torch.float64
    for tensor in tensors:
        tensor.data = torch.zeros(3, 1, dtype=torch.float64)
    for (part,) in cached.rows([tensors[29:38]]):
        assert len(part) == 27


def test_large_buffers_are_kept_until_they_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sparse.elementwise.pieces.LARGE", 100)
    pool, small, large = BufferPool(), torch.zeros(20), torch.zeros(5, 6)
    first = pool.empty_like(large, "mask")
    assert pool.empty_like(large, "mask") is first
    assert pool.empty_like(large, "product") is not first
    assert pool.empty_like(small, "small") is not pool.empty_like(small, "small")
    assert pool.empty_like(large.double(), "mask").dtype == torch.float64
    assert pool.empty_like(large.t(), "mask").stride() == (1, 6)
    again = pool.empty_like(large, "mask")
    pool.clear()
    assert pool.empty_like(large, "mask") is not again
