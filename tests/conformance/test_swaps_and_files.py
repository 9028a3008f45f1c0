"""Callbacks that threshold weights at the wrong time or write files unlike the module: each is detected."""

from __future__ import annotations

from functools import partial

import pytest
from subjects import Alone

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty, end_of_fit

LOG_SUM = penalties.LogSum(eps=2.0)


class Early(ReweightedPenalty):
    """Thresholds weights before other code swaps, and restores them after it swaps back."""

    def on_validation_start(self, trainer, module):
        super().on_validation_start(trainer, module)
        self.attachment.end_forwards()
        self.attachment.show()

    def on_validation_epoch_end(self, trainer, module):
        pass


class Hasty(ReweightedPenalty):
    """Writes final zeros while the optimiser is in training mode, and does not update them."""

    def on_train_end(self, trainer, module):
        optimizers, self.weights.optimizers = self.weights.optimizers, []
        super().on_train_end(trainer, module)
        self.weights.optimizers = optimizers

    def on_fit_end(self, trainer, module):
        self.end_of_fit.ending = None

    def teardown(self, trainer, module, stage):
        self.end_of_fit.ending = None
        super().teardown(trainer, module, stage)


class Insists(MagnitudePruning):
    """Writes its last zeros into every file."""

    def on_save_checkpoint(self, trainer, module, checkpoint):
        super().on_save_checkpoint(trainer, module, checkpoint)
        end_of_fit.write_view(checkpoint["state_dict"], module, self.parameters, self.thresholded)


MUTANTS = {
    "own_average_changes_nothing": (partial(Early, LOG_SUM, 0.5), "the weights differ by"),
    "own_average_is_sparse": (partial(Early, LOG_SUM, 0.5), "0 of 176 weights were zero in validation"),
    "optimiser_modes_are_kept": (partial(Hasty, LOG_SUM, 0.5), "of 176 weights are zero after fit"),
    "files_after_fit_hold_the_module": (partial(Insists, 0.5, every=2), "when an earlier file's weights had been loaded"),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_the_check_detects_the_broken_callback(check):
    make, reason = MUTANTS[check]
    outcome = conformance.outcome(conformance.Subject("broken", Alone(make)), check)
    assert outcome.verdict == "fail", outcome
    assert reason in outcome.reason
