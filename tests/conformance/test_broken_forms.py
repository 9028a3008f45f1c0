"""Forms with one thing broken each, and the check of faults that must notice it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lightning_sparse import conformance, noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, MagnitudePruning, ReweightedPenalty
from lightning_sparse.callbacks._promises import Fit

LOG_SUM = penalties.LogSum(eps=2.0)


class Blind(AdaptiveProx):
    """Looks at no gradient."""

    def on_before_optimizer_step(self, *args):
        pass


class Heedless(Blind):
    """Nor at losses, nor at the weights that it begins with."""

    def on_before_backward(self, *args):
        pass

    def on_train_start(self, trainer, module):
        self._measure(trainer)

    on_sanity_check_start = on_train_start
    on_validation_start = on_train_epoch_end = on_before_backward


class Forgetful(AdaptiveMask):
    """Leaves everything as it is when something goes wrong."""

    def on_exception(self, *args):
        pass


class Trusting(ReweightedPenalty):
    """Looks at no checksum, and starts anew whatever it is given."""

    def on_load_checkpoint(self, *args):
        pass


class Odd(ReweightedPenalty):
    """Saves a path."""

    def state_dict(self):
        return super().state_dict() | {"folder": Path.cwd()}


class Silent(ReweightedPenalty):
    """Says nothing of what it did not reach."""

    def unreached(self):
        return []


class Waiting(ReweightedPenalty):
    """Leaves the zeros to lam alone."""

    def _tick(self):
        self.step, self._clock.counted = self.step + 1, True


class Anew(MagnitudePruning):
    """Begins each fit from nothing."""

    def setup(self, *args):
        self._fit = Fit()
        super().setup(*args)


MUTANTS = {
    "a_run_stopped_early_says_what_it_missed": partial(Silent, LOG_SUM, target_sparsity=0.7),
    "a_target_is_met_in_a_few_steps": partial(Waiting, LOG_SUM, target_sparsity=0.7),
    "a_second_fit_goes_on": partial(Anew, 0.7, every=2),
    "a_loss_that_is_not_finite": partial(Heedless, LOG_SUM, 0.5),
    "gradients_that_are_not_finite": partial(Blind, LOG_SUM, 0.2),
    "weights_that_are_not_finite": partial(Heedless, LOG_SUM, 0.5),
    "an_exception_leaves_the_module": partial(Forgetful, LOG_SUM, 0.5, noise=noise.ScaledBernoulli()),
    "ctrl_c_leaves_the_module": partial(Forgetful, LOG_SUM, 0.5),
    "a_full_disk_while_saving": partial(Forgetful, LOG_SUM, 0.5),
    "flipped_bits_are_refused": partial(Trusting, LOG_SUM, 0.5),
    "files_load_safely": partial(Odd, LOG_SUM, 0.5),
}


class Alone:
    """A list of one callback, made anew; picklable."""

    def __init__(self, make):
        self.make = make

    def __call__(self):
        return [self.make()]


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_a_broken_form_is_caught_by_the_check_that_should(check):
    outcome = conformance.outcome(conformance.Subject("broken", Alone(MUTANTS[check])), check)
    assert outcome.verdict == "fail", outcome
