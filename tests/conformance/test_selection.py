"""The checks of the selection pass for every callback of ours, and catch those that keep silent or say too much."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
from subjects import OURS

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import ReweightedPenalty

CHECKS = [name for name, one in conformance.CHECKS.items() if one.group == "selection"]
LOG_SUM = penalties.LogSum(eps=2.0)


class Silent(ReweightedPenalty):
    """Says nothing of what it passes over."""

    def on_fit_start(self, trainer, module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().on_fit_start(trainer, module)


class Talkative(ReweightedPenalty):
    """Names embeddings, too."""

    def on_fit_start(self, trainer, module):
        super().on_fit_start(trainer, module)
        warnings.warn("passes over 'embedding.weight'; add it with select=['embedding.weight']", stacklevel=1)


MUTANTS = {"own_matrices_are_trained_or_named": Silent, "ordinary_networks_get_no_warning": Talkative}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("check", CHECKS)
def test_our_callbacks_pass(check, name):
    outcome = conformance.outcome(OURS[name], check)
    assert outcome.verdict == "pass", outcome


@pytest.mark.parametrize("check", MUTANTS)
def test_a_broken_callback_is_caught(check):
    make = partial(MUTANTS[check], LOG_SUM, 0.5)
    outcome = conformance.outcome(conformance.Subject("broken", lambda: [make()]), check)
    assert outcome.verdict == "fail", outcome
