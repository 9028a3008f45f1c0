"""Which groups go for a target: scores against autograd, the lowest first, widths in multiples."""

from __future__ import annotations

import pytest
import torch
from coupled import Encoder, seeded
from torch import nn

from lightning_sparse import coupling, surgery
from lightning_sparse.shrinking import GroupScores, choose, remove, share_of
from lightning_sparse.shrinking.report import count_multiply_adds

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.randn(6, 3, generator=torch.Generator().manual_seed(2))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def test_scores_are_the_squared_slopes_in_a_factor_on_each_neuron() -> None:
    """Compared with autograd in an explicit factor s on the first hidden layer, averaged over single samples."""
    model = network()
    scores = GroupScores(coupling.groups(model, X))
    total = torch.zeros(16)
    for x, y in zip(X.split(1), Y.split(1), strict=True):
        model.zero_grad()
        (model(x) - y).square().sum().backward()
        scores.update(model)
        s = torch.ones(16, requires_grad=True)
        hidden = model[1](model[0](x)) * s
        (slope,) = torch.autograd.grad((model[2:](hidden) - y).square().sum(), s)
        total += slope.square() / len(X)
    found = scores.values()
    torch.testing.assert_close(torch.tensor([found[f"0[{i}]"] for i in range(16)]), total, rtol=1e-4, atol=1e-7)


def test_no_gradient_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gradients were recorded"):
        GroupScores(coupling.groups(network(), X)).values()


@pytest.mark.slow
@pytest.mark.parametrize(("share", "unit"), [(0.5, 4), (0.8, 1), (0.3, 2), (0.0, 4)])
def test_the_lowest_go_until_the_target_is_met(share: float, unit: int) -> None:
    model = network()
    groups = coupling.groups(model, X)
    scores = {group.name: float(int(group.name.partition("[")[2][:-1])) for group in groups}
    target = int(share * count_multiply_adds(model, X))
    chosen = choose(model, X, groups, scores, target, unit)
    smaller = remove(model, X, groups, chosen, unit)
    widths = [layer.out_features for layer in smaller if isinstance(layer, nn.Linear)][:-1]
    assert all(width % unit == 0 and width >= unit for width in widths)
    assert share == 0.0 or count_multiply_adds(smaller, X) <= target
    assert torch.equal(smaller[4].weight, model[4].weight[:, 12 - widths[1] :])  # those of the lowest numbers went
    if share == 0.0:
        assert widths == [unit, unit]


@pytest.mark.slow
def test_heads_go_one_by_one() -> None:
    model, tokens = seeded(Encoder).eval(), torch.randn(2, 5, 12)
    groups = coupling.groups(model, tokens)
    scores = {group.name: 0.0 if group.name == "heads[1]" else 1e9 for group in groups}
    target = count_multiply_adds(model, tokens) - 1
    smaller = remove(model, tokens, groups, choose(model, tokens, groups, scores, target), 8)
    assert smaller.num_heads == 2
    assert torch.equal(smaller.q.weight, torch.cat([model.q.weight[:4], model.q.weight[8:]]))


def test_the_share_of_groups_is_that_of_their_zeros() -> None:
    """Two of twelve neurons: their rows and biases in layer 2, their columns in layer 4; layer 0 and the last bias hold no groups of it."""
    model = network()
    members = [group for group in coupling.groups(model, X) if group.axis == "2"]
    zeroed = surgery.duplicate(model)
    with torch.no_grad():
        for tensor in (zeroed[2].weight, zeroed[2].bias, zeroed[4].weight.T):
            tensor[[3, 7]] = 0.0
    counted = (zeroed[2].weight, zeroed[2].bias, zeroed[4].weight)
    zeros, total = sum(int((p == 0).sum()) for p in counted), sum(p.numel() for p in counted)
    assert share_of(model, members, [members[3], members[7]]) == pytest.approx(zeros / total)
    with pytest.raises(ValueError, match="no weights to count"):
        share_of(model, [], [])
