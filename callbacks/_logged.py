"""How figures reach the loggers, the progress bar and the callbacks that monitor them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

TOTAL = "sparsity/total"
MANY = 100  # figures beyond which LightningModule.log, which takes a millisecond and more for each, is passed by


def log(trainer: Trainer, module: LightningModule, figures: Mapping[str, float], layers: set[str], **how: Any) -> None:
    """``figures`` for every logger and monitor, TOTAL in the progress bar as well; ``how`` are arguments of ``module.log``.

    ``layers`` names those that each parameter has, which all ranks agree on; where they are MANY, they go straight to the
    loggers and into ``trainer.callback_metrics``.
    """
    how |= {"sync_dist": trainer.world_size > 1}
    straight = layers & figures.keys() if len(layers) > MANY else set()
    rest = {name: value for name, value in figures.items() if name not in straight and name != TOTAL}
    module.log_dict(rest, **how)
    if TOTAL in figures:
        module.log(TOTAL, figures[TOTAL], prog_bar=True, **how)
    if straight:
        log_now(trainer, {name: value for name, value in figures.items() if name in straight})


def log_now(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """The same past LightningModule.log, also outside of the hooks in which that may be called."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
