"""With other code that swaps weights: averages in validation and after fit, optimisers with train() and eval()."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from toys import Toy, data, hooks, several, trainer, weights

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, MagnitudePruning, ReweightedPenalty
from lightning_sparse.conformance.ranks import DDP, on_ranks
from lightning_sparse.conformance.swaps import Average, ScheduleFree

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.5),
    "noise": partial(AdaptiveMask, LOG_SUM, 0.5, noise=noise.ScaledBernoulli()),
    "pruning": partial(MagnitudePruning, 0.5, every=2),
}
# because a schedule-free optimiser's step size is unknown
pytestmark = pytest.mark.filterwarnings("ignore:the step size of ScheduleFree is not known")
every_form = pytest.mark.parametrize("make", several(FORMS, "noise"))
both_orders = pytest.mark.parametrize("first", [True, False], ids=["before", "after"])


def ordered(first, callback, *others):
    return [callback, *others] if first else [*others, callback]


def share(module):
    matrices = [w for w in module.parameters() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


@every_form
@both_orders
@pytest.mark.parametrize("exchanges", [False, True], ids=["copies", "exchanges"])
def test_validating_a_custom_average_changes_nothing(make, first, exchanges):
    ends = []
    for validation in (None, data(seed=1)):
        module, average = Toy(), Average("on_validation_start", "on_validation_end", exchanges)
        trainer(*ordered(first, make(), average), epochs=4).fit(module, data(), validation)
        ends.append([*weights(module).values(), *average.mean])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert share(module) > 0


class Late(Average):
    """Swap its mean in while thresholded weights are in the module."""

    def on_validation_batch_start(self, trainer, module, batch, index):
        if index == 0:
            self._swap(True, trainer, module)


@both_orders
def test_weights_that_change_within_validation_and_stay_so_are_an_error_that_names_the_callback(first):
    run = trainer(*ordered(first, ReweightedPenalty(LOG_SUM, 0.5), Late("none", "on_validation_end")), epochs=2)
    module = Toy()
    with pytest.raises(RuntimeError, match=r"'network.0.weight'.* changed during validation(.|\n)*Late.on_validation_batch_start"):
        run.fit(module, data(), data(seed=1))
    assert hooks(module) == 0


def test_an_average_within_one_batch_of_validation_is_taken_out_again_and_is_no_error():
    class Within(Average):
        def on_validation_batch_start(self, trainer, module, batch, index):
            self._swap(True, trainer, module)

        def on_validation_batch_end(self, trainer, module, *args):
            self._swap(False, trainer, module)

    ends = []
    for validation in (None, data(seed=1)):
        module = Toy()
        trainer(ReweightedPenalty(LOG_SUM, 0.5), Within("none", "none"), epochs=2).fit(module, data(), validation)
        ends.append(weights(module))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


class Samples(Toy):
    """A toy that runs its network in the hooks around validation."""

    def _sample(self, seen):
        live, x = weights(self), torch.ones(1, 8)
        out = self(x)
        assert all(torch.equal(w, live[name]) for name, w in weights(self).items())
        seen.append((out, torch.func.functional_call(self, dict(self.state_dict()), (x,)), self.network[0].weight.detach().clone()))

    def on_validation_start(self):
        self._sample(self.early)

    def on_validation_epoch_end(self):
        self._sample(self.late)

    def __init__(self, **options):
        super().__init__(**options)
        self.early, self.late = [], []


def test_a_forward_in_the_hooks_around_validation_sees_zeros_and_leaves_the_live_weights():
    module = Samples()
    trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=3).fit(module, data(), data(seed=1))
    assert len(module.early) == len(module.late) == 4
    for out, thresholded, live in [module.early[-1], module.late[-1]]:
        assert torch.equal(out, thresholded)
        assert not (live == 0).any()
    assert hooks(module) == 0


def test_a_forward_that_fails_there_leaves_live_weights_and_no_hook():
    class Fails(Toy):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self(torch.ones(1, 5))

    module = Fails()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=4, check_val_every_n_epoch=4).fit(module, data(), data(seed=1))
    assert share(module) == 0
    assert hooks(module) == 0


class FreeOfSchedule(Toy):
    """A toy that switches its optimiser's modes as its authors recommend, at the end in one of several hooks."""

    def __init__(self, end):
        super().__init__(optimizer=ScheduleFree)
        self.end = end

    def on_train_epoch_start(self):
        self.optimizers().train()

    def on_validation_start(self):
        self.optimizers().eval()

    def on_validation_end(self):
        self.optimizers().train()

    def on_train_end(self):
        if self.end == "on_train_end":
            self.optimizers().eval()

    def on_fit_end(self):
        if self.end == "on_fit_end":
            self.optimizers().eval()


@every_form
@pytest.mark.parametrize("end", ["on_train_end", "on_fit_end", "later"])
def test_weights_switched_to_evaluation_at_the_end_are_as_sparse_as_logged(make, end):
    module = FreeOfSchedule(end)
    run = trainer(make(), epochs=4)
    run.fit(module, data(), data(seed=1))
    run.optimizers[0].eval()
    assert 0 < share(module) < 1
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(share(module), abs=1e-7)


def test_noise_is_put_onto_the_weights_that_the_optimiser_trains():
    class Switching(FreeOfSchedule):
        def on_train_epoch_start(self):
            pass

        def on_validation_end(self):
            pass

        def on_train_batch_start(self, *args):
            self.optimizers().train()

    ends = []
    for kind in (FreeOfSchedule, Switching):
        module = kind("later")
        trainer(FORMS["noise"](), epochs=3, val_check_interval=2).fit(module, data(), data(seed=1))
        ends.append(weights(module))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


class HandsOver(Average):
    """An average that is copied into the module at the end."""

    def __init__(self, end, swaps=True):
        super().__init__(*(("on_validation_start", "on_validation_end") if swaps else ("none", "none")))
        setattr(self, end, partial(self._swap, True))


@every_form
@both_orders
@pytest.mark.parametrize("end", ["on_train_end", "on_fit_end"])
def test_an_average_copied_at_the_end_gets_exact_zeros(make, first, end):
    module = Toy()
    run = trainer(*ordered(first, make(), HandsOver(end)), epochs=6)
    run.fit(module, data(), data(seed=1))
    assert 0 < share(module) < 1
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(share(module), abs=1e-7)


class Restores(Callback):
    """Load the first epoch's weights at the end."""

    def __init__(self, end):
        setattr(self, end, self._load)

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            self.first = weights(module)

    def _load(self, trainer, module):
        module.load_state_dict(self.first)


@pytest.mark.parametrize("end", ["on_train_end", "on_fit_end"])
def test_weights_restored_at_the_end_are_unchanged_with_a_warning(end, tmp_path):
    module, restores = Toy(), Restores(end)
    run = trainer(MagnitudePruning(0.8, begin=0.5, every=2), restores, epochs=4)
    with pytest.warns(UserWarning, match=rf"changed in {end} \(Restores.{end}\).* would remove \d+% of the new weights' squared norm"):
        run.fit(module, data())
    assert all(torch.equal(w, restores.first[name]) for name, w in weights(module).items())
    assert float(run.callback_metrics["sparsity/total"]) == share(module) == 0
    run.save_checkpoint(tmp_path / "end.ckpt")
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(file[name], w) for name, w in restores.first.items())


def _two_ranks(rank):
    """Fit with an average that is copied into the module at the end, with different data on each rank."""
    module = Toy()
    run = trainer(FORMS["pruning"](), HandsOver("on_fit_end"), epochs=4, **DDP)
    run.fit(module, data(seed=2 * rank), data(seed=1))
    return dict(module.state_dict()), float(run.callback_metrics["sparsity/total"])


@pytest.mark.slow
def test_two_ranks_agree_on_an_average_copied_at_the_end():
    one, two = on_ranks(_two_ranks)
    assert all(torch.equal(w, two[0][name]) for name, w in one[0].items())
    assert one[1] == two[1] == pytest.approx(sum(int((w == 0).sum()) for w in one[0].values() if w.dim() > 1) / 176)
