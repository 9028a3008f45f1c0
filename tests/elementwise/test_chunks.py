"""Chunks contain every element once, and chunked functions give the same results as on whole tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sparse.elementwise import map_chunks, pieces

LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t,
    lambda t: t.to(memory_format=torch.channels_last),
    lambda t: t[:, ::2],
    lambda t: t.transpose(0, 1),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["rows", "channels last", "gaps", "transposed"])
def test_every_element_comes_once_and_is_written_in_place(layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 5)
    target, source = layout(torch.zeros(3, 4, 2, 2)), layout(torch.arange(48.0).view(3, 4, 2, 2))
    for into, part in pieces.chunks(target, source):
        into.add_(part)
    assert torch.equal(target, source)
    doubled = map_chunks(lambda one, other: one + other, target, source)
    assert torch.equal(doubled, 2 * source)
    assert doubled.dtype == source.dtype


def test_tensors_of_different_layout_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 5)
    one, other = torch.zeros(4, 6), torch.arange(24.0).view(6, 4).t()
    assert [(len(a), len(b)) for a, b in pieces.chunks(one, other)] == [(4, 4)]
    assert torch.equal(map_chunks(torch.add, one, other), other)
    assert len(list(pieces.chunks(one, one))) == -(-24 // (5 * torch.get_num_threads()))


def test_a_result_of_another_dtype_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 3)
    w = torch.tensor([[-1.0, 0.0, 2.0, 3.0] * 4])
    assert torch.equal(map_chunks(lambda part: part > 1, w), w > 1)
