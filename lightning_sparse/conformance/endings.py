"""Runs shorter or longer than planned: stopped early, a few steps long, or continued by a second fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, Trainer
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import SIZE, zeros
from lightning_sparse.conformance.steps import some_zeros

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


@check("a run that is stopped early has the zeros that it logs, and where those are not its target, it says so", GROUP)
def a_run_stopped_early_says_what_it_missed(subject: Subject, folder: Path) -> None:
    promised = _logged(subject.fit(subject.model(), epochs=EPOCHS), "sparsity/target")
    module = subject.model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = subject.fit(module, StopAt(EPOCHS), epochs=EPOCHS)
    share, logged = zeros(module) / SIZE, _logged(trainer, "sparsity/total")
    require(logged is None or abs(logged - share) < 1e-6, f"sparsity/total is {logged} after a run that was stopped, the module's {share}")
    notices = [str(one.message) for one in caught if "ended at step" in str(one.message)]
    missed = promised is not None and share < promised - ROUNDING
    require(
        not missed or len(notices) == 1,
        f"stopped at {share:.1%} zeros on the way to {promised or 0:.1%}, and {len(notices)} warnings say so",
    )


@check("fast_dev_run and a run of 20 steps go through, and meet the target that is logged", GROUP)
def a_target_is_met_in_a_few_steps(subject: Subject, folder: Path) -> None:
    for steps, options in ((1, {"fast_dev_run": True}), (FEW, {"max_steps": FEW})):
        module = subject.model()
        trainer = subject.fit(module, epochs=-1, **options)
        require(trainer.global_step == steps, f"the run took {trainer.global_step} steps, not {steps}")
        target, share = _logged(trainer, "sparsity/target"), zeros(module) / SIZE
        if target is not None:
            some_zeros(module, f"after {steps} steps")
            require(abs(share - target) < ROUNDING, f"{share:.1%} are zero after a run of {steps} steps, sparsity/target is {target:.1%}")


@check("a second fit of the same Trainer goes on: the zeros of the first do not come back", GROUP)
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
