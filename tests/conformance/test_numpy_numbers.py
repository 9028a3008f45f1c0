"""The check of numpy numbers detects a callback that saves one in its state, and only that."""

from __future__ import annotations

import numpy as np
import pytest
from subjects import OURS

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import ReweightedPenalty

CHECK = "numbers_of_numpy_are_no_matter"


class Keeps(ReweightedPenalty):
    """Saves the given number in its state."""

    def __init__(self, lam):
        super().__init__(penalties.LogSum(eps=2.0), float(lam))

    def state_dict(self):
        return super().state_dict() | {"strength": np.float64(self.schedule.lam)}


def keeps():
    return [Keeps(0.5)]


@pytest.mark.parametrize("name", ["ReweightedPenalty", "MagnitudePruning"])
def test_callbacks_that_keep_pythons_numbers_pass(name):
    outcome = conformance.outcome(OURS[name], CHECK)
    assert outcome.verdict == "pass", outcome.reason


def test_a_callback_that_saves_a_numpy_number_fails():
    outcome = conformance.outcome(conformance.subject(keeps), CHECK)
    assert (outcome.verdict, "weights_only=True" in outcome.reason) == ("fail", True), outcome


def test_the_recorded_class_is_left_as_it_was():
    before = dict(vars(ReweightedPenalty)), ReweightedPenalty.__init__
    conformance.outcome(OURS["ReweightedPenalty"], CHECK)
    assert (dict(vars(ReweightedPenalty)), ReweightedPenalty.__init__) == before


def test_a_copied_callback_is_reported_as_not_applicable():
    outcome = conformance.outcome(conformance.subject(ReweightedPenalty(penalties.LogSum(eps=2.0), 0.5)), CHECK)
    assert (outcome.verdict, "copied" in outcome.reason) == ("n/a", True)
