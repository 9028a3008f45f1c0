"""Peers with penalties: a term in the loss, torchao's PruneOptimizer, bayesian-torch's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.nn import Parameter

from performance.arms import KL_WEIGHT, LAM, PENALTY
from performance.peers_masks import weights_of


def loss_term(module: LightningModule) -> list[Callback]:
    """Add lam * sum log(1 + |w| / eps) to the loss."""
    weights = [layer.weight for layer, _ in weights_of(module)]
    add_to_loss(module, lambda: LAM * log_sum(weights))
    return []


def log_sum(weights: Iterable[Tensor]) -> Tensor:
    """Compute the penalty without code of this package."""
    return torch.stack([torch.log(1 + w.abs() / PENALTY.eps).sum() for w in weights]).sum()


def add_to_loss(module: LightningModule, term: Callable[[], Tensor]) -> None:
    """Add a term to the module's training step."""
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:  # because Lightning detects an override by this name
        loss: Tensor = step(batch, batch_idx)
        return loss + term()

    module.training_step = training_step  # type: ignore[method-assign]


def prune_optimizer(module: LightningModule) -> list[Callback]:
    """Make torchao's proximal optimiser around the same Adam, with a lasso on every weight matrix and the same rate decay."""
    wrap(module, {"prox_type": "ProxLasso", "group_type": "ElemGrouper", "reg_lambda": LAM}, lambda steps: {})
    return []


def wrap(module: LightningModule, group: dict[str, Any], options: Callable[[int], dict[str, Any]]) -> None:
    """Wrap the optimiser; ``group`` are settings of the pruned parameters, ``options`` of PruneOptimizer for ``steps`` steps."""
    from torchao.prototype.pat.optim import PruneOptimizer

    def configure_optimizers() -> dict[str, Any]:
        steps = int(module.trainer.estimated_stepping_batches)
        base = torch.optim.Adam(groups(module, group), lr=float(module.lr), fused=True)  # type: ignore[arg-type]
        optimizer = PruneOptimizer(base, **options(steps))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign, assignment]


def groups(module: LightningModule, group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the param groups: weight matrices with their settings, and the rest."""
    pruned: list[Parameter] = [layer.weight for layer, _ in weights_of(module)]
    chosen = {id(parameter) for parameter in pruned}
    return [{"params": pruned, **group}, {"params": [p for p in module.parameters() if id(p) not in chosen]}]


def reparametrised(module: LightningModule) -> list[Callback]:
    """Use bayesian-torch's layers with one draw per batch and weight."""
    return _bayesian(module, "Reparameterization")


def flipout(module: LightningModule) -> list[Callback]:
    """Use bayesian-torch's Flipout layers, whose draws differ between samples by signs."""
    return _bayesian(module, "Flipout")


def _bayesian(module: LightningModule, kind: str) -> list[Callback]:
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    prior = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.0}
    dnn_to_bnn(module, prior | {"type": kind, "moped_enable": False})
    add_to_loss(module, lambda: KL_WEIGHT * get_kl_loss(module))
    return []
