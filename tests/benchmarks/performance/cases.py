"""Cases of sparse training of one Linear layer: every callback of this package, and other packages."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    PenaltyLoss,
    ReweightedPenalty,
    VariationalDropout,
)

LOG_SUM = penalties.LogSum(eps=2.0)
Make = Callable[[], Callback]

FORMS: dict[str, Make] = {
    "ReweightedPenalty": lambda: ReweightedPenalty(LOG_SUM, 1e-4),
    "PenaltyLoss": lambda: PenaltyLoss(LOG_SUM, 1e-4),
    "AdaptiveProx": lambda: AdaptiveProx(LOG_SUM, 1e-4),
    "AdaptiveProx, exact": lambda: AdaptiveProx(LOG_SUM, 1e-4, exact=True),
    "AdaptiveMask": lambda: AdaptiveMask(LOG_SUM, 1e-4),
    "AdaptiveMask, Gaussian on weights": lambda: AdaptiveMask(LOG_SUM, 1e-4, noise=noise.Gaussian()),
    "AdaptiveMask, Bernoulli": lambda: AdaptiveMask(LOG_SUM, 1e-4, noise=noise.ScaledBernoulli()),
    "EtaTrick": lambda: EtaTrick(LOG_SUM, 1e-4),
    "VariationalDropout": lambda: VariationalDropout(1e-5),
    "HardConcrete": lambda: HardConcrete(1e-4),
    "MagnitudePruning": lambda: MagnitudePruning(0.9),
}


def linear(width: int) -> nn.Module:
    return nn.Linear(width, width, bias=False)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """Make fused Adam, which needs no memory for intermediate results."""
    return torch.optim.Adam(module.parameters(), 1e-3, fused=True)


@dataclass(frozen=True)
class Case:
    """A case: ``layer(width)`` has width^2 weights; ``price`` is added to the loss; ``package`` must be installed."""

    callbacks: Callable[[], Sequence[Callback]] = tuple
    layer: Callable[[int], nn.Module] = linear
    price: Callable[[nn.Module], Tensor] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam
    package: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


# -- what others offer ----------------------------------------------------------------------------------------------------


def pruned(width: int) -> nn.Module:
    layer: nn.Module = prune.l1_unstructured(linear(width), "weight", 0.5)
    return layer


class Masked(nn.Module):
    """A parametrisation that multiplies the weight by a fixed mask at each access."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(shape))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def parametrised(width: int) -> nn.Module:
    layer = linear(width)
    parametrize.register_parametrization(layer, "weight", Masked(torch.Size((width, width))))
    return layer


def log_sum(layer: nn.Module) -> Tensor:
    """Compute a hand-written penalty for the loss."""
    return 1e-4 * sum(torch.log1p(p.abs() / LOG_SUM.eps).sum() for p in layer.parameters())  # type: ignore[return-value]


def bayesian(width: int) -> nn.Module:
    from bayesian_torch.layers import LinearReparameterization

    layer: nn.Module = LinearReparameterization(width, width, bias=False)  # its output is a pair with the KL divergence
    return layer


def lasso(module: nn.Module) -> torch.optim.Optimizer:
    """Make torchao's proximal optimiser around the same Adam."""
    from torchao.prototype.pat.optim import PruneOptimizer

    group: dict[str, Any] = {"params": [*module.parameters()], "prox_type": "ProxLasso", "group_type": "ElemGrouper", "reg_lambda": 1e-4}
    wrapped: torch.optim.Optimizer = PruneOptimizer(torch.optim.Adam([group], 1e-3, fused=True))
    return wrapped


PEERS = {
    "Lightning's ModelPruning, masks attached": Case(callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.5)]),
    "torch.nn.utils.prune": Case(layer=pruned),
    "parametrize, a multiplying mask": Case(layer=parametrised),
    "penalty as a loss term": Case(price=log_sum),
    "bayesian-torch's LinearReparameterization": Case(layer=bayesian, package="bayesian_torch"),
    "torchao's PruneOptimizer": Case(optimizer=lasso, package="torchao"),
}
PLAIN = "nothing"
CASES = {PLAIN: Case(), **{name: Case(callbacks=lambda make=make: [make()]) for name, make in FORMS.items()}, **PEERS}


class Network(LightningModule):
    """One layer of a case with about ``weights`` weights, trained on a mean square."""

    def __init__(self, case: Case, weights: int) -> None:
        super().__init__()
        self.case, self.width = case, math.isqrt(weights)
        self.layer = case.layer(self.width)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        out = self.layer(batch)
        values, price = out if isinstance(out, tuple) else (out, 0.0)
        loss: Tensor = values.square().mean() + price
        return loss if self.case.price is None else loss + self.case.price(self.layer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.case.optimizer(self.layer)
