"""The checks of the selection: callbacks of the package pass, callbacks with missing or spurious warnings fail."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
from subjects import OURS

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty

CHECKS = [name for name, one in conformance.CHECKS.items() if one.group == "selection"]
LOG_SUM = penalties.LogSum(eps=2.0)


class Silent(ReweightedPenalty):
    """Does not warn about weights that it does not select."""

    def on_fit_start(self, trainer, module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().on_fit_start(trainer, module)


class Talkative(ReweightedPenalty):
    """Also warns about embeddings."""

    def on_fit_start(self, trainer, module):
        super().on_fit_start(trainer, module)
        warnings.warn("passes over 'embedding.weight'; add it with select=['embedding.weight']", stacklevel=1)


class Hasty(MagnitudePruning):
    """Prunes before training, without a warning."""

    def on_train_end(self, trainer, module):
        self.began_at_zero.names = []
        super().on_train_end(trainer, module)


MUTANTS = {
    "own_matrices_are_trained_or_named": partial(Silent, LOG_SUM, 0.5),
    "ordinary_networks_get_no_warning": partial(Talkative, LOG_SUM, 0.5),
    "matrices_that_start_at_zero_learn_or_are_named": partial(Hasty, 0.7, every=1),
}


@pytest.mark.parametrize("name", ["ReweightedPenalty", "AdaptiveMask"])  # test_conformance.py runs them on all callbacks
@pytest.mark.parametrize("check", CHECKS)
def test_our_callbacks_pass(check, name):
    outcome = conformance.outcome(OURS[name], check)
    assert outcome.verdict == "pass", outcome


@pytest.mark.parametrize("check", MUTANTS)
def test_the_check_detects_the_broken_callback(check):
    outcome = conformance.outcome(conformance.Subject("broken", lambda: [MUTANTS[check]()]), check)
    assert outcome.verdict == "fail", outcome
