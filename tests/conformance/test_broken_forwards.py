"""Callbacks with one defect each in handling layers, and the check that must detect it."""

from __future__ import annotations

from functools import partial

import pytest
from lightning.pytorch import Callback

from lightning_sparse import conformance, layers, penalties
from lightning_sparse.callbacks import AdaptiveMask, ReweightedPenalty

LOG_SUM = penalties.LogSum(eps=2.0)


class Hooked(ReweightedPenalty):
    """Keeps a hook on each layer throughout training."""

    def _attach(self, trainer, module):
        super()._attach(trainer, module)
        for name, layer in layers.layers(module, self.parameters).items():
            self._handles.append(layer.register_forward_hook(partial(self.look, name)))

    def look(self, name, layer, inputs, output):
        pass


class Positional(Hooked):
    """Reads a layer's input only by position."""

    def look(self, name, layer, inputs, output):
        inputs[0].detach()


class Dividing(Hooked):
    """Divides by the number of rows of a layer's input."""

    def look(self, name, layer, inputs, output):
        return output * (len(output) / len(output))


class Moving(AdaptiveMask):
    """Treats a layer that a batch did not use as a bypassed one."""

    def on_after_backward(self, *args):
        self.method.forwards._used |= self.method.forwards.layers.keys()
        super().on_after_backward(*args)


class Loud(ReweightedPenalty):
    """Uses other weights throughout a step."""

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
def test_the_check_detects_the_broken_callback(check):
    outcome = conformance.outcome(conformance.Subject("broken", partial(alone, MUTANTS[check])), check)
    assert outcome.verdict == "fail", outcome


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_a_correct_callback_passes(check):
    outcome = conformance.outcome(conformance.Subject("whole", partial(alone, AdaptiveMask)), check)
    assert outcome.verdict == "pass", outcome
