"""The callback counts the same steps as Lightning, for all optimisers and ways to step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from every_form import FORMS
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from toys import Toy, data, several, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, MagnitudePruning, ReweightedPenalty, Sparsify
from lightning_sparse.conformance.optimizers import EverySecond, super_step, wrapped_step

LOG_SUM = penalties.LogSum(eps=2.0)
PRUNING = partial(MagnitudePruning, 0.5, every=2)
SOME = {name: FORMS[name] for name in ("penalty", "prox", "mask", "joint", "VarDrop, additive", "L0")} | {"pruning": PRUNING}
some_forms = pytest.mark.parametrize("form", several(SOME, "prox", "mask", "L0", "pruning"))


def ended(form, module, **options):
    callback = form()
    torch.manual_seed(0)
    run = trainer(callback, **options)
    run.fit(module, data())
    return callback, run, weights(module)


@some_forms
@pytest.mark.parametrize("make", [super_step, wrapped_step], ids=["super().step()", "held"])
def test_an_optimiser_that_steps_within_its_step_ends_as_the_plain_one(form, make):
    callback, run, found = ended(form, Toy(optimizer=make))
    _, _, wanted = ended(form, Toy())
    assert callback.step == run.global_step == 8
    assert all(torch.equal(w, wanted[name]) for name, w in found.items())


@pytest.mark.parametrize("make", [super_step, wrapped_step], ids=["super().step()", "held"])
def test_also_under_a_grad_scaler_and_in_a_manual_loop(make):
    class Manual(Toy):
        """Manual optimisation with two steps per batch, to detect a mask that stays on the weights."""

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
    """An optimiser that evaluates and steps twice per batch."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        optimizer.step(closure=optimizer_closure)


@some_forms
@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 1e-2), wrapped_step], ids=["Adam", "held"])
def test_a_second_step_of_a_batch_is_no_second_evaluation_and_none_of_the_run(form, make):
    callback, run, _ = ended(form, Doubling(optimizer=make))
    assert callback.step == run.global_step == 8


class Twice(torch.optim.SGD):
    """An optimiser that evaluates its closure twice per step."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


def test_two_evaluations_of_the_loss_in_one_step_are_refused():
    with pytest.raises(RuntimeError, match="Twice evaluates the loss several times a step"):
        ended(partial(ReweightedPenalty, LOG_SUM, 0.5), Toy(optimizer=lambda p: Twice(p, 0.1)))


class Capped(torch.optim.Adam):
    """Adam that changes all weights, also zeros, after its own step."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1e-3)
        return loss


def test_zeros_are_held_after_what_a_subclass_does_to_the_weights():
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # because Adam's part of the step then has its own hooks
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


CASES = {  # batches between steps, steps at a time, epochs, max_steps; batches and steps of the run
    "epochs alone": (2, 1, 2, -1, 8, 4),
    "steps that end it": (2, 1, 100, 4, 8, 4),
    "steps that never do": (4, 1, 2, 7, 8, 2),
    "two at a batch, ended by steps": (1, 2, 100, 12, 6, 12),
    "two at a batch, ended by steps that epochs hide": (1, 2, 2, 12, 6, 12),
    "no epochs": (1, 1, -1, 6, 6, 6),
}


@pytest.mark.parametrize(("every", "times", "epochs", "most", "batches", "steps"), CASES.values(), ids=CASES.keys())
def test_a_manual_run_reaches_its_target_at_any_end(every, times, epochs, most, batches, steps):
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


class NoLoss(Toy):
    """Automatic optimisation without a loss: Lightning calls the optimiser's step, which finds no gradients."""

    def training_step(self, batch, index):
        return None


class NoStep(Toy):
    """Manual optimisation that never steps."""

    automatic_optimization = False

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("kind", [NoLoss, NoStep])
def test_a_fit_in_which_no_optimiser_steps_says_so(kind):
    with pytest.warns(UserWarning, match="Sparsify: no optimiser step has changed the selected weights in 8 batches"):
        trainer(Sparsify(0.5), epochs=2).fit(kind(), data())


def test_a_fit_with_steps_says_nothing_of_them(recwarn):
    trainer(Sparsify(0.5), epochs=2).fit(Toy(), data())
    assert not [str(one.message) for one in recwarn if "no optimiser step" in str(one.message)]
