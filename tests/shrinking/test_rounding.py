"""Widths rounded to the multiple whose network is measured to be the fastest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_sparse
from lightning_sparse.export import latency
from lightning_sparse.shrinking import rounding, shrink_and_report

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def wide(width: int) -> nn.Module:
    return nn.Linear(4, width)


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], again: float = 1.0) -> list[list[str]]:
    """Make measurements return these seconds; return the lists of names that were measured."""
    measured: list[list[str]] = []

    def time_all(modules: dict[str, nn.Module], inputs: Any, budget: float, device: Any) -> dict[str, latency.Timing]:
        measured.append([*modules])
        found = {name: latency.Timing(seconds[name], 1.0, 1.0, 1.0) for name in modules}
        return found | {latency.AGAIN: latency.Timing(1.0, again, again, again)}

    monkeypatch.setattr(rounding, "time_all", time_all)
    return measured


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = timed(monkeypatch, {"1": 1.0, "4": 0.9, "8": 0.6, "16": 0.7, "32": 0.65})
    found = rounding.fastest(lambda unit: wide(100 + unit), X)
    assert found is not None
    assert (found.unit, found.module.out_features) == (8, 108)
    assert found.seconds == {1: 1.0, 4: 0.9, 8: 0.6, 16: 0.7, 32: 0.65}
    assert measured == [["1", "4", "8", "16", "32"]]
    assert "multiples of 8, measured (1: 1000.000 ms" in str(found)


def test_of_networks_as_fast_the_smallest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"1": 1.0, "4": 0.609, "8": 0.6, "16": 0.7, "32": 0.65}
    timed(monkeypatch, seconds)
    found = rounding.fastest(lambda unit: wide(100 + unit), X)
    assert found is not None
    assert found.unit == 4
    timed(monkeypatch, seconds, again=0.8)  # on a machine on which a network differs by a fifth from itself
    found = rounding.fastest(lambda unit: wide(100 + unit), X)
    assert found is not None
    assert found.unit == 4
    timed(monkeypatch, seconds | {"1": 0.7}, again=0.8)
    found = rounding.fastest(lambda unit: wide(100 + unit), X)
    assert found is not None
    assert found.unit == 1


def test_equal_networks_are_measured_once_and_multiples_that_remove_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = timed(monkeypatch, {"1": 1.0, "8": 2.0})
    found = rounding.fastest(lambda unit: None if unit > 8 else wide(13 if unit < 8 else 16), X)
    assert found is not None
    assert measured == [["1", "8"]]
    assert rounding.fastest(lambda unit: None, X) is None


@pytest.mark.slow
def test_shrink_measures_and_keeps_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        model[0].weight[13:] = 0
        model[0].bias[13:] = 0
    found = shrink_and_report(model, X, "fastest", seconds=0)
    assert found.module[0].out_features in (13, 16, 32)
    torch.testing.assert_close(found.module(X), model(X))
    assert "widths are multiples of" in str(found.report)
    assert lightning_sparse.shrink(model, X, round_to="fastest")[0].out_features in (13, 16, 32)
    with torch.no_grad():
        model[0].weight.normal_()
    with pytest.raises(ValueError, match="none of its 64 channels, neurons and heads is zero"):
        shrink_and_report(model, X, "fastest", seconds=0)
    with pytest.raises(ValueError, match="round_to must be a whole number >= 1 or 'fastest', got 'quick'"):
        lightning_sparse.shrink(model, X, round_to="quick")
