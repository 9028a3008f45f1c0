"""Callbacks that misread optimiser states, and the check that must detect it."""

from __future__ import annotations

import pytest

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import AdaptiveProx
from lightning_sparse.step_sizes import Rate, StepSizes


class Credulous(StepSizes):
    """Reads the state of every optimiser as if it were torch's."""

    def of(self, optimizer, parameter, group, added=False):
        return Rate(optimizer.state.get(parameter, {}), group)


class Reads(AdaptiveProx):
    def _reset(self):
        super()._reset()
        self.sizes = self.support.sizes = self.saved.sizes = Credulous()


class Weak(StepSizes):
    """Uses the learning rate as the step size."""

    def of(self, optimizer, parameter, group, added=False):
        own = super().of(optimizer, parameter, group, added)
        return own if optimizer.state.get(parameter, {}).keys() >= {"exp_avg_sq", "step"} else Rate({}, {"lr": group["lr"] or 1e-2})


class Weakens(AdaptiveProx):
    def _reset(self):
        super()._reset()
        self.sizes = self.support.sizes = self.saved.sizes = Weak()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Reads, Weakens])
def test_the_check_detects_the_broken_callback(kind):
    subject = conformance.Subject("broken", lambda: [kind(penalties.LogSum(eps=2.0), 0.03)])
    assert conformance.outcome(subject, "foreign_optimizers_work").verdict == "fail"


@pytest.mark.slow
def test_a_correct_callback_passes():
    subject = conformance.Subject("sound", lambda: [AdaptiveProx(penalties.LogSum(eps=2.0), 0.03)])
    assert conformance.outcome(subject, "foreign_optimizers_work").verdict == "pass"
