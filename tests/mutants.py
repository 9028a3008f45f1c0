"""Penalties, rules and scores with one defect each, and a word that the check's message must contain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_sparse import mask_rules, numeric, penalties
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.scores import Ranked, Score

LogSum = penalties.LogSum


class NegatedOmega(LogSum):
    def omega(self, w):
        return -super().omega(w)


class ConstantKept(LogSum):
    def omega(self, w):
        return (w.abs() + self.eps).log()


class OneSided(LogSum):
    def omega(self, w):
        return torch.log1p(w.clamp(min=0) / self.eps)


class DoubledOmega(LogSum):
    def omega(self, w):
        return 2 * super().omega(w)


class DoubledBehindItsAutograd(LogSum):
    def omega(self, w):
        return numeric.with_slope(w, lambda at: 2 * torch.log1p(at.abs() / self.eps), self.gradient)


class Steps(LogSum):
    def omega(self, w):
        return super().omega(w).double().to(torch.float32)


class MissingEps(LogSum):
    def eta_hat(self, w):
        return w * w


class SignedEtaHat(LogSum):
    def eta_hat(self, w):
        return w * (w.abs() + self.eps)


class NegativeEtaHat(LogSum):
    def eta_hat(self, w):
        return -super().eta_hat(w)


class ScaledEtaHat(LogSum):
    def eta_hat(self, w):
        return 1.001 * super().eta_hat(w)


class FlippedGradient(LogSum):
    def gradient(self, w):
        return -super().gradient(w)


class DoubledTermInDual(LogSum):
    def dual(self, eta):
        root = (self.eps**2 + 4 * eta).sqrt()
        return 2 * (((root + self.eps) / (2 * self.eps)).log() - (root - self.eps) ** 2 / (4 * eta).clamp(min=1e-300))


class FlippedTermInDual(LogSum):
    def dual(self, eta):
        w = (2 * eta / ((self.eps**2 + 4 * eta).sqrt() + self.eps)).nan_to_num(nan=1e30)
        return 2 * torch.log1p(w / self.eps) + w / (w + self.eps)


class DoubledTermInDualSlope(LogSum):
    """The slope of the dual with a doubled second term, as by a misplaced parenthesis."""

    def dual_slope(self, eta):
        return numeric.slope(DoubledTermInDual(self.eps).dual, eta)


class FlippedDualSlope(LogSum):
    def dual_slope(self, eta):
        return -super().dual_slope(eta)


class DualSlopeWithoutItsSquare(LogSum):
    def dual_slope(self, eta):
        return super().dual_slope(eta).sqrt()


class MCPDualSlopeUnsquared(penalties.MCP):
    def dual_slope(self, eta):
        return self.c / (eta + self.c)


class DualKeepsTheConstant(LogSum):
    def dual(self, eta):
        return super().dual(eta) + 0.1


class LogSquareDualSign(penalties.LogSquare):
    def dual(self, eta):
        inside = 2 * (2 * eta / self.eps).log() - self.eps / eta - 2
        return torch.where(eta >= self.eps / 2, inside, torch.zeros_like(eta)).clamp(min=0)


class ProxAtTwiceTheStep(LogSum):
    def prox(self, w, step):
        return super().prox(w, 2 * step)


class ProxIsTheLocalMinimum(LogSum):
    """Returns the stationary point even if zero is better."""

    def prox(self, w, step):
        size = w.abs()
        root = (size + self.eps) ** 2 - 4 * torch.as_tensor(step, dtype=w.dtype)
        x = torch.where(root > 0, (size - self.eps + root.clamp(min=0).sqrt()) / 2, torch.zeros_like(w))
        return torch.minimum(x.clamp(min=0), size) * w.sign()


class ProxOvershoots(LogSum):
    def prox(self, w, step):
        return -super().prox(w, step)


class SoftForFirm(penalties.MCP):
    def prox(self, w, step):
        return penalties.L1().prox(w, step)


@dataclass(frozen=True)
class Quartic(Penalty):
    """Grows faster than w^2, which the duality excludes."""

    def omega(self, w):
        return w**4 / 4

    def eta_hat(self, w):
        return 1 / (w * w)


class NaNPruned(penalties.HardThreshold):
    def prox(self, w, step):
        return torch.where(w.abs() > self.tau * step**0.5, w, torch.zeros_like(w))


@dataclass(frozen=True)
class NaNAtZero(Penalty):
    def omega(self, w):
        return w.abs()

    def eta_hat(self, w):
        return w * w / w.abs()


PENALTIES: list[tuple[Penalty, str]] = [
    (NegatedOmega(2.0), "omega is negative"),
    (ConstantKept(2.0), r"omega\(0\) must be 0"),
    (OneSided(2.0), "omega is not even"),
    (DoubledOmega(2.0), "slope: autograd of omega"),
    (DoubledBehindItsAutograd(2.0), "slope: the rise of omega"),
    (Steps(2.0), "omega must keep shape and dtype"),
    (MissingEps(2.0), "slope: autograd of omega"),
    (SignedEtaHat(2.0), "eta_hat is not even"),
    (NegativeEtaHat(2.0), "eta_hat must be >= 0"),
    (ScaledEtaHat(2.0), "slope: autograd of omega"),
    (FlippedGradient(2.0), "slope: gradient"),
    (DoubledTermInDual(2.0), "dual"),
    (FlippedTermInDual(2.0), "dual against a grid search"),
    (DoubledTermInDualSlope(2.0), "dual_slope against"),
    (FlippedDualSlope(2.0), "dual_slope against"),
    (DualSlopeWithoutItsSquare(2.0), "dual_slope against"),
    (MCPDualSlopeUnsquared(2.0), "dual_slope against"),
    (DualKeepsTheConstant(2.0), "dual against a grid search"),
    (LogSquareDualSign(1.0), "dual"),
    (ProxAtTwiceTheStep(2.0), "prox is worse"),
    (ProxIsTheLocalMinimum(0.1), "prox is worse"),
    (ProxOvershoots(2.0), "prox leaves"),
    (SoftForFirm(3.0), "prox is worse"),
    (Quartic(), "not subquadratic: eta_hat decreases"),
    (NaNAtZero(), "eta_hat is NaN"),
    (NaNPruned(0.5), "prox hides NaN"),
]


@dataclass(frozen=True)
class Rule(MaskRule):
    """A mask rule from a function of |w|."""

    alpha: Any

    def keep_probability(self, w):
        return self.alpha(w.abs())


class Lopsided(mask_rules.Standout):
    def keep_probability(self, w):
        return torch.sigmoid(w)


class InvertedEta(mask_rules.Standout):
    def eta_hat(self, w):
        return 1 / super().eta_hat(w)


class DoubledPenalty(mask_rules.LinearRamp):
    def to_penalty(self):
        return penalties.Scaled(penalties.MCP(self.tau**2), 0.5 / self.tau)


class RoundedKept(mask_rules.Standout):
    def keep_probability(self, w):
        return super().keep_probability(w).float()


RULES: list[tuple[MaskRule, str]] = [
    (Rule(lambda w: (-w).exp()), "keep_probability decreases at w = "),
    (Rule(lambda w: 0.5 + 0.3 * torch.sin(w.clamp(max=6))), "keep_probability decreases at w = 1.5"),
    (Rule(lambda w: 1 + w), r"must lie in \[0, 1\]: it is"),
    (Rule(lambda w: (w * w).clamp(max=1)), "diverges at 0"),
    (Rule(lambda w: (w - 0.5).clamp(0, 1)), "diverges at 0: alpha is 0 at w = 1e-08"),
    (Lopsided(), "not even"),
    (InvertedEta(), "eta_hat against"),
    (DoubledPenalty(1.0), "conversion to the penalty and back"),
    (RoundedKept(), "keep_probability must keep shape and dtype"),
]


class Scored(Score):
    """A score from a function of what is given."""

    def __init__(self, of: Any) -> None:
        self.function = of

    def __repr__(self) -> str:
        return "Scored()"

    def of(self, given: Ranked) -> Any:
        return self.function(given)


SCORES: list[tuple[Score, str]] = [
    (Scored(lambda given: given.w), r"Scored\(\) of 'weight' is negative at \d+ of 48 weights"),
    (Scored(lambda given: given.w.abs().flatten(1).mean(1)), r"has the shape \(6,\): return one score for each weight, .* \(6, 8\)"),
    (Scored(lambda given: given.w.abs().flatten()), r"has the shape \(48,\)"),
    (Scored(lambda given: given.w.abs() / given.w.abs().sum()), "of which 48 are zero: .* is NaN or infinite at 48 of 48"),
    (Scored(lambda given: 1 / given.w.abs()), "is NaN or infinite"),
    (Scored(lambda given: given.w != 0), "is torch.bool: return a floating tensor"),
    (Scored(lambda given: float(given.w.abs().sum())), "is float: return a floating tensor"),
    (Scored(lambda given: given.w.abs_()), r"must not change given\.w"),
    (Scored(lambda given: torch.rand(given.w.shape)), "must return the same scores"),
    (Scored(lambda given: given.w.square() * given.squares), "given.squares is None unless the class sets needs_squares = True"),
    (Scored(lambda given: given.w.abs().numpy()), "is ndarray: return a floating tensor"),
]
