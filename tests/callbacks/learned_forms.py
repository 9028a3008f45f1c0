"""Callbacks with learned parameters, and short runs of them, for tests of optimisers and files."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler as rates
from toys import Toy, data, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import EtaTrick, HardConcrete, VariationalDropout
from lightning_sparse.conformance.toys import Stateful

ADAM, ADAMW = partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "joint": partial(EtaTrick, LOG_SUM, 0.5, learned_lr=0.05, keep_start=0.3),
    "VarDrop": partial(VariationalDropout, 0.02, "empirical_bayes", log_start=-1.0, learned_lr=0.05),
    "VarDrop, weight": partial(VariationalDropout, 0.1, noise="weight", log_start=2.9, learned_lr=0.05),
    "L0": partial(HardConcrete, 0.3, log_start=-3.7, learned_lr=0.05),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


class Scheduled(Toy):
    """A toy with Adam at 0.01, weight decay and a learning rate schedule."""

    def __init__(self, schedule=None, interval="step", make=ADAMW, seed=0):
        super().__init__(optimizer=make, seed=seed)
        self.schedule, self.interval = schedule, interval

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": self.interval, "monitor": "val/loss"},
        }


def fit(callback, module, path=None, keep=None, epochs=2, **options):
    """Fit with the schedule of four epochs and return the Trainer."""
    keepers = [] if keep is None else [ModelCheckpoint(keep, filename="{step}", save_top_k=-1, every_n_train_steps=1)]
    callbacks = ([] if callback is None else [callback]) + keepers
    run = trainer(*callbacks, epochs=epochs, enable_checkpointing=bool(keepers), **options)
    run.fit(module, Stateful(data()), ckpt_path=path)
    return run


def decaying(seed=0, make=ADAM):
    return Scheduled(lambda o: rates.LambdaLR(o, lambda step: 1 - step / 16), make=make, seed=seed)


def ended(module, callback, run):
    return {"weights": weights(module), "own": callback.state_dict(), "optimiser": run.optimizers[0].state_dict()}
