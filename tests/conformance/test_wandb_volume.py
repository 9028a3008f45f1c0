"""Callbacks that log too much to W&B, or nothing at the end, and the check that must detect it."""

from __future__ import annotations

import pytest
import wandb

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import ReweightedPenalty, SparsityMonitor
from lightning_sparse.conformance._lightning import Callback

pytestmark = pytest.mark.slow
CHECK = "wandb_runs_stay_small"


class Tables(Callback):
    """Logs a growing table at every epoch."""

    def on_fit_start(self, trainer, pl_module):
        self.table = wandb.Table(columns=["epoch"], log_mode="MUTABLE")

    def on_train_epoch_end(self, trainer, pl_module):
        self.table.add_data(trainer.current_epoch)
        trainer.logger.log_metrics({"layers": self.table}, step=trainer.global_step)


class EachStep(Callback):
    """Logs a histogram at every step."""

    def on_train_batch_end(self, trainer, *_):
        trainer.logger.log_metrics({"weights": wandb.Histogram([0.0, 1.0])}, step=trainer.global_step)


class AThirtieth(Callback):
    """Logs a histogram after every thirtieth of the planned run."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step % max(trainer.estimated_stepping_batches // 30, 1) == 0:
            EachStep.on_train_batch_end(self, trainer)

    def on_train_end(self, trainer, pl_module):
        EachStep.on_train_batch_end(self, trainer)


class WithoutEnd(ReweightedPenalty):
    """Omits the histograms at the end."""

    def on_train_end(self, trainer, pl_module):
        loggers, trainer.loggers = trainer.loggers, []
        super().on_train_end(trainer, pl_module)
        trainer.loggers = loggers

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch % 2 == 0:
            super().on_train_epoch_end(trainer, pl_module)


LOG_SUM = penalties.LogSum(eps=2.0)
MUTANTS = {
    Tables: "wrote 60 table files",
    EachStep: "logged histograms 120 times",
    AThirtieth: "of 10,000 epochs that stops after 40 logged histograms 1 times",
    WithoutEnd: "not at step 120",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_check_detects_the_broken_callback(mutant):
    given = (LOG_SUM, 0.01) if issubclass(mutant, ReweightedPenalty) else ()
    outcome = conformance.outcome(conformance.subject(mutant(*given)), CHECK)
    assert (outcome.verdict, MUTANTS[mutant] in outcome.reason) == ("fail", True), outcome


def test_it_does_not_apply_to_what_logs_neither():
    outcome = conformance.outcome(conformance.subject(SparsityMonitor()), CHECK)
    assert (outcome.verdict, outcome.reason) == ("n/a", "logs neither histograms nor tables")
