"""Checks of the penalty contract. Each compares a formula with an independent fact and raises ContractError on a mismatch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sparse import duality, numeric
from lightning_sparse._contract import DTYPES, ContractError, close, fail, same_kind, weights
from lightning_sparse.duality import Penalty

_EDGES = (0.0, 5e-324, 1e-45, 1e-30, 1e30, float("inf"))


def _functions(penalty: Penalty, w: Tensor) -> dict[str, Tensor]:
    return {
        "omega": penalty.omega(w),
        "eta_hat": penalty.eta_hat(w),
        "gradient": penalty.gradient(w),
        "dual": penalty.dual(w.abs()),
        "prox": penalty.prox(w, 0.1),
    }


def shapes(penalty: Penalty) -> None:
    for dtype in DTYPES:
        for w in (torch.tensor(0.7, dtype=dtype), torch.zeros(0, dtype=dtype), torch.ones(2, 3, dtype=dtype)):
            for name, value in _functions(penalty, w).items():
                same_kind(penalty, name, value, w)


def even(penalty: Penalty) -> None:
    w = weights(penalty)
    for name, sign in (("omega", 1), ("eta_hat", 1), ("gradient", -1)):
        function = getattr(penalty, name)
        fail(penalty, f"{name} is not {'even' if sign > 0 else 'odd'}", w, function(-w) != sign * function(w))
    fail(penalty, "prox is not odd", w, penalty.prox(-w, 0.1) != -penalty.prox(w, 0.1))
    if float(penalty.omega(torch.zeros(1))) != 0:
        raise ContractError(f"{penalty!r}: omega(0) must be 0, it is {float(penalty.omega(torch.zeros(1))):.6g}: subtract the constant")


def edges(penalty: Penalty) -> None:
    for dtype in DTYPES:
        w = torch.tensor(_EDGES, dtype=dtype)
        for name, value in _functions(penalty, w).items():
            fail(penalty, f"{name} is NaN in {dtype}", w, value.isnan())
        nan = torch.full((1,), torch.nan, dtype=dtype)
        fail(penalty, f"prox hides NaN in {dtype}", nan, ~penalty.prox(nan, 0.1).isnan())
        leaf = w[:-1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(penalty.omega(leaf).double().clamp(max=1e300).sum(), leaf)
        fail(penalty, f"autograd of omega is NaN in {dtype}", w[:-1], slope.isnan())


def admissible(penalty: Penalty) -> None:
    try:
        duality.check_admissible(penalty)
    except ValueError as error:
        raise ContractError(str(error)) from None
    w = numeric.grid()
    fail(penalty, "omega is negative", w, penalty.omega(w) < 0)


def slope(penalty: Penalty) -> None:
    """Compare the slope of omega with w / eta_hat by autograd and by quadrature."""
    # by quadrature too, because a penalty may define its autograd by a separate formula
    w = weights(penalty).requires_grad_()
    (slope,) = torch.autograd.grad(penalty.omega(w).sum(), w)
    w = w.detach()
    expected = numeric.quotient(w, penalty.eta_hat(w))
    close(penalty, "slope: autograd of omega against w / eta_hat", w, slope, expected, 1e-6, 1e-12)
    close(penalty, "slope: gradient against w / eta_hat", w, penalty.gradient(w), expected, 1e-6, 1e-12)
    edges = numeric.grid(1e-6, 1e6, 2001)
    steep = numeric.quotient(edges, penalty.eta_hat(edges))
    rise = penalty.omega(edges).diff()
    integral = numeric.integrate(lambda t: numeric.quotient(t, penalty.eta_hat(t)), edges[:-1], edges[1:])
    jump = (steep[1:] == 0) & (steep[:-1] > 0)  # the slope may fall to 0 inside a panel
    wrong = ((rise - integral).abs() > 3e-6 * penalty.omega(edges)[1:] + 1e-15) & ~jump
    fail(penalty, "slope: the rise of omega is not the integral of w / eta_hat", edges, wrong)


def precision(penalty: Penalty) -> None:
    w = weights(penalty)[24:73].bfloat16().double()  # 1e-3 to 1e3, exact in every dtype
    for dtype, error in DTYPES.items():
        value = penalty.omega(w.to(dtype)).double()
        close(penalty, f"omega in {dtype} against float64", w, value, penalty.omega(w), error, error * 1e-3)


def _grid_dual(penalty: Penalty, eta: Tensor) -> tuple[Tensor, Tensor]:
    """Return sup_w 2 omega(w) - w^2 / eta by a grid search with one refinement, and whether it lies at the grid's upper end."""
    w = torch.cat([torch.zeros(1, dtype=torch.float64), numeric.grid(1e-9, 1e7, 2049)])
    at = (2 * penalty.omega(w) - w * w / eta[:, None]).argmax(1)
    low, high = w[(at - 1).clamp(min=0)], w[(at + 1).clamp(max=len(w) - 1)]
    near = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 513, dtype=torch.float64)
    return (2 * penalty.omega(near) - near * near / eta[:, None]).max(1).values.clamp(min=0), at == len(w) - 1


def dual(penalty: Penalty) -> None:
    eta = torch.logspace(-5, 5, 101, dtype=torch.float64)
    wanted, open_end = _grid_dual(penalty, eta)
    value = penalty.dual(eta)
    where = ~open_end
    close(
        penalty,
        "dual against a grid search of 2 omega - w^2 / eta (w below stands for eta)",
        eta[where],
        value[where],
        wanted[where],
        1e-5,
        1e-12,
    )
    fail(penalty, "dual is below 2 omega - w^2 / eta (w stands for eta)", eta, value < wanted * (1 - 1e-5) - 1e-12)
    zero = float(penalty.dual(torch.zeros(1)))
    if zero != 0:
        raise ContractError(f"{penalty!r}: dual(0) must be 0, it is {zero:.6g}")


def dual_slope(penalty: Penalty) -> None:
    """Compare f' with (w / eta)^2 at eta = eta_hat(w), and with difference quotients of f."""
    w = weights(penalty)[16:81]  # 1e-4 to 1e4
    eta = penalty.eta_hat(w)
    inner = (eta > 0) & (eta < torch.inf) & (eta.diff(prepend=eta[:1]) > 0)  # one w for each eta
    at, wanted = eta[inner], (w[inner] / eta[inner]).square()
    close(penalty, "dual_slope against (w / eta)^2 (w below stands for eta)", at, penalty.dual_slope(at), wanted, 1e-4, 1e-12)
    middle = torch.logspace(-4, 4, 65, dtype=torch.float64)
    value = penalty.dual(middle)
    step = 1e-3 * middle
    steep = [penalty.dual_slope(middle + share * step) for share in (-1, 1)]
    rise = (penalty.dual(middle + step) - penalty.dual(middle - step)) / (2 * step)
    low, high = torch.minimum(*steep), torch.maximum(*steep)  # bounds of the difference quotient, because f is concave
    slack = 1e-3 * high.abs() + 1e-9 * value / middle + 1e-12
    wrong = torch.isfinite(value) & torch.isfinite(rise) & ((rise < low - slack) | (rise > high + slack))
    fail(penalty, "dual_slope is not the slope of dual (w stands for eta)", middle, wrong)


def eta_trick(penalty: Penalty) -> None:
    w = weights(penalty)[16:81]  # 1e-4 to 1e4
    best = penalty.eta_hat(w)
    value = penalty.omega(w)
    gap = duality.gap(penalty, w, best)
    fail(penalty, "eta-trick: the gap is not 0 at eta_hat", w, ~(gap.abs() <= 1e-6 * value + 1e-12))
    eta = torch.cat([torch.logspace(-10, 10, 2001, dtype=torch.float64), torch.tensor([torch.inf], dtype=torch.float64)])
    bound = (w[:, None] ** 2 / eta + penalty.dual(eta)) / 2
    fail(penalty, "eta-trick: (w^2 / eta + f) / 2 falls below omega", w, bound.min(1).values < value * (1 - 1e-6) - 1e-12)


def prox(penalty: Penalty) -> None:
    w = torch.tensor([1e-3, 0.03, 0.2, 0.45, 0.8, 1.1, 1.7, 2.6, 4.0, 30.0], dtype=torch.float64)
    shares = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
    for step in (1e-3, 0.1, 0.7, 2.5, 8.0):
        x = penalty.prox(w, step)
        fail(penalty, f"prox leaves [0, w] with step {step:g}", w, ~((x >= 0) & (x <= w)))
        on_grid = (shares * w - w) ** 2 / 2 + step * penalty.omega(shares * w)
        at_prox = (x - w) ** 2 / 2 + step * penalty.omega(x)
        fail(penalty, f"prox is worse than a grid search with step {step:g}", w, at_prox > on_grid.min(0).values * (1 + 1e-9) + 1e-14)
    w, steps = w[3:10:3], torch.tensor([0.1, 0.9, 4.0], dtype=torch.float64)
    one_by_one = torch.cat([penalty.prox(at[None], float(step)) for at, step in zip(w, steps, strict=True)])
    close(penalty, "prox with a step for each weight", w, penalty.prox(w, steps), one_by_one, 1e-7, 1e-12)


ALL = (shapes, even, admissible, edges, slope, precision, dual, eta_trick, dual_slope, prox)


def coupled(penalty: Penalty) -> None:
    """Check a penalty that is not separable: the contract for the sum over the weights of a tensor."""
    w = weights(penalty)
    if float(penalty.omega(torch.zeros_like(w)).sum()) != 0:
        raise ContractError(f"{penalty!r}: omega(0) must be 0")
    for dtype in DTYPES:
        same_kind(penalty, "eta_hat", penalty.eta_hat(w.to(dtype)), w.to(dtype))
    fail(penalty, "eta_hat is not even", w, penalty.eta_hat(-w) != penalty.eta_hat(w))
    fail(penalty, "eta_hat is not >= 0", w, ~(penalty.eta_hat(w) >= 0))
    value = float(penalty.omega(w).sum())
    if value < torch.inf:  # inf: w lies outside the domain of an indicator, so there is no gradient
        leaf = w.clone().requires_grad_()
        (slope,) = torch.autograd.grad(penalty.omega(leaf).sum(), leaf)
        close(penalty, "slope: autograd of omega against w / eta_hat", w, slope, numeric.quotient(w, penalty.eta_hat(w)), 1e-6, 1e-12)
        gap = float(duality.gap(penalty, w, penalty.eta_hat(w)))
        if not abs(gap) <= 1e-6 * value + 1e-9:
            raise ContractError(f"{penalty!r}: eta-trick: the gap at eta_hat must be 0, it is {gap:.6g}")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        eta = torch.rand(w.shape, dtype=w.dtype, generator=generator) * 4
        if float(w.square().div(eta).sum() + penalty.dual(eta)) / 2 < value * (1 - 1e-9) and value < torch.inf:
            raise ContractError(f"{penalty!r}: eta-trick: (w^2 / eta + f) / 2 falls below omega at eta = {eta.tolist()}")
