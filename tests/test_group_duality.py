"""The duality of groups without sampling: all masks of a small least-squares problem, for every structure and separable penalty."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_enumeration import SEPARABLE
from torch import Tensor, nn
from toys import several

from lightning_sparse import duality, numeric, penalties, structure
from lightning_sparse._group_curvature import GroupCurvature
from lightning_sparse._parts import part_of
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.grouped import GroupAttachment, GroupedWeights, Groups
from lightning_sparse.methods.mask import MaskFormula
from lightning_sparse.structure import Structure
from lightning_sparse.weights import WeightStore

LAM = 0.2
STRUCTURES = [structure.Rows(), structure.Columns(), structure.Blocks((1, 3)), structure.Blocks((2, 2))]
every_structure = pytest.mark.parametrize("grouping", STRUCTURES, ids=repr)
every_penalty = pytest.mark.parametrize("row", several({repr(row): row for row in SEPARABLE}, "LogSum(eps=2.0)"))


def problem(scales: tuple[float, ...] = (0.4, 0.7, 1.5, 2.0, 0.9)) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs (12, 5) with columns of these scales, targets (12, 2) and weights (2, 5)."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    X = X @ torch.randn(5, 5, dtype=torch.float64, generator=generator)  # correlated, so that the diagonal of H is not all of it
    X = X / X.square().mean(0).sqrt() * torch.tensor(scales, dtype=torch.float64)
    w = torch.tensor([[0.8, -0.1, 0.3, 0.6, -1.7], [0.03, 0.5, -0.9, 1.1, 0.2]], dtype=torch.float64)
    return X, torch.randn(12, 2, dtype=torch.float64, generator=generator), w


def whitened() -> tuple[Tensor, Tensor, Tensor]:
    """Return the problem with X^T X / n = I: unit curvature of every group."""
    X, y, w = problem()
    return torch.linalg.qr(X)[0] * len(X) ** 0.5, y, w


def loss(design: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (y - design @ w.t()).square().sum() / (2 * len(y))


def expected(design: Tensor, y: Tensor, w: Tensor, grouping: Structure, alpha: Tensor) -> Tensor:
    """Compute E_s L(s * w) over all masks of the groups, with s_g = 1 / alpha_g at probability alpha_g, else 0."""
    total = torch.zeros((), dtype=torch.float64)
    for kept in itertools.product([0.0, 1.0], repeat=alpha.numel()):
        drawn = torch.tensor(kept, dtype=torch.float64).reshape(alpha.shape)
        chance = torch.where(drawn > 0, alpha, 1 - alpha).prod()
        if chance > 0:
            total = total + chance * loss(design, y, w * grouping.spread(numeric.quotient(drawn, alpha), w))
    return total


def sizes(w: Tensor, grouping: Structure) -> Tensor:
    """Return the root mean squares, by loops over the weights of each group."""
    index = torch.arange(w.numel(), dtype=torch.float64).reshape(w.shape)
    number = grouping.pool(torch.ones_like(w))
    label = grouping.spread(torch.arange(number.numel(), dtype=torch.float64).reshape(number.shape), w).expand_as(w)
    found = torch.stack([w[label == g].square().mean().sqrt() for g in range(number.numel())])
    assert index.numel() == sum(int((label == g).sum()) for g in range(number.numel()))
    return found.reshape(number.shape)


def curvature(design: Tensor, w: Tensor, grouping: Structure) -> Tensor:
    """Return w_g^T H_gg w_g / |w_g|^2 by the second derivative of the loss in the mask."""
    groups = grouping.pool(torch.ones_like(w))
    y, ones = torch.zeros(len(design), 2, dtype=torch.float64), torch.ones(groups.numel(), dtype=torch.float64)
    H = torch.autograd.functional.hessian(lambda s: loss(design, y, w * grouping.spread(s.reshape(groups.shape), w)), ones)
    return H.diagonal().reshape(groups.shape) / grouping.pool(w * w)  # type: ignore[no-any-return]


def rule_and_penalty(row: Penalty | MaskRule) -> tuple[float, Penalty]:
    return (row.lam, duality.to_penalty(row)) if isinstance(row, MaskRule) else (LAM, row)


def cost(penalty: Penalty, lam: float, w: Tensor, grouping: Structure) -> Tensor:
    """Return (lam / 2) sum |w_g|^2 / eta_hat(r_g)."""
    return lam / 2 * numeric.quotient(grouping.pool(w * w), penalty.eta_hat(sizes(w, grouping))).sum()


@every_structure
@every_penalty
def test_all_masks_equal_the_penalty_of_the_groups(row: Penalty | MaskRule, grouping: Structure) -> None:
    X, y, w = whitened()
    lam, penalty = rule_and_penalty(row)
    alpha = duality.keep_probability(penalty.eta_hat(sizes(w, grouping)), lam)
    torch.testing.assert_close(expected(X, y, w, grouping, alpha), loss(X, y, w) + cost(penalty, lam, w, grouping), rtol=1e-12, atol=1e-12)


@every_structure
@every_penalty
def test_calibrated_masks_equal_it_at_any_columns(row: Penalty | MaskRule, grouping: Structure) -> None:
    X, y, w = problem()
    lam, penalty = rule_and_penalty(row)
    formula = MaskFormula(penalty, ceiling=torch.inf)
    alpha = formula.keep_probability(sizes(w, grouping), curvature(X, w, grouping), lam, 0.0)
    torch.testing.assert_close(expected(X, y, w, grouping, alpha), loss(X, y, w) + cost(penalty, lam, w, grouping), rtol=1e-12, atol=1e-12)


@every_structure
def test_mutants_are_rejected(grouping: Structure) -> None:
    """The norm in the place of the root mean square, and the diagonal of H in the place of F_g."""
    X, y, w = problem()
    penalty = penalties.LogSum(2.0)
    wanted = loss(X, y, w) + cost(penalty, LAM, w, grouping)
    formula, size, H = MaskFormula(penalty, torch.inf), sizes(w, grouping), curvature(X, w, grouping)
    norm = grouping.pool(w * w).sqrt()
    diagonal = X.square().mean(0).expand_as(w)
    of_diagonal = grouping.pool(diagonal) / grouping.pool(torch.ones_like(w))
    assert abs(expected(X, y, w, grouping, formula.keep_probability(norm, H, LAM, 0.0)) - wanted) > 1e-2
    columns = grouping == structure.Columns()  # the weights of a column have one curvature
    off = abs(expected(X, y, w, grouping, formula.keep_probability(size, of_diagonal, LAM, 0.0)) - wanted)
    assert (off < 1e-12) if columns else (off > 1e-3)


@every_structure
def test_measured_curvature_is_the_second_derivative(grouping: Structure) -> None:
    """Residuals of +-1 in all combinations have the curvature of the loss, exactly."""
    X, _, w = problem()
    net = nn.Linear(5, 2, bias=False).double()
    net.weight.data.copy_(w)
    store = WeightStore()
    store.parameters = {"weight": net.weight}
    attachment = store.attach(net, [torch.optim.SGD(net.parameters(), 0.1)], lambda name: net.weight.detach())
    weights = GroupedWeights(store, Groups({"weight": [part_of(grouping, "weight")]}))
    observed = GroupCurvature(GroupAttachment(attachment, weights), net, lambda leader: True)
    found = torch.zeros_like(grouping.pool(w))
    signs = list(itertools.product([-1.0, 1.0], repeat=2))
    for sign in signs:
        observed.add("weight", net, X, torch.tensor(sign, dtype=torch.float64).expand(12, 2) / 12, samples=12)
        squares, rows, used = observed.settled()["weight"]
        found += 12 * squares * rows / used / len(signs)
    torch.testing.assert_close(found, curvature(X, w, grouping), rtol=1e-12, atol=1e-12)


@every_penalty
def test_gradient_of_the_penalty_is_along_the_weights(row: Penalty | MaskRule) -> None:
    _, _, w = problem()
    _, penalty = rule_and_penalty(row)
    grouping = structure.Blocks((1, 3))
    leaf = w.clone().requires_grad_()
    count = grouping.pool(torch.ones_like(w))
    (count * penalty.omega((grouping.pool(leaf * leaf) / count).sqrt())).sum().backward()
    factor = penalty.gradient(sizes(w, grouping)) / sizes(w, grouping)
    torch.testing.assert_close(leaf.grad, w * grouping.spread(factor, w), rtol=1e-5, atol=1e-9)


def test_a_mask_before_batch_norm_does_nothing() -> None:
    """The row of a layer before batch norm is scale-free: the mask belongs to batch norm's weight and bias."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3, eps=1e-12)).double()
    x = torch.randn(12, 5).double()
    before = net(x).detach()
    net[0].weight.data[1] *= 3  # type: ignore[index]
    torch.testing.assert_close(net(x).detach(), before)
    net[1].weight.data[1] *= 3  # type: ignore[index]
    assert float((net(x) - before).detach().abs().max()) > 1
