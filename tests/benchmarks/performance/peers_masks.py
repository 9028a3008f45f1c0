"""Peers with fixed masks: Lightning's ModelPruning, torch's pruning, torch's parametrisations."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_sparse.layers import LAYERS

SHARE = 0.9  # of the weights, zero while the steps are timed


def weights_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the layers whose weights this package selects by default, in the format of torch's pruning."""
    return [(layer, "weight") for layer in module.modules() if isinstance(layer, LAYERS)]


def model_pruning(module: LightningModule) -> list[Callback]:
    """Prune at the end of the first (warm-up) epoch, so that masks are attached in the timed epochs."""
    kept = {"use_lottery_ticket_hypothesis": False, "apply_pruning": lambda epoch: epoch == 0}
    return [ModelPruning("l1_unstructured", weights_of(module), amount=SHARE, **kept)]  # type: ignore[arg-type]


def by_hand(module: LightningModule) -> list[Callback]:
    """Prune by torch.nn.utils.prune.global_unstructured before training."""
    prune.global_unstructured(weights_of(module), pruning_method=prune.L1Unstructured, amount=SHARE)  # type: ignore[no-untyped-call]
    return []


class Mask(nn.Module):
    """A parametrisation that multiplies by a fixed mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w: Tensor) -> Tensor:
        masked: Tensor = w * self.mask
        return masked


def parametrized(module: LightningModule) -> list[Callback]:
    """Parametrise each weight by a Mask of its largest values."""
    for layer, name in weights_of(module):
        size = getattr(layer, name).detach().abs()
        smallest = size.flatten().kthvalue(max(1, round(SHARE * size.numel()))).values
        parametrize.register_parametrization(layer, name, Mask((size > smallest).to(torch.float32)))
    return []
