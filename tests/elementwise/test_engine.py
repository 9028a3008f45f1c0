"""Each method of the engine on many tensors equals its function on each tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rows import MIXED
from torch import Tensor

from lightning_sparse.elementwise import Engine, count_nonfinite, engine, pieces
from lightning_sparse.noise import Gaussian, ScaledBernoulli

Row = tuple[Tensor, ...]


def clones() -> list[Tensor]:
    return [tensor.clone() for tensor in MIXED]


@pytest.fixture(params=["whole", "chunked", "no buckets"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with small chunks, and with and without buckets."""
    if request.param == "chunked":
        monkeypatch.setattr(pieces, "CHUNK", 1000)
    if request.param == "no buckets":
        monkeypatch.setattr(pieces, "FEW", 10**9)
    return str(request.param)


def test_add_update_and_map_are_the_function_of_each_row(way: str) -> None:
    one, targets, moved = Engine(), clones(), clones()
    one.add_(targets, MIXED, torch.square, -0.5)
    one.update_((moved, MIXED), lambda into, w, a, b: into.mul_(a).add_(w, alpha=b), (2.0, 3.0))
    doubled = one.map((MIXED, MIXED), lambda a, b, c: a * c + b, (0.5,))
    found = one.map((MIXED,), lambda w: w > 0)
    for w, target, into, value, marks in zip(MIXED, targets, moved, doubled, found, strict=True):
        torch.testing.assert_close(target, w - 0.5 * w.square())
        torch.testing.assert_close(into, 5 * w)
        torch.testing.assert_close(value, 1.5 * w)
        assert torch.equal(marks, w > 0)


def test_a_function_that_is_not_separable_sees_whole_tensors(way: str) -> None:
    one, moved = Engine(), clones()
    sizes = [int(total) for total in one.map((MIXED,), lambda w: torch.full_like(w, w.numel(), dtype=torch.float64).sum(), separable=False)]
    assert sizes == [tensor.numel() ** 2 for tensor in MIXED]
    one.update_((moved,), lambda w: w.div_(w.abs().sum() + 1), separable=False)
    for w, into in zip(MIXED, moved, strict=True):
        torch.testing.assert_close(into, w / (w.abs().sum() + 1))


# -- masks ----------------------------------------------------------------------------------------------------------------


def alpha(w: Tensor, h: Tensor, scale: Any) -> Tensor:
    return (w.abs() * h * scale).clamp(0.2, 0.9)


def masks(rows: list[Row], one: Engine | None = None, noise: Any = None, seed: int = 5) -> dict[int, Tensor]:
    """Make masks by row number; each product is the row's first tensor times its mask."""
    drawn = (one or Engine()).draw(rows, alpha, noise or ScaledBernoulli(), torch.Generator().manual_seed(seed), (1.0,))
    found = {}
    for number, mask, product in drawn:
        assert mask.shape == product.shape == rows[number][0].shape
        torch.testing.assert_close(product, rows[number][0] * mask)
        found[number] = mask.clone()
    assert sorted(found) == list(range(len(rows)))
    return found


ROWS: list[Row] = [(tensor, torch.full_like(tensor, 0.9)) for tensor in MIXED]


def test_masks_have_the_keep_probability_of_their_weights() -> None:
    found = masks(ROWS)
    for number, (w, h) in enumerate(ROWS):
        kept = found[number] > 0
        levels = (65536 * alpha(w, h, 1.0)[kept]).ceil()
        torch.testing.assert_close(found[number][kept], 65536 / levels)
    share = torch.cat([(mask > 0).double().flatten() for mask in found.values()]).mean()
    wanted = float(torch.cat([alpha(w, h, 1.0).double().flatten() for w, h in ROWS]).mean())
    assert float(share) == pytest.approx(wanted, abs=4 * (0.25 / 90_000) ** 0.5)
    assert all(torch.equal(w, before) for (w, _), before in zip(ROWS, MIXED, strict=True))


@pytest.mark.parametrize("drawn", [4096, 1 << 19])
def test_masks_depend_neither_on_threads_nor_on_the_size_of_a_chunk(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DRAWN", drawn)
    threads, first = torch.get_num_threads(), masks(ROWS)
    try:
        torch.set_num_threads(1)
        monkeypatch.setattr(pieces, "CHUNK", 1000)
        again = masks(ROWS)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[number], again[number]) for number in first)


def test_memory_of_large_masks_is_reused_only_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sparse.elementwise.pieces.LARGE", 100)
    monkeypatch.setattr(engine, "DRAWN", 50)
    rows, one = [(torch.ones(400), torch.ones(400))], Engine()

    def address(reuse: bool) -> tuple[int, Tensor]:
        ((_, mask, product),) = one.draw(rows, alpha, ScaledBernoulli(), torch.Generator(), (1.0,), reuse=reuse)
        return mask.data_ptr(), product

    first, kept = address(reuse=True)
    assert address(reuse=True)[0] == first
    assert address(reuse=False)[0] != first
    assert kept.numel() == 400


# -- kernels --------------------------------------------------------------------------------------------------------------


def test_a_verb_runs_the_kernel_of_a_function_that_was_compiled_for_it(traced: list[int]) -> None:
    one = Engine()

    def scaled(w: Tensor, scale: Any) -> Tensor:
        return w * scale

    def move(w: Tensor, scale: Any) -> None:
        w.mul_(scale)

    one.compile_add_(torch.square, MIXED, "a square")
    one.compile_map(scaled, MIXED, (0.5,), (0.5,), "a product")
    one.compile_update_(move, MIXED, (0.5,), (0.5,), "a move")
    traced.clear()
    targets, moved = clones(), clones()
    one.add_(targets, MIXED, torch.square, 2)
    one.update_((moved,), move, (3,))
    found = one.map((MIXED,), scaled, (0.5,))
    assert sorted(traced) == sorted(3 * [sum(w.numel() for w in MIXED) - 90_000, 90_000])
    for w, target, into, value in zip(MIXED, targets, moved, found, strict=True):
        torch.testing.assert_close(target, w + 2 * w.square())
        torch.testing.assert_close(into, 3 * w)
        torch.testing.assert_close(value, w / 2)
    traced.clear()
    one.add_(targets, MIXED, torch.abs, 1.0)
    assert traced == []


@pytest.mark.parametrize("noise", [ScaledBernoulli(), Gaussian()], ids=["Bernoulli", "Gaussian"])
def test_masks_of_a_kernel_have_the_law_of_their_keep_probability(noise: Any, traced: list[int]) -> None:
    one, rows = Engine(), [(torch.full((300_000,), 0.3), torch.ones(300_000))]
    one.compile_draw(alpha, noise, rows[0][:1], (0.5, 0.5), (0.5,), "masks")
    mask, share = masks(rows, one, noise)[0].double(), 0.3
    assert float(mask.mean()) == pytest.approx(1, abs=5 * ((1 - share) / share / len(mask)) ** 0.5)
    assert float(mask.var() * share / (1 - share)) == pytest.approx(1, abs=0.03)
    assert bool((mask == 0).any()) == (noise == ScaledBernoulli())


def test_masks_of_a_kernel_depend_neither_on_chunks_nor_on_later_weights(traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    one, rows = Engine(), [(torch.randn(40, 30), torch.ones(40, 30)), (torch.randn(50), torch.ones(50))]
    one.compile_draw(alpha, ScaledBernoulli(), rows[0][:1], (0.5, 0.5), (0.5,), "masks")
    whole = masks(rows, one)
    monkeypatch.setattr(engine, "_LONGEST", 64)
    assert all(torch.equal(mask, whole[number]) for number, mask in masks(rows, one).items())
    assert torch.equal(masks(rows[:1], one)[0], whole[0])
    first, second = masks([(torch.ones(2000), torch.ones(2000) * 0.5)] * 2, one).values()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_nonfinite_value_is_found_among_many_tensors(value: float) -> None:
    tensors = {f"w{i}": torch.ones(3, 3) for i in range(20)}
    assert count_nonfinite(tensors) == {}
    tensors["w13"][1, 2] = value
    assert count_nonfinite(tensors) == {"w13": (int(math.isnan(value)), int(math.isinf(value)))}
    assert ("w13" in count_nonfinite(tensors, nan_only=True)) is math.isnan(value)
    tensors["w13"][1, 2], tensors["w4"], tensors["w5"] = 1.0, torch.full((3, 3), 3e38), torch.full((3, 3), 3e38)
    assert count_nonfinite(tensors) == {}  # an overflowing sum is not an error
