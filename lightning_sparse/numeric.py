"""Compute dual, prox and antiderivative numerically, for penalties without closed forms.

All functions work elementwise on |w|, compute in float64, and return the dtype of their input. The relative error is below 1e-6 for
weights from LOW to HIGH; beyond them the functions continue as power laws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.elementwise import outside as outside
from lightning_sparse.elementwise import scalar_div as scalar_div

Function = Callable[[Tensor], Tensor]

LOW, HIGH = 1e-8, 1e5  # the range of |w| that tables and grids cover


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator with 0 / 0 = 0 and anything / inf = 0, because the slope is 0 at w = 0 and at eta = inf."""
    return torch.where((numerator == 0) | denominator.isinf(), torch.zeros_like(numerator), numerator / denominator)


def grid(low: float = LOW, high: float = HIGH, count: int = 4097) -> Tensor:
    """Return log-spaced |w| in float64."""
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Function, slope: Function) -> Tensor:
        ctx.save_for_backward(w)
        ctx.slope = slope
        return value(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return grads[0] * ctx.slope(w), None, None


def with_slope(w: Tensor, value: Function, slope: Function) -> Tensor:
    """Return value(w) whose autograd gradient is slope(w), for values that are tabulated, integrated or minimised numerically."""
    return _WithSlope.apply(w, value, slope)  # type: ignore[no-any-return]


def slope(function: Function, x: Tensor) -> Tensor:
    """Return function'(x), elementwise, by autograd."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(at).sum(), at)
    return found


def dual(omega: Function, eta_hat: Function, eta: Tensor) -> Tensor:
    """Return f(eta) = sup_w 2 omega(w) - w^2 / eta, at the w where eta_hat crosses eta; f(inf) = 2 omega(inf).

    The dual is infinite if the supremum is not reached by w = e^115 (ridge beyond c).
    """
    target = eta.detach().double()
    low = _crossing(eta_hat, target)
    w = torch.where(target == torch.inf, target, low.exp())
    value = 2 * omega(w) - torch.where(target == torch.inf, torch.zeros_like(w), quotient(w * w, target))
    # if eta_hat == eta over an interval (ridge at c), the value is the rounding error of two huge numbers, not a supremum
    flat = (low > 114) & (eta_hat(low.exp()) == target) & (target != torch.inf)
    value = torch.where(flat | (target == 0), torch.zeros_like(value), value.clamp(min=0))
    return torch.where(value > 1e30, torch.inf, value).to(eta.dtype)


def _crossing(eta_hat: Function, target: Tensor, rounds: int = 80) -> Tensor:
    """Find log w where the non-decreasing eta_hat crosses ``target`` (2 w (1/eta_hat - 1/target) changes sign), by bisection."""
    low, high = torch.full_like(target, -690.0), torch.full_like(target, 115.0)
    for _ in range(rounds):
        middle = (low + high) / 2
        below = eta_hat(middle.exp()) <= target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def dual_slope(f: Function, eta_hat: Function, eta: Tensor) -> Tensor:
    """Return f'(eta), by autograd if ``f`` allows it, else (w / eta)^2 at the w where eta_hat crosses eta."""
    with torch.enable_grad():
        at = eta.detach().requires_grad_()
        value = f(at)
        if value.requires_grad:
            return torch.autograd.grad(value.sum(), at)[0]
    target = eta.detach().double()
    return (_crossing(eta_hat, target).exp() / target).square().to(eta.dtype)


def prox(omega: Function, w: Tensor, step: Tensor | float, points: int = 65, rounds: int = 40) -> Tensor:
    """Return argmin_x (x - w)^2 / 2 + step * omega(x), by a grid on [0, |w|], golden section, and a comparison with zero."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("its prox is found by a search, which would take minutes to compile: omit exact=True")
    size, step64 = w.detach().double().abs(), torch.as_tensor(step, dtype=torch.float64, device=w.device)

    def objective(x: Tensor) -> Tensor:
        return (x - size) ** 2 / 2 + step64 * omega(x)

    shares = torch.linspace(0, 1, points, dtype=torch.float64, device=w.device).view(-1, *[1] * w.ndim)
    best = shares.view(-1)[objective(shares * size).argmin(0)] * size
    width = size / (points - 1)
    x = _golden(objective, (best - width).clamp(min=0), torch.minimum(best + width, size), rounds)
    x = torch.where(objective(torch.zeros_like(x)) <= objective(x), torch.zeros_like(x), x)
    return torch.where(w.isinf(), w, (x * w.detach().double().sign()).to(w.dtype))


def farther(x: Tensor, size: Tensor, cost: Tensor) -> Tensor:
    """Return True where 0 is better than x in [0, size] for (x - size)^2 / 2 + cost; an infinite size is kept."""
    return (cost >= x * (size - x / 2)) & ~size.isinf()


def _golden(objective: Function, low: Tensor, high: Tensor, rounds: int) -> Tensor:
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(rounds):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        smaller = objective(left) < objective(right)
        low, high = torch.where(smaller, low, left), torch.where(smaller, right, high)
    return (low + high) / 2


class Antiderivative:
    """F(w) = integral_0^|w| slope(t) dt by composite Gauss-Legendre quadrature on log-spaced panels.

    Below LOW and above HIGH the slope continues as the power law that it follows there. Raises ValueError, naming the
    w, if the integral diverges because the slope is infinite, or grows like 1/t or faster towards 0.
    """

    def __init__(self, slope: Function, panels: int = 4096) -> None:
        self.slope = slope
        self.edges = grid(LOW, HIGH, panels + 1)
        self.head, self.tail = self._head(), self._tail()
        pieces = integrate(slope, self.edges[:-1], self.edges[1:])
        if not pieces.isfinite().all():
            at = int((~pieces.isfinite()).nonzero()[0])
            raise ValueError(f"the integral of t (1-alpha)/alpha diverges at w = {self.edges[at]:.6g}: alpha is 0 there")
        self.sums = torch.cat([torch.zeros(1, dtype=torch.float64), pieces.cumsum(0)])

    def _head(self) -> tuple[float, float]:
        """Return the integral over [0, LOW] and the power of w that it follows."""
        at, before = self.slope(torch.tensor([LOW, LOW / 16], dtype=torch.float64)).tolist()
        if not math.isfinite(before) or not math.isfinite(at):
            raise ValueError(f"the integral of t (1-alpha)/alpha diverges at 0: alpha is 0 at w = {LOW:g}")
        exponent = math.log(at / before) / math.log(16) if at > 0 and before > 0 else 1.0
        if exponent <= -1 + 1e-6:
            raise ValueError(f"the integral of t (1-alpha)/alpha diverges at 0: near w = {LOW:g} it grows like w^{exponent:.3g}")
        return at * LOW / (1 + exponent), 1 + exponent

    def _tail(self) -> tuple[float, float]:
        """Return HIGH times the slope at HIGH, and one more than the slope's exponent there."""
        at, before = self.slope(torch.tensor([HIGH, HIGH / 16], dtype=torch.float64)).tolist()
        exponent = math.log(at / before) / math.log(16) if at > 0 and before > 0 else -1.0
        return at * HIGH, 1 + exponent

    def _beyond(self, size: Tensor) -> Tensor:
        """Return the integral from HIGH to the sizes above it."""
        scale, power = self.tail
        if scale == 0:
            return torch.zeros_like(size)
        growth = (size.clamp(min=HIGH) / HIGH).log()
        return scale * (growth if abs(power) < 1e-6 else torch.expm1(power * growth) / power)

    def __call__(self, w: Tensor) -> Tensor:
        size = w.detach().double().abs()
        inner = size.clamp(max=HIGH)
        edges, sums = self.edges.to(size.device), self.sums.to(size.device)
        panel = (torch.searchsorted(edges, inner, right=True) - 1).clamp(0, len(edges) - 1)
        within = self.head[0] + sums[panel] + integrate(self.slope, edges[panel], inner, points=3)
        below = self.head[0] * (size / LOW) ** self.head[1]
        return torch.where(size < LOW, below, within + self._beyond(size)).to(w.dtype)


def integrate(slope: Function, low: Tensor, high: Tensor, points: int = 8) -> Tensor:
    """Return the integral of ``slope`` from ``low`` to ``high``, elementwise, by Gauss-Legendre quadrature."""
    half, middle = (high - low) / 2, (high + low) / 2
    total = torch.zeros_like(low)
    for x, weight in zip(*np.polynomial.legendre.leggauss(points), strict=True):
        total = total + float(weight) * slope(middle + half * float(x))
    return total * half


def check_rule(alpha: Function) -> None:
    """Raise ValueError, naming the w, unless alpha(|w|) lies in [0, 1] and never decreases."""
    w = torch.cat([torch.zeros(1, dtype=torch.float64), grid()])
    values = alpha(w).double()
    if values.shape != w.shape:
        raise ValueError(f"keep_probability must keep the shape: got {tuple(values.shape)} for {tuple(w.shape)}")
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        at = int(outside.nonzero()[0])
        value = float(values[at])
        shown = value if f"{value:.6g}" in ("0", "1", "-0") else f"{value:.6g}"  # else 1.00000001 would read 1
        raise ValueError(f"keep_probability must lie in [0, 1]: it is {shown} at w = {w[at]:.6g}")
    check_monotone("keep_probability", w, values)


def check_monotone(name: str, w: Tensor, values: Tensor) -> None:
    """Raise ValueError naming the first w at which ``values`` decrease by more than rounding."""
    drop = values[1:] < values[:-1] * (1 - 1e-9)
    if drop.any():
        at = int(drop.nonzero()[0])
        high, low = float(values[at]), float(values[at + 1])
        digits = next(count for count in range(6, 18) if count == 17 or f"{high:.{count}g}" != f"{low:.{count}g}")
        raise ValueError(
            f"{name} decreases at w = {w[at]:.6g}: from {high:.{digits}g} to {low:.{digits}g} at w = {w[at + 1]:.6g}; "
            "the duality needs it non-decreasing in |w|"
        )
