"""Callbacks that count steps, or measure the run, wrongly, and the check that must notice it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning


class CountsHooks(AdaptiveProx):
    """Counts the calls of torch's own hooks."""

    def _attach(self, trainer, module):
        super()._attach(trainer, module)
        for handle in self._handles:
            handle.remove()
        self._handles = [one.register_step_post_hook(lambda optimizer, *_: self._after(trainer, optimizer)) for one in self._optimizers]


class CountsCalls(MagnitudePruning):
    """Counts no step that a module leaves out."""

    def on_train_batch_end(self, *args):
        pass


class Hasty(MagnitudePruning):
    """Takes an unknown length for one step."""

    def _measure(self, trainer):
        self._whole = max(trainer.estimated_stepping_batches, 1)
        self._begin_at(self._offset)


class Stubborn(MagnitudePruning):
    """Measures the first epoch alone."""

    def on_train_epoch_start(self, *args):
        pass


class AddsGroup(AdaptiveProx):
    """Puts a parameter of its own into the user's optimiser."""

    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        trainer.optimizers[0].add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


MUTANTS = {
    "a_scheduler_within_a_scheduler": partial(AddsGroup, penalties.LogSum(eps=2.0), 0.2),
    "a_step_counts_once": partial(CountsHooks, penalties.LogSum(eps=2.0), 0.2),
    "every_second_batch_steps": partial(CountsCalls, 0.5, 0.4, 0.9, every=2),
    "unknown_length_is_refused_or_works": partial(Hasty, 0.5, every=2),
    "changing_lengths_keep_the_zeros": partial(Stubborn, 0.5, every=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_a_broken_callback_is_caught_by_the_check_that_should(check):
    outcome = conformance.outcome(conformance.Subject("broken", lambda: [MUTANTS[check]()]), check)
    assert outcome.verdict == "fail", outcome
