"""Work on many tensors at once is the work on each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import _joined, _joint, _memory, _pieces
from lightning_sparse.noise import ScaledBernoulli


def network_of(sizes: list[tuple[int, ...]]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size) for size in sizes]


MIXED = network_of([(3, 5), (300, 300), (4, 2, 3, 3), (7,), (2, 2), (5, 6), (1, 1), (6, 3), (8, 2), (9,), (0, 4), (2, 9)])


def test_each_row_is_in_one_group_of_its_kind() -> None:
    tensors = [*MIXED, *(tensor.double() for tensor in MIXED), torch.zeros(4, 4).to_sparse(), *MIXED[:3]]
    groups = _joined.grouped([(tensor,) for tensor in tensors])
    assert sorted(itertools.chain(*groups)) == list(range(len(tensors)))
    joint = [group for group in groups if len(group) > 1]
    assert len(joint) == 2
    assert [{tensors[number].dtype for number in group} for group in joint] == [{torch.float32}, {torch.float64}]
    assert all(tensors[number].numel() <= _joined.SMALL and not tensors[number].is_sparse for group in joint for number in group)


def test_a_group_has_a_bounded_size_and_few_are_left_alone() -> None:
    rows = [(torch.zeros(10),) for _ in range(100)]
    groups = _joined.grouped(rows, size=95, few=2)
    assert [len(group) for group in groups] == [9] * 11 + [1]
    assert _joined.grouped(rows[:7]) == [[number] for number in range(7)]
    assert len(_joined.grouped(rows[:8])) == 1
    assert _joined.grouped([]) == []


@pytest.mark.parametrize(
    "lie", [lambda t: t, lambda t: t.t() if t.dim() == 2 else t, lambda t: nn.Parameter(t)], ids=["plain", "turned", "own"]
)
def test_what_is_written_to_a_column_is_in_its_tensors(lie: Callable[[Tensor], Tensor]) -> None:
    targets, sources = ([lie(tensor.clone()) for tensor in MIXED] for _ in range(2))
    with torch.no_grad():
        for source, target in _joint.Joint().pieces((sources, targets), written=1):
            target.add_(source.square())
            source.zero_()  # not the written column: of joined rows a copy
    for before, target in zip(MIXED, targets, strict=True):
        assert torch.equal(target, lie(before) + lie(before).square())
    assert [bool((source == 0).all()) for source in sources].count(False) == len(MIXED) - 2  # the large one, and the empty one


def test_memory_that_is_not_contiguous_is_joined_rightly() -> None:
    images = [torch.randn(3, 2, 4, 5).to(memory_format=torch.channels_last) for _ in range(9)]
    copies = [image.clone() for image in images]
    for (part,) in _joint.Joint().pieces([images], written=0):
        part.mul_(2)
    assert all(torch.equal(image, 2 * copy) for image, copy in zip(images, copies, strict=True))


@pytest.mark.parametrize(
    "maker", [torch.clone, lambda t: nn.Parameter(t.clone()), lambda t: t.clone().double()], ids=["plain", "own", "double"]
)
def test_what_is_added_to_many_is_added_to_each(maker: Callable[[Tensor], Tensor]) -> None:
    sources, joint = [*map(maker, MIXED)], _joint.Joint()
    with torch.no_grad():
        for _ in range(2):
            targets = [torch.ones_like(tensor) for tensor in MIXED]
            joint.add(sources, targets, torch.square, alpha=-0.5)
            for before, source, target in zip(MIXED, sources, targets, strict=True):
                assert torch.equal(source, before.to(source.dtype))
                torch.testing.assert_close(target, 1 - 0.5 * before.square())


def test_memory_is_kept_for_the_same_tensors_alone() -> None:
    """Every second time other tensors of as many elements and other shapes come: they have views of their own."""
    joint, made = _joint.Joint(), []
    tall, wide = ([torch.full(size, 3.0) for _ in range(9)] for size in ((8, 2), (2, 8)))
    for tensors in (tall, wide, tall, wide, tall[:8] + wide[:1]):
        for (part,) in joint.pieces([tensors], written=0):
            part.add_(1)
            made.append(part.data_ptr())
        del part
    assert len(set(made)) == 1
    assert [int(tensor[0, 0]) for tensor in (*tall, *wide)] == [6] * 8 + [5] + [6] + [5] * 8
    assert len(joint._plans) == 3
    joint.clear()
    assert (joint._plans, joint._memory) == ({}, {})


def test_plans_that_are_remembered_are_few_and_changed_types_and_sizes_are_seen() -> None:
    joint, tensors = _joint.Joint(), [torch.zeros(2, 2) for _ in range(40)]
    for first in range(30):
        for (part,) in joint.pieces([tensors[first : first + 9]], written=0):
            part.add_(1)
    assert len(joint._plans) <= _joint._PLANS
    assert [int(tensor[0, 0]) for tensor in tensors] == [min(n + 1, 9, 30, 38 - n) if n < 38 else 0 for n in range(40)]
    for tensor in tensors:
        tensor.data = tensor.data.double()
    for (part,) in joint.pieces([tensors[29:38]], written=0):
        assert part.dtype == torch.float64
    for tensor in tensors:
        tensor.data = torch.zeros(3, 1, dtype=torch.float64)
    for (part,) in joint.pieces([tensors[29:38]], written=0):
        assert len(part) == 27


def masks(rows: list[tuple[Tensor, ...]], **options: object) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    sample = lambda w, h: ScaledBernoulli().sample((w.abs() * h).clamp(0.2, 0.9), generator)  # noqa: E731
    return {number: pair for number, *pair in _joined.masked(sample, rows, **options)}  # type: ignore[arg-type, misc]


def test_masks_of_rows_together_are_each_a_mask_of_its_row() -> None:
    rows = [(tensor, torch.full_like(tensor, 0.9)) for tensor in MIXED]
    found = masks(rows)
    assert sorted(found) == list(range(len(rows)))
    for number, (w, h) in enumerate(rows):
        mask, product = found[number]
        assert mask.shape == product.shape == w.shape
        assert torch.equal(product, w * mask)
        kept = mask > 0
        levels = (65536 * (w.abs() * h).clamp(0.2, 0.9)[kept]).ceil()
        torch.testing.assert_close(mask[kept], 65536 / levels)
    share = torch.cat([(mask > 0).double().flatten() for mask, _ in found.values()]).mean()
    wanted = float(torch.cat([(w.abs() * h).clamp(0.2, 0.9).double().flatten() for w, h in rows]).mean())
    assert float(share) == pytest.approx(wanted, abs=4 * (0.25 / 90_000) ** 0.5)
    assert all(torch.equal(w, before) for (w, _), before in zip(rows, MIXED, strict=True))  # the live weights are as they were


@pytest.mark.parametrize("large", [False, True])
def test_draws_depend_neither_on_threads_nor_on_the_size_of_a_piece(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_joined, "DRAWN", 4096 if large else 1 << 19)
    rows = [(tensor, torch.full_like(tensor, 0.9)) for tensor in MIXED]
    threads, one = torch.get_num_threads(), masks(rows)
    try:
        torch.set_num_threads(1)
        monkeypatch.setattr(_pieces, "SIZE", 1000)
        other = masks(rows)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for number in one for a, b in zip(one[number], other[number], strict=True))


def test_large_blocks_are_kept_until_they_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "_BLOCK", 100)
    kept, small, large = _memory.Kept(), torch.zeros(20), torch.zeros(5, 6)
    first = kept.empty_like(large, "mask")
    assert kept.empty_like(large, "mask") is first
    assert kept.empty_like(large, "product") is not first
    assert kept.empty_like(small, "small") is not kept.empty_like(small, "small")
    assert kept.empty_like(large.double(), "mask").dtype == torch.float64
    assert kept.empty_like(large.t(), "mask").stride() == (1, 6)
    again = kept.empty_like(large, "mask")
    kept.clear()
    assert kept.empty_like(large, "mask") is not again
