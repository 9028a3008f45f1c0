"""Which penalties the duality admits, and what each can promise: derived numerically from omega and eta_hat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_sparse import numeric
from lightning_sparse.duality import Penalty

_REMEDY = {
    "zero": "shrinks only: no weight falls below a keep probability by itself; name a magnitude threshold",
    "finite": "exact zeros: a weight rests at 0 while |dL/dw| < lam * omega'(0+)",
    "infinite": "exact zeros, and zero is absorbing: a weight at 0 does not come back",
}


@dataclass(frozen=True)
class FinePrint:
    """What a penalty's shape promises.

    ``slope_at_zero`` is omega'(0+) = lim w / eta_hat(w); ``kind`` its class, "zero", "finite" or "infinite";
    ``unbiased`` says whether w / eta_hat(w) -> 0 for large w, so that large weights are not shrunk.
    """

    slope_at_zero: float
    kind: str
    unbiased: bool

    def __str__(self) -> str:
        return f"{_REMEDY[self.kind]}; large weights are {'unbiased' if self.unbiased else 'shrunk'}"


def fine_print(penalty: Penalty) -> FinePrint:
    """Classify a separable penalty by its slope near 0 and far out, read off powers of w.

    Raises ValueError for a penalty that is not separable: its slope at one weight depends on the others.
    """
    if not penalty.separable:
        raise ValueError(f"{penalty!r} is not separable: it has no slope of its own at a single weight")
    near = torch.tensor([1e-100, 1e-110], dtype=torch.float64)
    slopes = penalty.gradient(near)
    kind = "infinite" if _jumps(penalty) else _kind(_exponent(near, slopes))
    slope = {"zero": 0.0, "infinite": math.inf}.get(kind, float(slopes[1]))
    return FinePrint(slope, kind, _unbiased(penalty))


def _exponent(w: torch.Tensor, values: torch.Tensor) -> float:
    """k where values ~ w^k between the two given points; +inf where the second vanishes."""
    if values[1] == 0 or values[0] == 0:
        return math.inf
    return float((values[0] / values[1]).log() / (w[0] / w[1]).log())


def _kind(exponent: float) -> str:
    return "finite" if abs(exponent) < 1e-6 else "zero" if exponent > 0 else "infinite"


def _jumps(penalty: Penalty) -> bool:
    """omega is discontinuous at 0 (an L0 term): no continuous penalty is worth half of omega(1e-6) at 1e-100."""
    tiny, small = penalty.omega(torch.tensor([1e-100, 1e-6], dtype=torch.float64)).tolist()
    return bool(tiny > 0.5 * small > 0)


def _unbiased(penalty: Penalty) -> bool:
    """The slope falls like a power of w far out; nearer pairs serve where eta_hat is inf to rounding at the far ones."""
    for pair in ([1e60, 1e50], [1e30, 1e25], [1e6, 1e4]):
        far = torch.tensor(pair, dtype=torch.float64)
        slopes = penalty.gradient(far)
        if slopes.isfinite().all() and (slopes > 0).all():
            return _exponent(far, slopes) < -1e-6
    return True


def check_admissible(penalty: Penalty) -> None:
    """Raise ValueError, naming the w, unless eta_hat is >= 0 and non-decreasing: the penalty is then subquadratic."""
    w = numeric.grid()
    values = penalty.eta_hat(w).double()
    wrong = ~(values >= 0)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{penalty!r}: eta_hat must be >= 0, it is {values[at]:.6g} at w = {w[at]:.6g}")
    try:
        numeric.check_monotone("eta_hat", w, values)
    except ValueError as error:
        raise ValueError(f"{penalty!r} is not subquadratic: {error}") from None
