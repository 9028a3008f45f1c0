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
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1  # where Lightning puts what an epoch's end logs, its number beside it
        log_now(trainer, {name: value for name, value in figures.items() if name in straight}, step, {"epoch": trainer.current_epoch})


def log_now(trainer: Trainer, figures: Mapping[str, float], step: int | None = None, beside: Mapping[str, float] | None = None) -> None:
    """The same past LightningModule.log, also outside of the hooks in which that may be called; ``beside``: for loggers alone."""
    for logger in trainer.loggers:
        logger.log_metrics({**(beside or {}), **figures}, step=trainer.global_step if step is None else step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
