"""A callback that reads every optimiser's state as torch's, and the check that must notice it."""

from __future__ import annotations

import pytest

from lightning_sparse import conformance, penalties
from lightning_sparse.callbacks import AdaptiveProx
from lightning_sparse.step_sizes import Rate, StepSizes


class Credulous(StepSizes):
    """Takes whatever the state holds."""

    def of(self, optimizer, parameter, group):
        return Rate(optimizer.state.get(parameter, {}), group)


class Reads(AdaptiveProx):
    def _forget(self):
        super()._forget()
        self._step_sizes = Credulous()


class Weak(StepSizes):
    """Takes the learning rate for the step size."""

    def of(self, optimizer, parameter, group):
        own = super().of(optimizer, parameter, group)
        return own if optimizer.state.get(parameter, {}).keys() >= {"exp_avg_sq", "step"} else Rate({}, {"lr": group["lr"] or 1e-2})


class Weakens(AdaptiveProx):
    def _forget(self):
        super()._forget()
        self._step_sizes = Weak()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Reads, Weakens])
def test_a_broken_callback_is_caught(kind):
    subject = conformance.Subject("broken", lambda: [kind(penalties.LogSum(eps=2.0), 0.03)])
    assert conformance.outcome(subject, "foreign_optimizers_work").verdict == "fail"


@pytest.mark.slow
def test_the_sound_one_passes():
    subject = conformance.Subject("sound", lambda: [AdaptiveProx(penalties.LogSum(eps=2.0), 0.03)])
    assert conformance.outcome(subject, "foreign_optimizers_work").verdict == "pass"
