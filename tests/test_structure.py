"""Structures: which weights form a group, and the contract for one's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_sparse import structure
from lightning_sparse._parts import part_of
from lightning_sparse.grouped import Groups, groups_within
from lightning_sparse.structure import NM, Blocks, Columns, Element, Rows, Structure
from lightning_sparse.testing import ContractError, check_structure

ALL = [Element(), Rows(), Columns(), Blocks((2, 3)), Blocks((16, 16)), NM(1, 2), NM(2, 4)]


@pytest.mark.parametrize("grouping", ALL, ids=repr)
def test_contract(grouping: Structure) -> None:
    check_structure(grouping)


def test_all_structures_are_checked() -> None:
    assert {type(one).__name__ for one in ALL} | {"Structure", "Coupled", "Channels", "Heads"} == set(structure.__all__)


def test_groups_by_hand() -> None:
    w = torch.arange(24.0).reshape(4, 6)
    assert Rows().pool(w).flatten().tolist() == w.sum(1).tolist()
    assert Columns().pool(w).flatten().tolist() == w.sum(0).tolist()
    assert Blocks((3, 4)).pool(w).tolist() == [
        [float(w[:3, :4].sum()), float(w[:3, 4:].sum())],
        [float(w[3:, :4].sum()), float(w[3:, 4:].sum())],
    ]
    conv = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(Columns().pool(conv).flatten(), torch.stack([conv[:, i].sum() for i in range(3)]))
    torch.testing.assert_close(Blocks((2, 12)).pool(conv).flatten(), torch.stack([conv[:2].sum(), conv[2:].sum()]))


def test_two_of_four_stay_along_the_inputs() -> None:
    w = torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 5.0, 0.1]])
    zeros = NM(2, 4).project(w == 5.0, w.abs())
    assert zeros.int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1, 1, 0]]  # of equal ones the first; the rest of 2 weights may stay
    conv = torch.randn(3, 8, 2, 2)
    kept = ~NM(2, 4).project(conv == 0, conv.abs())
    assert kept.reshape(3, 2, 4, 2, 2).sum(2).unique().tolist() == [2]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NM(4, 4), "n must be less than m"),
        (lambda: Blocks((0, 2)), "shape"),
        (lambda: Blocks((16,)), "rows and columns"),
        (lambda: Columns().check("bias", torch.ones(3)), "'bias' has the shape"),
    ],
)
def test_refusals(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]


@dataclass(frozen=True, repr=False)
class Halves(Structure):
    """The two halves of a tensor, in memory order: a user's own structure."""

    def pool(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        return torch.stack([flat[: len(flat) // 2].sum(), flat[len(flat) // 2 :].sum()])

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        half = like.numel() // 2
        return torch.cat([value[:1].expand(half), value[1:].expand(like.numel() - half)]).reshape(like.shape)


@dataclass(frozen=True, repr=False)
class Means(Halves):
    def pool(self, x: Tensor) -> Tensor:
        return super().pool(x) / x.numel()


@dataclass(frozen=True, repr=False)
class Swapped(Halves):
    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return super().spread(value.flip(0), like)


@dataclass(frozen=True, repr=False)
class Short(Blocks):
    """Blocks of two rows that claim to lie in one."""

    @property
    def height(self) -> int | None:
        return 1


def test_own_structure() -> None:
    check_structure(Halves())
    for broken in (Means(), Swapped(), Short((2, 3))):
        with pytest.raises(ContractError, match=repr(broken).split("(")[0]):
            check_structure(broken)


@dataclass(frozen=True, repr=False)
class Pairs(Structure):
    """Pairs of neighbours, without a check of what has none."""

    def pool(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2).sum(1)

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        return value.repeat_interleave(2).reshape(like.shape)


def test_a_pool_that_fails_breaks_the_contract() -> None:
    with pytest.raises(ContractError, match=r"Pairs\(\) on weights of shape \(5, 7\): pool fails: RuntimeError: .*, or define check\(\)"):
        check_structure(Pairs())


def test_a_run_refuses_an_own_structure_that_does_not_group() -> None:
    weights = {"w": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=r"Pairs\(\) cannot group 'w' of shape \(3, 3\): RuntimeError"):
        groups_within(Pairs(), weights)
    for broken in (Means(), Swapped()):
        with pytest.raises(ValueError, match=r"does not group 'w' of shape \(3, 3\): pool must sum .*check_structure checks it"):
            groups_within(broken, weights)
    assert list(groups_within(Halves(), weights).parts) == ["w"]


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_ranking_takes_whole_groups_and_meets_the_share(zeros: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = {"a": torch.randn(6, 4, generator=generator), "b": torch.randn(3, 6, generator=generator)}
    groups = Groups({name: [part_of(Rows(), name)] for name in w})
    sizes = {name: groups.size(name, w.__getitem__) for name in w}
    kept = groups.keep_highest(sizes, w, zeros)
    gone = sum(int((~mask).sum()) for mask in kept.values())
    assert all(mask.all(1).eq(mask.any(1)).all() for mask in kept.values())
    assert all(mask.any() for mask in kept.values())  # no layer is emptied
    assert gone >= min(round(zeros * 42), 32)
    assert gone < round(zeros * 42) + 6 or gone == 32
    lowest = max((float(sizes[name][~kept[name].any(1)].max()) for name in w if not kept[name].all()), default=0.0)
    bests = {name: float(sizes[name].max()) for name in w}
    others = [float(s) for name in w for s, k in zip(sizes[name].flatten(), kept[name].any(1), strict=True) if k and float(s) < bests[name]]
    assert all(size >= lowest for size in others)
