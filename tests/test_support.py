"""Zeros that are frozen, held or cut stay zero after an optimiser's step, in a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.methods import ReweightedGradient, Run
from lightning_sparse.penalties import LogSum
from lightning_sparse.schedules import Constant
from lightning_sparse.step import Strength
from lightning_sparse.structure import Channels


@pytest.mark.parametrize("kind", ["frozen", "held", "cut"])
def test_a_step_leaves_zeros_of_the_support_at_zero(kind: str) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 0.0, -2.0, 0.0]))
    method, optimizer = ReweightedGradient(LogSum(0.5)), torch.optim.SGD([weight], 0.1)
    support = Run.alone(method, {"w": weight}, Strength(Constant(1e-3))).support
    kept: dict[str, Tensor] = {"w": weight.detach() != 0}
    setattr(support, kind, kept)
    weight.grad = torch.ones(4)
    optimizer.step()
    support.hold_(optimizer)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, 0.0, -2.1, 0.0]))


def test_removal_by_rank_leaves_a_parameter_to_train_most_of_whose_weights_rest_near_zero() -> None:
    values = [1.0, 0.5, 1e-4, 1e-4, 0.3, 1e-4, 1e-4, 1e-4]
    weight = nn.Parameter(torch.tensor(values))
    support = Run.alone(ReweightedGradient(LogSum(0.5)), {"w": weight}, Strength(Constant(1e-3))).support
    support.threshold = 1e-3  # five weights count as zero, by the size that they have now
    support.prune_to(0.75)
    assert support.cut["w"].tolist() == [True, True, True, True, False, True, True, True]  # one of the others is removed
    assert support.share_of_zeros() == 0.75
    with torch.no_grad():
        weight.copy_(torch.tensor([1.0, 0.5, 1e-4, 0.1, 0.0, 0.2, 0.3, 1e-4]))  # three have grown
    support.prune_to(0.75)
    assert support.cut["w"].tolist() == [True, True, False, False, False, False, False, False]  # as in a trained parameter


def test_removal_by_rank_takes_whole_groups_where_most_of_them_rest_near_zero() -> None:
    """Four of six neurons count as zero; half of the weights goes with whole neurons, none of which is left to train."""
    network = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, 0.5, 1e-4, 2e-4, 3e-4, 4e-4])[:, None].expand(6, 4))
    parameters, strength = {f"{name}.weight": network[name].weight for name in (0, 2)}, Strength(Constant(1e-3))
    support = Run.alone(ReweightedGradient(LogSum(0.5)), parameters, strength, Channels(), network, torch.ones(1, 4)).support
    support.threshold = 1e-3
    support.prune_to(0.5)
    alive = torch.tensor([True, True, False, False, False, True])
    assert torch.equal(support.cut["0.weight"], alive[:, None].expand(6, 4))
    assert torch.equal(support.cut["2.weight"], alive.expand(2, 6))
