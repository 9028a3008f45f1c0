"""Runs shorter or longer than planned: stopped early, a few steps long, or continued by a second fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, Trainer
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.life_cycle import SIZE, zeros
from lightning_sparse.conformance.steps import own_steps, some_zeros

GROUP = "length of a run"
EPOCHS, FEW = 10, 20
ROUNDING = 1.5 / SIZE


class StopAt(Callback):
    """Stop training after ``batches`` batches, like EarlyStopping, ``max_time`` or a cluster's time limit."""

    def __init__(self, batches: int) -> None:
        self.batches, self.left = batches, batches

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left <= 0


class Targets(Callback):
    """Record the target that is logged at the end of each epoch; write ``file`` at the end of epoch ``at``."""

    def __init__(self, file: Path | None = None, at: int = 0) -> None:
        self.file, self.at = file, at
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(_logged(trainer, "sparsity/target") or 0.0)
        if self.file is not None and trainer.current_epoch == self.at:
            trainer.save_checkpoint(self.file)


class Shares(Callback):
    """Record the share of zeros in the module's state_dict at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        state = pl_module.state_dict()
        self.seen.append(sum(int((w == 0).sum()) for w in state.values() if w.dim() > 1) / SIZE)


def _logged(trainer: Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


@check("a run stopped early logs its true share of zeros, and warns if that share misses the target", GROUP)
def a_run_stopped_early_says_what_it_missed(subject: Subject, folder: Path) -> None:
    promised = _logged(subject.fit(subject.model(), epochs=EPOCHS), "sparsity/target")
    module = subject.model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = subject.fit(module, StopAt(EPOCHS), epochs=EPOCHS)
    share, logged = zeros(module) / SIZE, _logged(trainer, "sparsity/total")
    same = logged is None or abs(logged - share) < 1e-6
    require(same, f"sparsity/total is {logged} after an early stop, the module's share of zeros is {share}")
    notices = [str(one.message) for one in caught if "ended at step" in str(one.message)]
    missed = promised is not None and share < promised - ROUNDING
    require(
        not missed or len(notices) == 1,
        f"stopped at {share:.1%} zeros with a target of {promised or 0:.1%}, and {len(notices)} warnings say so, expected 1",
    )


@check("a run at a tiny learning rate meets its target, or warns once that it has hardly any zeros", GROUP)
def a_run_without_zeros_says_so(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    module = subject.model(optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-7))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = subject.fit(module, epochs=25)
    target, share = _logged(trainer, "sparsity/target"), zeros(module) / SIZE
    if target is not None:
        require(abs(share - target) < ROUNDING, f"{share:.1%} of the weights are zero at the run's end, sparsity/target is {target:.1%}")
        return
    if share > 0:
        raise NotApplicable("its zeros do not depend on the optimiser's steps")
    notices = [str(one.message) for one in caught if "selected weights to zero" in str(one.message)]
    require(len(notices) == 1, f"no weight is zero after {trainer.global_step} steps, and {len(notices)} warnings say so, expected 1")


@check("fast_dev_run and a run of 20 steps complete and reach the logged target", GROUP)
def a_target_is_met_in_a_few_steps(subject: Subject, folder: Path) -> None:
    for steps, options in ((1, {"fast_dev_run": True}), (FEW, {"max_steps": FEW})):
        module = subject.model()
        trainer = subject.fit(module, epochs=-1, **options)
        require(trainer.global_step == steps, f"the run took {trainer.global_step} steps, not {steps}")
        target, share = _logged(trainer, "sparsity/target"), zeros(module) / SIZE
        if target is not None:
            some_zeros(module, f"after {steps} steps")
            require(abs(share - target) < ROUNDING, f"{share:.1%} are zero after a run of {steps} steps, sparsity/target is {target:.1%}")


@check("in a run resumed with more epochs, the logged target never falls, and the run reaches it", GROUP)
def a_longer_run_keeps_its_target(subject: Subject, folder: Path) -> None:
    first = Targets(folder / "part.ckpt", EPOCHS // 2)
    subject.fit(subject.model(), first, epochs=EPOCHS, first=False)
    if not first.seen or max(first.seen) == 0:
        raise NotApplicable("the callback has no target")
    before, module, then = first.seen[EPOCHS // 2], subject.model(), Targets()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = subject.fit(module, then, epochs=2 * EPOCHS, first=False, ckpt_path=str(folder / "part.ckpt"))
    lowest, share, target = min(then.seen), zeros(module) / SIZE, _logged(trainer, "sparsity/target") or 0.0
    require(lowest > before - 1e-6, f"the target was {before:.1%} when the run was interrupted, and {lowest:.1%} in the longer one")
    require(abs(share - target) < ROUNDING, f"{share:.1%} are zero after the longer run, sparsity/target is {target:.1%}")


@check("a second fit of the same Trainer continues: zeros of the first fit stay zero", GROUP)
def a_second_fit_goes_on(subject: Subject, folder: Path) -> None:
    module, shares = subject.model(), Shares()
    trainer = subject.trainer(shares, epochs=EPOCHS)
    trainer.fit(module, toys.data(), toys.data(seed=1))
    first = zeros(module) / SIZE
    trainer.fit_loop.max_epochs = 2 * EPOCHS
    trainer.fit(module, toys.data(), toys.data(seed=1))
    lowest = min(shares.seen[EPOCHS:], default=0.0)
    require(len(shares.seen) == 2 * EPOCHS, f"the two fits took {len(shares.seen)} epochs, not {2 * EPOCHS}")
    require(lowest > first - 0.1, f"{first:.1%} were zero when the first fit ended, and only {lowest:.1%} at an epoch's end of the second")
