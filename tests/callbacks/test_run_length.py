"""Runs that end before what was promised, that are continued, or fitted again by the same Trainer: what applies, and that it is said."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from torch import nn
from toys import Toy, data, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, HardConcrete, MagnitudePruning, ReweightedPenalty, VariationalDropout
from lightning_sparse.schedules import LinearWarmup

LOG_SUM = penalties.LogSum(eps=2.0)


def wide(seed: int = 0) -> Toy:
    return Toy(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), seed=seed)


def zeros(module: nn.Module) -> float:
    matrices = [w for w in weights(module).values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


class Stop(Callback):
    """Ends training after so many steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.at


def run(callback, at=20, epochs=20, module=None):
    """The messages of warnings in a run that is stopped after ``at`` of 80 steps, and its module."""
    module = module or wide()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(callback, Stop(at), epochs=epochs).fit(module, data())
    return [str(one.message) for one in said if issubclass(one.category, UserWarning) and "training ended" in str(one.message)], module


TARGETS = {
    "penalty": lambda **k: ReweightedPenalty(LOG_SUM, target_sparsity=0.8, **k),
    "mask": lambda **k: AdaptiveMask(LOG_SUM, target_sparsity=0.8, **k),
    "VarDrop": lambda **k: VariationalDropout(target_sparsity=0.8, **k),
    "L0": lambda **k: HardConcrete(target_sparsity=0.8, **k),
    "pruning": lambda **k: MagnitudePruning(target_sparsity=0.8, every=3, **k),
}


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS.keys())
def test_a_target_that_was_not_reached_is_said_once_and_finish_prunes_to_it(make):
    (said,), kept = run(make())
    assert "training ended at step 20 of 80" in said
    assert "Train to step 60 at least" in said
    assert said.endswith("finish='prune' cuts to the target wherever training ends")
    assert zeros(kept) < 0.75
    said, pruned = run(make(finish="prune"))
    assert said == []
    assert zeros(pruned) == pytest.approx(0.8, abs=0.002)


OTHERS = {
    "freeze": (
        lambda: ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25),
        r"was to be frozen at step 60 \(freeze=0.25\), so nothing was fine-tuned",
    ),
    "warm-up": (lambda: AdaptiveProx(LOG_SUM, LinearWarmup(0.1, 0.5)), r"lam has come to 0.05, its schedule ends at 0.1"),
}


@pytest.mark.parametrize(("make", "said"), OTHERS.values(), ids=OTHERS.keys())
def test_a_freeze_or_a_schedule_that_did_not_come_is_said(make, said):
    with pytest.warns(UserWarning, match=said):
        trainer(make(), Stop(20), epochs=20).fit(wide(), data())


@pytest.mark.parametrize(
    "make", [lambda: ReweightedPenalty(LOG_SUM, 0.1), lambda: MagnitudePruning(0.8, end=0.2), lambda: TARGETS["penalty"](freeze=0.8)]
)
def test_nothing_is_said_where_nothing_is_missing(make):
    assert run(make())[0] == []


def test_early_stopping_is_told_apart_from_the_end(caplog):
    module, callback = wide(), ReweightedPenalty(LOG_SUM, target_sparsity=0.8, finish="prune")
    stop = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    with caplog.at_level(logging.INFO):
        trainer(callback, stop, epochs=20).fit(module, data(), data())
    assert zeros(module) == pytest.approx(0.8, abs=0.002)
    assert "training ended at step 8 of 80" in caplog.text
    assert "finish='prune' has removed the lowest ranks, so that 79.97% are zero" in caplog.text


def test_finish_is_an_argument_like_the_others():
    callback = AdaptiveMask(LOG_SUM, target_sparsity=0.9, finish="prune")
    assert callback.to_penalty().to_prox().finish == callback.recipe()["init_args"]["finish"] == "prune"
    assert MagnitudePruning(0.9, finish="prune").to_mask().finish == "keep"  # top-k always has its share
    with pytest.raises(ValueError, match=r"finish='prune' cuts to target_sparsity .* none is given"):
        ReweightedPenalty(LOG_SUM, 1e-3, finish="prune")
    with pytest.raises(ValueError, match=r"finish must be 'keep' or 'prune', got 'prun'"):
        ReweightedPenalty(LOG_SUM, target_sparsity=0.9, finish="prun")


# -- more epochs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), TARGETS["penalty"]], ids=["lam", "target"])
def test_more_epochs_after_the_freeze_fine_tune_the_same_support_and_that_is_said(make, tmp_path):
    first, module = trainer(make(), epochs=10), wide()
    first.fit(module, data())
    first.save_checkpoint(tmp_path / "end.ckpt")
    resumed = wide(seed=1)
    with pytest.warns(
        UserWarning, match=r"goes on for 80 optimiser steps in all, not 40, and its support is frozen already: the steps from 40"
    ):
        trainer(make(), epochs=20).fit(resumed, data(), ckpt_path=tmp_path / "end.ckpt")
    for name, w in weights(module).items():
        assert torch.equal(w == 0, weights(resumed)[name] == 0)
    assert any(not torch.equal(w, weights(resumed)[name]) for name, w in weights(module).items())


def test_more_epochs_before_the_freeze_move_it_and_that_is_said(tmp_path, caplog):
    save = LambdaCallback(on_train_epoch_end=lambda t, m: t.save_checkpoint(tmp_path / "part.ckpt") if t.current_epoch == 4 else None)
    trainer(ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), save, epochs=10).fit(wide(), data())
    frozen, again = [], ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25)
    look = LambdaCallback(on_train_batch_end=lambda *_: frozen.append(again.frozen))
    with caplog.at_level(logging.INFO):
        trainer(again, look, epochs=20).fit(wide(), data(), ckpt_path=tmp_path / "part.ckpt")
    assert frozen.index(True) == 60 - 20 - 1
    assert "goes on for 80 optimiser steps in all, not 40: its shares (freeze, warm-up, ramp) are of the new length" in caplog.text


def test_the_same_length_is_not_worth_a_word(tmp_path, caplog):
    first = trainer(ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), epochs=10)
    first.fit(wide(), data())
    first.save_checkpoint(tmp_path / "end.ckpt")
    again = wide()
    trainer(ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), epochs=10).fit(again, data(), ckpt_path=tmp_path / "end.ckpt")
    assert "goes on" not in caplog.text
    assert zeros(again) > 0


# -- a second fit ------------------------------------------------------------------------------------------------------------


class Shares(Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(round(zeros(pl_module), 3))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_stay_pruned_in_a_second_fit_of_the_same_trainer(scope):
    module, shares = wide(), Shares()
    fitted = trainer(MagnitudePruning(0.8, every=3, scope=scope), shares, epochs=5)
    fitted.fit(module, data())
    first = weights(module)
    fitted.fit_loop.max_epochs = 10
    fitted.fit(module, data())
    assert shares.seen[4:] == [shares.seen[4]] * 6
    assert shares.seen[4] == pytest.approx(0.8, abs=0.002)
    assert all(torch.equal(w == 0, weights(module)[name] == 0) for name, w in first.items() if w.dim() > 1)
    assert any(not torch.equal(w, weights(module)[name]) for name, w in first.items())


def test_a_fit_that_was_stopped_on_the_ramp_goes_on_along_it():
    module, shares, stop = wide(), Shares(), Stop(20)
    fitted = trainer(MagnitudePruning(0.8, every=1), shares, stop, epochs=10)
    with pytest.warns(UserWarning, match="training ended at step 20 of 40"):
        fitted.fit(module, data())
    stop.at, fitted.should_stop = 1000, False
    fitted.fit(module, data())
    expected = [0.8 * (1 - (1 - min(step / 30, 1)) ** 3) for step in range(4, 41, 4)]
    assert shares.seen == pytest.approx(expected, abs=0.002)


NEW = {
    "another Trainer": lambda fitted, callback, module: trainer(callback, epochs=1).fit(module, data()),
    "another module": lambda fitted, callback, module: (setattr(fitted.fit_loop, "max_epochs", 6), fitted.fit(wide(), data())),
    "other weights": lambda fitted, callback, module: (
        module.load_state_dict(wide().state_dict()),
        setattr(fitted.fit_loop, "max_epochs", 6),
        fitted.fit(module, data()),
    ),
}


@pytest.mark.parametrize("fit", NEW.values(), ids=NEW.keys())
def test_any_other_fit_begins_anew(fit):
    callback, module = MagnitudePruning(0.8, every=3), wide()
    fitted = trainer(callback, epochs=5)
    fitted.fit(module, data())
    assert callback.step == 20
    fit(fitted, callback, module)
    assert callback.step == 4


def test_a_copy_knows_no_earlier_fit():
    callback, module = MagnitudePruning(0.8, every=3), wide()
    fitted = trainer(callback, epochs=2)
    fitted.fit(module, data())
    assert callback._fit.goes_on(fitted, module)
    assert not copy.deepcopy(callback)._fit.goes_on(fitted, module)
    assert not pickle.loads(pickle.dumps(callback._fit)).goes_on(fitted, module)
