"""Updates that are made piece by piece are those of whole tensors, whatever the size of a piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_form import every_form
from toys import Toy, data, trainer, weights

from lightning_sparse import _pieces


def trained(form: Callable[[], Any], size: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(_pieces, "SIZE", size)
    torch.manual_seed(0)
    module = Toy(optimizer=lambda parameters: torch.optim.Adam(parameters, 0.02))
    trainer(form(), epochs=3).fit(module, data(48))
    return weights(module)


@pytest.mark.slow
@every_form
def test_the_size_of_a_piece_changes_no_step(form: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cut, whole = (trained(form, size, monkeypatch) for size in (3, 1 << 16))
    for name in whole:  # exp and log of a piece's last elements are computed by another routine: to the last digit but one
        torch.testing.assert_close(cut[name], whole[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "lie", [lambda t: t, lambda t: t.to(memory_format=torch.channels_last), lambda t: t[:, ::2], lambda t: t.transpose(0, 1)]
)
def test_every_element_comes_once_and_is_written_in_place(
    lie: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pieces, "SIZE", 5)
    target, source = lie(torch.zeros(3, 4, 2, 2)), lie(torch.arange(48.0).view(3, 4, 2, 2))
    for into, part in _pieces.pieces(target, source):
        into.add_(part)
    assert torch.equal(target, source)
    doubled = _pieces.mapped(lambda one, other: one + other, target, source)
    assert torch.equal(doubled, 2 * source)
    assert doubled.dtype == source.dtype


def test_tensors_that_lie_in_memory_unalike_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pieces, "SIZE", 5)
    one, other = torch.zeros(4, 6), torch.arange(24.0).view(6, 4).t()
    assert [(len(a), len(b)) for a, b in _pieces.pieces(one, other)] == [(4, 4)]
    assert torch.equal(_pieces.mapped(torch.add, one, other), other)
    assert len(list(_pieces.pieces(one, one))) == -(-24 // (5 * torch.get_num_threads()))


def test_a_result_of_another_dtype_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pieces, "SIZE", 3)
    w = torch.tensor([[-1.0, 0.0, 2.0, 3.0] * 4])
    assert torch.equal(_pieces.mapped(lambda part: part > 1, w), w > 1)
