"""Runs that end early, are continued, or are fitted again by the same Trainer: schedules and warnings."""

from __future__ import annotations

import copy
import logging
import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from torch import nn
from toys import Toy, data, several, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    ReweightedPenalty,
    Sparsify,
    VariationalDropout,
)
from lightning_sparse.schedules import LinearWarmup

pytestmark = pytest.mark.filterwarnings("ignore:.*has left at most one weight of")  # magnitudes of a toy

LOG_SUM = penalties.LogSum(eps=2.0)


def wide(seed: int = 0) -> Toy:
    return Toy(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), seed=seed)


def zeros(module: nn.Module) -> float:
    matrices = [w for w in weights(module).values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


class Stop(Callback):
    """Stop training after a given number of steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.at


def run(callback, at=20, epochs=20, module=None):
    """Return the warnings of a run stopped after ``at`` of 80 steps, and its module."""
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


@pytest.mark.parametrize("make", several(TARGETS, "penalty", "pruning"))
def test_a_missed_target_is_reported_once_and_finish_prunes_to_it(make):
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
    "warm-up": (lambda: AdaptiveProx(LOG_SUM, LinearWarmup(0.1, 0.5)), r"lam is 0.05, its schedule ends at 0.1"),
}


@pytest.mark.parametrize(("make", "said"), OTHERS.values(), ids=OTHERS.keys())
def test_a_warning_if_freeze_or_schedule_was_not_reached(make, said):
    with pytest.warns(UserWarning, match=said):
        trainer(make(), Stop(20), epochs=20).fit(wide(), data())


@pytest.mark.parametrize(
    "make", [lambda: ReweightedPenalty(LOG_SUM, 0.1), lambda: MagnitudePruning(0.8, end=0.2), lambda: TARGETS["penalty"](freeze=0.8)]
)
def test_no_warning_if_nothing_is_missing(make):
    assert run(make())[0] == []


def few(callback, epochs=25, optimizer=lambda p: torch.optim.SGD(p, 1e-7), zeros=0.0):
    """Return the warnings about too few zeros after a run from a network with a share of ``zeros``."""
    module = Toy(optimizer=optimizer)
    with torch.no_grad():
        for w in (p for p in module.parameters() if p.dim() > 1):
            w.view(-1)[: round(zeros * w.numel())] = 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(callback, epochs=epochs).fit(module, data())
    return [str(one.message) for one in said if "selected weights to zero" in str(one.message)]


FEW = {
    "penalty": (lambda: ReweightedPenalty(LOG_SUM, 1e-3), "lam=0.001.*mean keep probability.*Raise lam or the learning rate, train longer"),
    "joint": (lambda: EtaTrick(LOG_SUM, 1e-3, learned_lr=0.5), "moved by .* because SGD moves.*Raise lam or learned_lr .now 0.5."),
    "VarDrop": (lambda: VariationalDropout(1e-3), "kl_weight=0.001.*Raise kl_weight or learned_lr .now the weights' own."),
    "L0": (lambda: HardConcrete(1e-3), "target_sparsity in place of lam, which finds it"),
}


@pytest.mark.parametrize(("make", "said"), several(FEW, "penalty"))
def test_a_run_with_hardly_any_zeros_warns_with_reason_and_advice(make, said):
    messages = few(make())
    assert len(messages) == 1
    assert re.search("has set 0.00% .* in 100 optimiser steps .*" + said, messages[0])


@pytest.mark.parametrize(("zeros", "said"), [(0.03, 1), (0.1, 0)])
def test_some_weights_near_zero_are_not_what_lam_is_for(zeros, said):
    assert len(few(ReweightedPenalty(LOG_SUM, 1e-9, threshold=1e-4), zeros=zeros)) == said


@pytest.mark.parametrize("make", [lambda: ReweightedPenalty(LOG_SUM, 1e-3, threshold=0), TARGETS["pruning"]])
def test_no_warning_about_zeros_without_a_target(make):
    assert few(make()) == []


def test_a_run_of_a_few_steps_may_be_a_trial(caplog):
    with caplog.at_level(logging.INFO):
        assert few(ReweightedPenalty(LOG_SUM, 1e-3), epochs=5) == []
    assert "to zero in 20 optimiser steps" in caplog.text


def test_no_warning_if_there_are_zeros():
    assert few(ReweightedPenalty(LOG_SUM, 0.1), optimizer=lambda p: torch.optim.Adam(p, 1e-2)) == []


def test_early_stopping_is_told_apart_from_the_end(caplog):
    module, callback = wide(), ReweightedPenalty(LOG_SUM, target_sparsity=0.8, finish="prune")
    stop = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    with caplog.at_level(logging.INFO):
        trainer(callback, stop, epochs=20).fit(module, data(), data())
    assert zeros(module) == pytest.approx(0.8, abs=0.002)
    assert "may stop the run before ReweightedPenalty reaches its target of 0.8" in caplog.text
    assert "training ended at step 8 of 80" in caplog.text
    assert "finish='prune' has removed the lowest ranks, so that 79.97% are zero: once and without fine-tuning" in caplog.text
    assert "are of the network before: validate and save again" in caplog.text


def test_finish_is_an_argument_like_the_others():
    callback = AdaptiveMask(LOG_SUM, target_sparsity=0.9, finish="prune")
    assert callback.to_penalty().to_prox().finish == callback.recipe()["init_args"]["finish"] == "prune"
    assert MagnitudePruning(0.9, finish="prune").to_mask().finish == "keep"  # because top-k always has its share of zeros
    with pytest.raises(ValueError, match=r"finish='prune' cuts to target_sparsity .* none is given"):
        ReweightedPenalty(LOG_SUM, 1e-3, finish="prune")
    with pytest.raises(ValueError, match=r"finish must be 'keep' or 'prune', got 'prun'"):
        ReweightedPenalty(LOG_SUM, target_sparsity=0.9, finish="prun")


# -- more epochs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), TARGETS["penalty"]], ids=["lam", "target"])
def test_more_epochs_after_the_freeze_fine_tune_the_same_support_with_a_warning(make, tmp_path):
    first, module = trainer(make(), epochs=10), wide()
    first.fit(module, data())
    first.save_checkpoint(tmp_path / "end.ckpt")
    resumed = wide(seed=1)
    with pytest.warns(
        UserWarning, match=r"continues for 80 optimiser steps in all, not 40, and its support is frozen already: the steps from 40"
    ):
        trainer(make(), epochs=20).fit(resumed, data(), ckpt_path=tmp_path / "end.ckpt")
    for name, w in weights(module).items():
        assert torch.equal(w == 0, weights(resumed)[name] == 0)
    assert any(not torch.equal(w, weights(resumed)[name]) for name, w in weights(module).items())


def test_more_epochs_before_the_freeze_move_it_with_a_warning(tmp_path, caplog):
    save = LambdaCallback(on_train_epoch_end=lambda t, m: t.save_checkpoint(tmp_path / "part.ckpt") if t.current_epoch == 4 else None)
    trainer(ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), save, epochs=10).fit(wide(), data())
    frozen, again = [], ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25)
    look = LambdaCallback(on_train_batch_end=lambda *_: frozen.append(again.frozen))
    with caplog.at_level(logging.INFO):
        trainer(again, look, epochs=20).fit(wide(), data(), ckpt_path=tmp_path / "part.ckpt")
    assert frozen.index(True) == 60 - 20 - 1
    assert "continues for 80 optimiser steps in all, not 40: its shares (freeze, warm-up, ramp) are of the new length" in caplog.text


class Asked(Callback):
    """Record the logged target and the zeros at the end of each epoch."""

    def __init__(self):
        self.targets, self.zeros = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.targets.append(float(trainer.callback_metrics["sparsity/target"]))
        self.zeros.append(zeros(pl_module))


def resumed(first, then, tmp_path, epochs=(10, 20), at=5):
    """Fit 10 epochs, then resume a run of 20 epochs from the end of epoch ``at``."""
    path = tmp_path / "part.ckpt"
    save = LambdaCallback(on_train_epoch_end=lambda t, m: t.save_checkpoint(path) if t.current_epoch == at - 1 else None)
    watch, again = Asked(), Asked()
    trainer(watch, first, save, epochs=epochs[0]).fit(wide(), data())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(again, then, epochs=epochs[1]).fit(wide(seed=1), data(), ckpt_path=path)
    return watch, again, [str(one.message) for one in said]


SHORTER = r"trained no step, because the checkpoint is of epoch \d and step 20, and max_epochs=4.*target_sparsity is 0.9. Give the Trainer"


def test_a_resumed_fit_that_has_no_step_left_says_that_its_target_is_missed(tmp_path):
    _, _, said = resumed(Sparsify(0.9), Sparsify(0.9), tmp_path, epochs=(10, 4))
    assert sum(bool(re.search(SHORTER, text)) for text in said) == 1, said
    _, _, said = resumed(Sparsify(0.9), Sparsify(0.9), tmp_path, epochs=(10, 10), at=10)
    assert not [text for text in said if "trained no step" in text]  # a run that had ended, and meets it


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS.keys())
def test_in_a_longer_run_the_target_never_falls_below_what_it_was(make, tmp_path):
    watch, again, _ = resumed(make(), make(), tmp_path)
    before = watch.targets[4]
    assert 0.1 < before < 0.8
    assert all(one >= before - 1e-6 for one in again.targets)
    assert again.targets == sorted(again.targets)
    assert again.targets[-1] == pytest.approx(0.8)
    assert again.zeros[-1] == pytest.approx(0.8, abs=0.005)


def test_it_does_not_fall_in_a_run_that_is_resumed_twice(tmp_path):
    make = TARGETS["pruning"]
    watch = resumed(make(), make(), tmp_path)[0]
    path = tmp_path / "twice.ckpt"
    save = LambdaCallback(on_train_epoch_end=lambda t, m: t.save_checkpoint(path) if t.current_epoch == 6 else None)
    trainer(make(), save, epochs=20).fit(wide(), data(), ckpt_path=tmp_path / "part.ckpt")
    third = Asked()
    trainer(third, make(), epochs=40).fit(wide(), data(), ckpt_path=path)
    assert min(third.targets) >= watch.targets[4] - 1e-6


ANOTHER = {
    "penalty": (lambda share: ReweightedPenalty(LOG_SUM, target_sparsity=share), "target_sparsity: 0.8 -> 0.9"),
    "pruning": (lambda share: MagnitudePruning(target_sparsity=share, every=3, end=0.7, freeze=0.25), "sparsity: 0.8 -> 0.9"),
}


@pytest.mark.parametrize(("make", "change"), ANOTHER.values(), ids=ANOTHER.keys())
def test_a_changed_target_of_a_frozen_support_gives_a_warning(make, change, tmp_path):
    _, again, said = resumed(make(0.8), make(0.9), tmp_path, at=9)
    told = [one for one in said if "with other settings" in one]
    assert len(told) == 1
    assert change in told[0]
    assert "frozen already, so the same weights stay zero whatever the new one says; sparsity/target stays 0.8" in told[0]
    assert again.targets == pytest.approx([0.8] * len(again.targets))
    assert again.zeros == pytest.approx([0.8] * len(again.zeros), abs=0.005)


def test_it_is_still_known_in_a_file_of_that_run(tmp_path):
    make, path = ANOTHER["penalty"][0], tmp_path / "twice.ckpt"
    save = LambdaCallback(on_train_epoch_end=lambda t, m: t.save_checkpoint(path) if t.current_epoch == 12 else None)
    resumed(make(0.8), make(0.9), tmp_path, at=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(make(0.9), save, epochs=20).fit(wide(), data(), ckpt_path=tmp_path / "part.ckpt")
        third = Asked()
        trainer(third, make(0.9), epochs=20).fit(wide(), data(), ckpt_path=path)
    assert third.targets == pytest.approx([0.8] * len(third.targets))


def test_a_damaged_target_is_refused():
    with pytest.raises(ValueError, match=r"'asked' must be a number in \[0, 1\], got 2.0"):
        ReweightedPenalty(LOG_SUM, 0.1).load_state_dict({"step": 1, "offset": 0, "frozen": True, "taken": {}, "asked": 2.0})


def test_no_warning_for_the_same_length(tmp_path, caplog):
    first = trainer(ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), epochs=10)
    first.fit(wide(), data())
    first.save_checkpoint(tmp_path / "end.ckpt")
    again = wide()
    trainer(ReweightedPenalty(LOG_SUM, 0.1, freeze=0.25), epochs=10).fit(again, data(), ckpt_path=tmp_path / "end.ckpt")
    assert "continues for" not in caplog.text
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


@pytest.mark.filterwarnings("ignore:all weights of .* were zero at the start and are zero at the end")  # those removed by the first fit
@pytest.mark.parametrize("fit", NEW.values(), ids=NEW.keys())
def test_any_other_fit_starts_from_the_beginning(fit):
    callback, module = MagnitudePruning(0.8, every=3), wide()
    fitted = trainer(callback, epochs=5)
    fitted.fit(module, data())
    assert callback.step == 20
    fit(fitted, callback, module)
    assert callback.step == 4


def test_a_copy_has_no_state_of_an_earlier_fit():
    callback, module = MagnitudePruning(0.8, every=3, scope="layer"), wide()
    fitted = trainer(callback, epochs=2)
    fitted.fit(module, data())
    for again, steps in ((copy.deepcopy(callback), 4), (callback, 12)):
        fitted.callbacks[:], fitted.fit_loop.max_epochs = [again], fitted.fit_loop.max_epochs + 1
        fitted.fit(module, data())
        assert again.step == steps


@pytest.mark.parametrize("none", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}, {"max_time": "00:00:00:00"}])
def test_a_fit_without_a_step_says_that_its_target_is_missed(none, tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    with pytest.warns(
        UserWarning, match=r"trained no step, with max_epochs=.* 0.00% .* target_sparsity is 0.9. Give the Trainer epochs, steps, time"
    ):
        Trainer(callbacks=[Sparsify(0.9)], default_root_dir=tmp_path, **(quiet | none)).fit(wide(), data())
