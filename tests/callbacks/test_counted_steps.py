"""A callback's steps are Lightning's: one for each, whatever optimiser takes it and however a module asks for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from every_form import FORMS
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from toys import Toy, data, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, MagnitudePruning, ReweightedPenalty
from lightning_sparse.conformance.optimizers import EverySecond, held_step, super_step

LOG_SUM = penalties.LogSum(eps=2.0)
PRUNING = partial(MagnitudePruning, 0.5, every=2)
SOME = {name: FORMS[name] for name in ("penalty", "prox", "mask", "joint", "VarDrop, additive", "L0")} | {"pruning": PRUNING}
some_forms = pytest.mark.parametrize("form", SOME.values(), ids=SOME.keys())


def ended(form, module, **options):
    callback = form()
    torch.manual_seed(0)
    run = trainer(callback, **options)
    run.fit(module, data())
    return callback, run, weights(module)


@some_forms
@pytest.mark.parametrize("make", [super_step, held_step], ids=["super().step()", "held"])
def test_an_optimiser_that_steps_within_its_step_ends_as_the_plain_one(form, make):
    callback, run, found = ended(form, Toy(optimizer=make))
    _, _, wanted = ended(form, Toy())
    assert callback.step == run.global_step == 8
    assert all(torch.equal(w, wanted[name]) for name, w in found.items())


@pytest.mark.parametrize("make", [super_step, held_step], ids=["super().step()", "held"])
def test_so_it_does_under_a_grad_scaler_and_in_a_manual_loop(make):
    class Manual(Toy):
        """Two steps a batch, so that a mask which stays on the weights would show."""

        automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, index))
                optimizer.step()

    mask = partial(AdaptiveMask, LOG_SUM, 0.5, curvature=None)
    for kind in (Toy, Manual):
        scaler = lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]}  # noqa: E731
        _, _, found = ended(mask, kind(optimizer=make), **scaler())
        _, _, wanted = ended(mask, kind(), **scaler())
        assert all(torch.equal(w, wanted[name]) for name, w in found.items())


@some_forms
def test_a_step_that_the_module_leaves_out_is_still_one_of_the_run(form):
    callback, run, _ = ended(form, EverySecond())
    assert callback.step == run.global_step == callback.total == 8


class Doubling(Toy):
    """Evaluates and steps twice at each batch."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        optimizer.step(closure=optimizer_closure)


@some_forms
@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 1e-2), held_step], ids=["Adam", "held"])
def test_a_second_step_of_a_batch_is_no_second_evaluation_and_none_of_the_run(form, make):
    callback, run, _ = ended(form, Doubling(optimizer=make))
    assert callback.step == run.global_step == 8


class Twice(torch.optim.SGD):
    """Evaluates its closure twice a step."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


def test_a_loss_that_is_evaluated_twice_in_one_step_is_refused_with_its_reason():
    with pytest.raises(RuntimeError, match="Twice evaluates the loss several times a step"):
        ended(partial(ReweightedPenalty, LOG_SUM, 0.5), Toy(optimizer=lambda p: Twice(p, 0.1)))


class Capped(torch.optim.Adam):
    """Moves weights after Adam's own step, zeros too."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1e-3)
        return loss


def test_zeros_are_held_after_what_a_subclass_does_to_the_weights():
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # so that Adam's part of the step has hooks of its own
    zeros = []

    class Looking(Toy):
        def on_train_batch_end(self, *_):
            zeros.append(int((self.network[0].weight == 0).sum()))

    ended(partial(MagnitudePruning, 0.5, end=0.5, every=1, scope="layer"), Looking(optimizer=lambda p: Capped(p, 1e-2)))
    assert zeros[3:] == [64] * 5
    assert zeros[0] < zeros[1] < zeros[2] < 64


class Rarely(Toy):
    """Manual optimisation that steps ``times`` at every ``every``-th batch."""

    def __init__(self, every, times):
        super().__init__()
        self.every, self.times, self.automatic_optimization = every, times, False

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))
        if (index + 1) % self.every == 0:
            for _ in range(self.times):
                self.optimizers().step()
            self.optimizers().zero_grad()


CASES = {  # batches between steps, steps then, epochs, max_steps; the batches and the steps that the run has
    "epochs alone": (2, 1, 2, -1, 8, 4),
    "steps that end it": (2, 1, 100, 4, 8, 4),
    "steps that never do": (4, 1, 2, 7, 8, 2),
    "two at a batch, ended by steps": (1, 2, 100, 12, 6, 12),
    "two at a batch, ended by steps that epochs hide": (1, 2, 2, 12, 6, 12),
    "no epochs": (1, 1, -1, 6, 6, 6),
}


@pytest.mark.parametrize(("every", "times", "epochs", "most", "batches", "steps"), CASES.values(), ids=CASES.keys())
def test_a_manual_run_arrives_when_it_ends_whatever_ends_it(every, times, epochs, most, batches, steps):
    lams = []

    class Looking(Rarely):
        def on_train_batch_end(self, *_):
            lams.append(callback.step / callback.total)

    callback = AdaptiveProx(LOG_SUM, 0.2)
    run = trainer(callback, epochs=epochs, max_steps=most)
    run.fit(Looking(every, times), data())
    assert (len(lams), run.global_step) == (batches, steps)
    assert lams[-1] == 1.0
    assert lams == sorted(lams)
    assert lams[0] <= 0.5
