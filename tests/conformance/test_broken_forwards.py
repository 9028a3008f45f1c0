"""Forms with one thing broken each in how layers are used, and the check that must notice it."""

from __future__ import annotations

from functools import partial

import pytest
from lightning.pytorch import Callback

from lightning_sparse import attach, conformance, penalties
from lightning_sparse.callbacks import AdaptiveMask, ReweightedPenalty

LOG_SUM = penalties.LogSum(eps=2.0)


class Hooked(ReweightedPenalty):
    """Leaves a hook on each layer for as long as it trains."""

    def _install(self, module, attachment):
        for name, layer in attach.layers(module, self.parameters).items():
            self._handles.append(layer.register_forward_hook(partial(self.look, name)))

    def look(self, name, layer, inputs, output):
        pass


class Positional(Hooked):
    """Reads a layer's input by its position."""

    def look(self, name, layer, inputs, output):
        inputs[0].detach()


class Dividing(Hooked):
    """Divides by the rows of a layer."""

    def look(self, name, layer, inputs, output):
        return output * (len(output) / len(output))


class Moving(AdaptiveMask):
    """Takes a layer that a batch did not use for one whose forward is bypassed."""

    def _end_batch(self):
        self._used |= self._local.keys()
        super()._end_batch()


class Loud(ReweightedPenalty):
    """Has other weights in force throughout a step."""

    def on_train_batch_start(self, trainer, module, *args):
        super().on_train_batch_start(trainer, module, *args)
        for parameter in self.parameters.values():
            parameter.data.mul_(2.0)

    def on_after_backward(self, trainer, module):
        for parameter in self.parameters.values():
            parameter.data.mul_(0.5)


MUTANTS = {
    "layers_called_by_keyword": Positional,
    "layers_without_rows": Dividing,
    "layers_not_used_in_each_batch": Moving,
    "no_noise_in_evaluation_within_a_step": Loud,
    "exported_in_mid_run": Hooked,
}


def alone(kind: type[Callback]) -> list[Callback]:
    return [kind(LOG_SUM, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_a_broken_form_is_caught_by_the_check_that_should(check):
    outcome = conformance.outcome(conformance.Subject("broken", partial(alone, MUTANTS[check])), check)
    assert outcome.verdict == "fail", outcome


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_a_whole_one_passes(check):
    outcome = conformance.outcome(conformance.Subject("whole", partial(alone, AdaptiveMask)), check)
    assert outcome.verdict == "pass", outcome
