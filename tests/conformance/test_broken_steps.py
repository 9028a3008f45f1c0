"""Callbacks that count steps or run lengths wrongly, and the check that must detect it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning


class CountsHooks(AdaptiveProx):
    """Counts calls of torch's step hooks."""

    def _attach(self, trainer, module):
        super()._attach(trainer, module)
        for handle in self.connections._handles:
            handle.remove()
        leave = lambda optimizer, *_: self._end_step(trainer, optimizer)  # noqa: E731
        self.connections._handles = [one.register_step_post_hook(leave) for one in self.weights.optimizers]


class CountsCalls(MagnitudePruning):
    """Does not correct its count after a batch in which the module took no step."""

    def on_train_batch_end(self, *args):
        pass


class Hasty(MagnitudePruning):
    """Treats an unknown run length as one step."""

    def _measure(self, trainer):
        self.clock.whole = max(trainer.estimated_stepping_batches, 1)
        self.clock.begin_at(self.clock.offset)


class Stubborn(MagnitudePruning):
    """Computes the run length from the first epoch only."""

    def on_train_epoch_start(self, *args):
        pass


class AddsGroup(AdaptiveProx):
    """Adds its own parameter to the user's optimiser."""

    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        trainer.optimizers[0].add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


MUTANTS = {
    "a_scheduler_within_a_scheduler": partial(AddsGroup, penalties.LogSum(eps=2.0), 0.2),
    "a_step_counts_once": partial(CountsHooks, penalties.LogSum(eps=2.0), 0.2),
    "every_second_batch_steps": partial(CountsCalls, 0.5, begin=0.4, end=0.9, every=2),
    "unknown_length_is_refused_or_works": partial(Hasty, 0.5, every=2),
    "changing_lengths_keep_the_zeros": partial(Stubborn, 0.5, every=2),
}


def test_the_check_of_frozen_zeros_freezes_the_packages_callbacks():
    outcome = conformance.outcome(conformance.Subject("pruning", lambda: [MagnitudePruning(0.5, every=2, end=0.4)]), "frozen_zeros_stay")
    assert (outcome.verdict, outcome.reason) == ("pass", "")


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_the_check_detects_the_broken_callback(check):
    outcome = conformance.outcome(conformance.Subject("broken", lambda: [MUTANTS[check]()]), check)
    assert outcome.verdict == "fail", outcome
