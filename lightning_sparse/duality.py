r"""Convert between penalties and adaptive masks by the eta-duality.

A *subquadratic* penalty omega (concave and non-decreasing in w^2) is a minimum over eta ("eta-trick"),

    omega(w) = min_{eta >= 0} (w^2 / eta + f(eta)) / 2,        eta_hat(w) = |w| / omega'(|w|),

and a mask that keeps w with probability alpha = eta / (eta + lam) adds (lam / 2) w^2 / eta to a loss of unit
curvature. So ``alpha(w) = 1 / (1 + lam / eta_hat(w))`` turns a penalty into a mask rule and
``lam * omega(w) = integral_0^|w| t (1 - alpha(t)) / alpha(t) dt`` turns a rule into a penalty.

Source: LeJeune, Javadi, Baraniuk, "The Flip Side of the Reweighted Coin", NeurIPS 2021, arXiv 2106.07769.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks, _pictures, elementwise, numeric
from lightning_sparse._construction import Constructed, brief, typed
from lightning_sparse.elementwise import scalar_div

Examples = tuple[dict[str, Any], ...]


def keep_probability(eta: Tensor, lam: float) -> Tensor:
    """Return alpha = 1 / (1 + lam / eta), elementwise: 0 at eta = 0, 1 at eta = inf, never NaN.

    Raises ValueError unless ``lam`` is a finite number > 0.
    """
    return alpha_of(eta, _checks.positive("lam", lam))


def alpha_of(eta: Tensor, lam: float | Tensor) -> Tensor:
    """Compute :func:`keep_probability` without its check, for a ``lam`` that may be a 0-d tensor."""
    return scalar_div(lam, eta).add_(1).reciprocal_()


def eta(alpha: Tensor, lam: float) -> Tensor:
    """Return eta = lam alpha / (1 - alpha), elementwise, the inverse of :func:`keep_probability`; inf at alpha = 1."""
    return _checks.positive("lam", lam) * alpha / (1 - alpha)


class Penalty(metaclass=Constructed):
    """An even, subquadratic penalty with ``omega(0) == 0``. It does not know the strength, the module or the step.

    A subclass is a frozen dataclass that defines :meth:`omega` and :meth:`eta_hat`; the other methods have numeric defaults, which
    closed forms may override. ``examples`` holds keyword arguments for the contract tests, the plots and the docs.
    """

    examples: ClassVar[Examples] = ()
    separable: ClassVar[bool] = True  # False: the value at one weight depends on the others

    def __repr__(self) -> str:
        return typed(self)

    def _repr_html_(self) -> str | None:
        return _picture(self, 1.0)

    @abstractmethod
    def omega(self, w: Tensor) -> Tensor:
        """Return the penalty of each weight, same shape and dtype as ``w``; zero at zero."""

    @abstractmethod
    def eta_hat(self, w: Tensor) -> Tensor:
        """Return the minimiser |w| / omega'(|w|) in [0, inf] of the eta-trick, same shape and dtype as ``w``."""

    def dual(self, eta: Tensor) -> Tensor:
        """Return f(eta) = sup_w 2 omega(w) - w^2 / eta, same shape and dtype as ``eta``; a scalar if not separable."""
        self._need_separable("dual")
        return numeric.dual(self.omega, self.eta_hat, eta)

    def dual_slope(self, eta: Tensor) -> Tensor:
        """Return f'(eta) = (w / eta)^2 at the w whose eta_hat is eta (0 < eta < inf); same shape and dtype as ``eta``."""
        self._need_separable("dual_slope")
        return numeric.dual_slope(self.dual, self.eta_hat, eta)

    def gradient(self, w: Tensor) -> Tensor:
        """Return w / eta_hat(w), the signed slope of omega; zero at w = 0."""
        return numeric.quotient(w, self.eta_hat(w))

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        """Return argmin_x (x - w)^2 / 2 + step * omega(x), elementwise; ``step`` broadcasts against ``w``."""
        self._need_separable("prox")
        return numeric.prox(self.omega, w, step)

    def _need_separable(self, what: str) -> None:
        if not self.separable:
            raise ValueError(f"{brief(self)} is not separable and defines no {what} of its own; there is no numeric default for it")


class MaskRule(metaclass=Constructed):
    """A non-decreasing keep probability alpha(|w|) at strength ``lam`` (1 for a rule of its own)."""

    examples: ClassVar[Examples] = ()
    separable: ClassVar[bool] = True
    lam: float = 1.0

    def __repr__(self) -> str:
        return typed(self)

    def _repr_html_(self) -> str | None:
        return _picture(self, self.lam)

    @abstractmethod
    def keep_probability(self, w: Tensor) -> Tensor:
        """Return alpha(w) in [0, 1], same shape and dtype as ``w``."""

    def eta_hat(self, w: Tensor) -> Tensor:
        """Return eta_hat(w) = lam alpha / (1 - alpha) of the equivalent penalty."""
        return eta(self.keep_probability(w), self.lam)

    def to_penalty(self) -> Penalty:
        """Return the penalty with lam * omega(w) = integral of t (1 - alpha) / alpha; closed forms override this.

        Raises ValueError for a rule that is not separable, because w / eta_hat(w) is then not a gradient in general.
        """
        if not self.separable:
            raise ValueError(f"{brief(self)} has no penalty: it is not separable, and w / eta_hat(w) need not be a gradient")
        return RulePenalty(self)


@dataclass(frozen=True)
class PenaltyRule(MaskRule):
    """The mask form of ``penalty`` at strength ``lam``: alpha(w) = 1 / (1 + lam / eta_hat(w)).

    Args:
        penalty: the penalty.
        lam: its strength.
    """

    penalty: Penalty
    lam: float = 1.0

    def __post_init__(self) -> None:
        _checks.positive("lam", self.lam)

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return self.penalty.separable

    def keep_probability(self, w: Tensor) -> Tensor:
        return keep_probability(self.penalty.eta_hat(w), self.lam)

    def eta_hat(self, w: Tensor) -> Tensor:
        return self.penalty.eta_hat(w)

    def to_penalty(self) -> Penalty:
        return self.penalty


@dataclass(frozen=True)
class CallableRule(MaskRule):
    """A plain function alpha(|w|) as a mask rule at lam = 1.

    Args:
        alpha: the function; it is called with weights from 0 to 1e18 (so that w^2 is finite).
    """

    alpha: Callable[[Tensor], Tensor]

    def keep_probability(self, w: Tensor) -> Tensor:
        return self.alpha(w.abs().clamp(max=1e18))


@dataclass(frozen=True)
class RulePenalty(Penalty):
    """The penalty of a mask rule, by quadrature: lam * omega(w) = integral_0^|w| t (1 - alpha(t)) / alpha(t) dt.

    Raises ValueError, naming the w, for a rule that decreases, leaves [0, 1], or whose integral diverges at 0.

    Args:
        rule: the mask rule.
    """

    rule: MaskRule

    def __post_init__(self) -> None:
        numeric.check_rule(self.rule.keep_probability)
        object.__setattr__(self, "_omega", numeric.Antiderivative(self._slope))

    def _slope(self, t: Tensor) -> Tensor:
        return numeric.quotient(t, self.rule.eta_hat(t))

    def omega(self, w: Tensor) -> Tensor:
        return numeric.with_slope(w, self._omega, self.gradient)  # type: ignore[attr-defined]

    def eta_hat(self, w: Tensor) -> Tensor:
        return self.rule.eta_hat(w)


def to_mask_rule(penalty: Penalty | MaskRule, lam: float) -> MaskRule:
    """Return the mask form of a penalty: a rule with alpha(w) = 1 / (1 + lam / eta_hat(w)) that stores ``lam``."""
    return PenaltyRule(to_penalty(penalty), lam)


def to_penalty(rule: Penalty | MaskRule | Callable[[Tensor], Tensor]) -> Penalty:
    """Return the penalty form of a mask rule or of a plain callable alpha(|w|); a penalty is returned as it is.

    ``to_penalty(to_mask_rule(p, lam))`` is ``p``. Raises ValueError naming the w where the rule decreases or where its
    integral diverges, and for a non-separable rule that is no gradient field; TypeError for anything else.
    """
    if isinstance(rule, Penalty):
        return rule
    if isinstance(rule, MaskRule):
        return rule.to_penalty()
    if callable(rule) and not isinstance(rule, type):
        return RulePenalty(CallableRule(rule))
    raise TypeError(f"expected a Penalty, a MaskRule or a function alpha(w), got {rule!r}; did you forget to call it?")


def _picture(given: Penalty | MaskRule, lam: float) -> str | None:
    """Return HTML with omega and alpha from w = 0 to 4, which notebooks show; None, so that they show the repr, where there is no curve."""
    try:
        penalty = to_penalty(given)
        if not penalty.separable:
            return None
        w = torch.linspace(0, 4, 161, dtype=torch.float64)
        alpha = given.keep_probability(w) if isinstance(given, MaskRule) else keep_probability(penalty.eta_hat(w), lam)
        omega = ("omega(w)", w.tolist(), penalty.omega(w).tolist(), None)
        return _pictures.panels(repr(given), [omega, (f"alpha(w) at lam = {lam:g}", w.tolist(), alpha.tolist(), 1.0)])
    except Exception:  # a picture must not hide the object
        return None


def gap(penalty: Penalty, w: Tensor, eta: Tensor) -> Tensor:
    """Return (w^2 / eta + f(eta)) / 2 - omega(w) >= 0, elementwise; zero exactly at eta = eta_hat(w).

    For a penalty that is not separable the sums over w are compared: a scalar.
    """
    quadratic, value = numeric.quotient(w * w, eta), penalty.omega(w)
    if not penalty.separable:
        quadratic, value = quadratic.sum(), value.sum()
    return (quadratic + penalty.dual(eta)) / 2 - value


def magnitude(penalty: Penalty, eta: Tensor) -> Tensor:
    """Return the |w| whose eta_hat is ``eta``, eta sqrt(f'(eta)), for 0 < eta < inf: the inverse of eta_hat."""
    return eta * penalty.dual_slope(eta).sqrt()


def joint_slopes(penalty: Penalty, w: Tensor, log_eta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of (w^2 / eta + f(eta)) / 2, elementwise, in w and in log eta."""
    eta = log_eta.clamp(-69, 69).exp_()  # 1e-30 to 1e30
    in_w = w / eta
    return in_w, penalty.dual_slope(eta).mul(eta).sub_(in_w * w).div_(2)


def penalty_value(penalty: Penalty, weights: list[Tensor], lam: float) -> float:
    """Return lam * Omega over a list of weight tensors, summed in float64; a collective for weights split over processes."""
    parts = [(elementwise.local_part(w.detach()), w) for w in weights]
    return lam * sum(float(elementwise.sum_shards(penalty.omega(part).sum(dtype=torch.float64), w)) for part, w in parts)


# -- admissible penalties and their properties, derived numerically from omega and eta_hat -----------------------------------

_REMEDY = {
    "zero": "shrinks only: no weight falls below a keep probability by itself; name a magnitude threshold",
    "finite": "exact zeros: a weight rests at 0 while |dL/dw| < lam * omega'(0+)",
    "infinite": "exact zeros, and zero is absorbing: a weight at 0 does not come back",
}


@dataclass(frozen=True)
class FinePrint:
    """The properties that follow from a penalty's slope near 0 and for large weights.

    Args:
        slope_at_zero: omega'(0+) = lim w / eta_hat(w).
        kind: the class of that slope, "zero", "finite" or "infinite".
        unbiased: whether w / eta_hat(w) -> 0 for large w, so that large weights are not shrunk.
    """

    slope_at_zero: float
    kind: str
    unbiased: bool

    def __str__(self) -> str:
        return f"{_REMEDY[self.kind]}; large weights are {'unbiased' if self.unbiased else 'shrunk'}"


def fine_print(penalty: Penalty) -> FinePrint:
    """Classify a separable penalty by the powers of w that its slope follows near 0 and for large weights.

    Raises ValueError for a penalty that is not separable: its slope at one weight depends on the others.
    """
    if not penalty.separable:
        raise ValueError(f"{brief(penalty)} is not separable: it has no slope of its own at a single weight")
    near = torch.tensor([1e-100, 1e-110], dtype=torch.float64)
    slopes = penalty.gradient(near)
    kind = "infinite" if _jumps(penalty) else _kind(_exponent(near, slopes))
    slope = {"zero": 0.0, "infinite": math.inf}.get(kind, float(slopes[1]))
    return FinePrint(slope, kind, _unbiased(penalty))


def _exponent(w: Tensor, values: Tensor) -> float:
    """Return k with values ~ w^k between the two given points; +inf if the second value is 0."""
    if values[1] == 0 or values[0] == 0:
        return math.inf
    return float((values[0] / values[1]).log() / (w[0] / w[1]).log())


def _kind(exponent: float) -> str:
    return "finite" if abs(exponent) < 1e-6 else "zero" if exponent > 0 else "infinite"


def _jumps(penalty: Penalty) -> bool:
    """Return True if omega is discontinuous at 0 (an L0 term), because omega(1e-100) is then more than half of omega(1e-6)."""
    tiny, small = penalty.omega(torch.tensor([1e-100, 1e-6], dtype=torch.float64)).tolist()
    return bool(tiny > 0.5 * small > 0)


def _unbiased(penalty: Penalty) -> bool:
    """Return True if the slope falls like a power of w for large w; smaller w are used if eta_hat rounds to inf at larger ones."""
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
