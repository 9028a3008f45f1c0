"""The methods of docs/methods.md: objective, callback, and arguments that identify their recipes."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.mask_rules import Standout, TargetedDropout, TopK
from lightning_sparse.penalties import L1, HardConcrete, LogSum, VariationalDropout

FORMULAS = {
    "L1": "omega = |w|, eta_hat = |w|",
    "LogSum": "omega = log(1 + |w| / eps), eta_hat = |w| (|w| + eps)",
    "VariationalDropout": "f'(eta) = D(x) / x, x = sqrt(eta / 2), D Dawson's integral (log-uniform prior)",
    "HardConcrete": "f = P(s > 0), eta = (E s)^2 / Var s, s the gate",
    "Standout": "alpha = sigmoid(a |w| + b), eta_hat = e^(a |w| + b)",
    "TargetedDropout": "alpha = 1 - rate on the smallest share of |w|, 1 on the others",
    "TopK": "alpha = 1 on the k largest |w|, 0 on the others",
}


@dataclass(frozen=True)
class Method:
    """A line of the page; ``where`` are the arguments that distinguish it from other methods of the same callback."""

    title: str
    callback: str
    form: str
    update: str
    penalty: Penalty | MaskRule = field(default_factory=lambda: LogSum(eps=2.0))
    where: tuple[tuple[str, str], ...] = ()
    at_zero: str = ""  # of a rule that ranks weights and so has no slope at a single one


_MASK = "each batch: s * w, E s = 1, alpha(w) of the current w"
_NOISE = "L + kl_weight * sum f(eta) / 2, noise of variance w^2 / eta on "
METHODS = (
    Method("LogSum", "PenaltyLoss", "loss", "L + lam * Omega(w), by autograd"),
    Method("AdaTikhonov", "ReweightedPenalty", "penalty gradient", "gradient += lam * w / eta_hat(w)"),
    Method("AdaProx", "AdaptiveProx", "prox", "after each step: w <- w / (1 + rho * lam / eta_hat(w)), or the exact prox"),
    Method("eta-Trick", "EtaTrick", "joint", "L + (lam / 2) sum(w^2 / eta + f(eta)), on w and log eta"),
    Method("Standout", "AdaptiveMask", "mask", _MASK, Standout(), (("penalty", "Standout"),)),
    Method(
        "targeted dropout",
        "AdaptiveMask",
        "mask",
        _MASK,
        TargetedDropout(0.5, 0.75),
        (("penalty", "TargetedDropout"),),
        "slope 0 (ranks the weights; alpha(0) > 0)",
    ),
    Method("AdaDrop", "AdaptiveMask", "mask", f"{_MASK}; Bernoulli, on the weights", where=(("noise", "ScaledBernoulli"),)),
    Method("GaussDrop", "AdaptiveMask", "mask", f"{_MASK}; Gaussian, on the outputs", where=(("noise", "Gaussian"),)),
    Method("VarDrop", "VariationalDropout", "learned noise", f"{_NOISE}the weights", VariationalDropout(), (("noise", "weight"),)),
    Method("VarDrop+LR", "VariationalDropout", "learned noise", f"{_NOISE}the outputs", VariationalDropout(), (("noise", "local"),)),
    Method(
        "VarDrop+LR+AR",
        "VariationalDropout",
        "learned noise",
        f"{_NOISE}the outputs, eta = w^2 / sigma^2 with sigma learned",
        VariationalDropout(),
        (("noise", "additive"),),
    ),
    Method(
        "hard concrete", "HardConcrete", "learned noise", "L + (lam / 2) sum P(s > 0), forward with s * w, s a learned gate", HardConcrete()
    ),
    Method(
        "magnitude pruning",
        "MagnitudePruning",
        "pruning",
        "the smallest |w| are set to 0 for good, to a share that rises over the run",
        TopK(0.1),
        at_zero="a constraint (ranks the weights): zeros by itself",
    ),
    Method(
        "Sparsify",
        "Sparsify",
        "prox and pruning",
        "after each step the exact prox of L1, bounded; the lowest scores are set to 0 for good, to a share that rises over the run",
        L1(),
    ),
)
