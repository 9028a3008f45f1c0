"""Together with common Lightning callbacks: best checkpoints, early stopping, tuners, accumulation, finetuning."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.averages import STEPS, matrices
from lightning_sparse.conformance.resume import first_difference

GROUP = "neighbours"
EPOCHS = 4
ORDERS = ((True, "before it"), (False, "after it"))


def _zeros(module: nn.Module) -> int:
    return sum(int((w == 0).sum()) for w in matrices(module).values())


def _nothing(subject: Subject) -> Subject:
    return Subject("nothing", tuple, subject.optimizer)


@check("the best checkpoint's score equals that of its file, loaded into the plain module and validated again", GROUP)
def the_best_score_is_that_of_its_file(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        keeper = ModelCheckpoint(folder / order, monitor="val/loss", save_top_k=2)
        subject.fit(subject.model(), keeper, first=first, epochs=6, enable_checkpointing=True)
        for path, score in keeper.best_k_models.items():
            plain = toys.Toy(seed=1)
            plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            (again,) = toys.trainer().validate(plain, toys.data(seed=1), verbose=False)
            where = f"{Path(path).stem} (with the callback {order})"
            require(abs(again["val/loss"] - float(score)) < 1e-6, f"{where}: recorded {float(score):.6f}, loaded {again['val/loss']:.6f}")


@check("EarlyStopping ends the run with exact zeros", GROUP)
def early_stopping_ends_sparse(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        module = subject.model()
        trainer = subject.fit(module, EarlyStopping("val/loss", min_delta=10.0, patience=2), first=first, epochs=20)
        require(trainer.current_epoch < 19, f"the run did not stop early, with the callback {order}")
        require(_zeros(module) > 0, f"no weight is zero after {trainer.global_step} steps, with the callback {order}")


class _Tunable(toys.Toy):
    """A toy with the attributes that tuners set, and a loader that uses ``batch_size``."""

    lr = 1e-2
    batch_size = 16

    def train_dataloader(self) -> Any:
        return toys.data(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return toys.data(seed=1)


def _tuned(subject: Subject, folder: Path, *tuners: Callback, first: bool = True) -> dict[str, Any]:
    """Fit with ``tuners`` and return the final weights, hooks and number of steps."""
    module = _Tunable(optimizer=subject.optimizer, decay=STEPS) if subject.optimizer else _Tunable(decay=STEPS)
    trainer = subject.trainer(*tuners, first=first, epochs=EPOCHS, default_root_dir=folder)
    trainer.fit(module)
    return {"weights": dict(module.state_dict()), "hooks": toys.hooks(module), "steps": trainer.global_step}


def _tune(subject: Subject, folder: Path, make: Any) -> None:
    """Check that a run with the tuner ends equal to a run without it."""
    control = _nothing(subject)
    difference = first_difference(_tuned(control, folder), _tuned(control, folder, make()))
    if difference:
        raise NotApplicable(f"Lightning's own run differs at {difference} with and without the tuner")
    plain = _tuned(subject, folder)
    for first, order in ORDERS:
        difference = first_difference(plain, _tuned(subject, folder, make(), first=first))
        require(not difference, f"with the tuner, and with the callback {order}, the final state differs at {difference}")


@check("LearningRateFinder's trial does not affect the run", GROUP, slow=True)
def learning_rate_finder_leaves_no_trace(subject: Subject, folder: Path) -> None:
    _tune(subject, folder, lambda: LearningRateFinder(num_training_steps=6, update_attr=False))


@check("BatchSizeFinder's trials do not affect the run", GROUP, slow=True)
def batch_size_finder_leaves_no_trace(subject: Subject, folder: Path) -> None:
    bounded = "max_val" in inspect.signature(BatchSizeFinder).parameters  # both options below end at the toy's own batch size, 16
    options: dict[str, Any] = {"init_val": 16, "max_val": 16} if bounded else {"init_val": 8}
    _tune(subject, folder, lambda: BatchSizeFinder(steps_per_trial=2, max_trials=1, **options))


class _Buffered(nn.Sequential):
    """The toy's network with buffers whose names look like pruning masks; the forward uses them."""

    attn_mask: Tensor
    weight_mask: Tensor

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.register_buffer("attn_mask", torch.ones(8))
        self.register_buffer("weight_mask", torch.full((3,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[2](torch.relu(self[0](x * self.attn_mask))) + self.weight_mask
        return out


@check("a module with buffers called attn_mask and weight_mask can be saved and resumed", GROUP)
def mask_buffers_are_the_users_own(subject: Subject, folder: Path) -> None:
    def run(seed: int, *more: Callback, **options: Any) -> toys.Toy:
        torch.manual_seed(seed)
        module = subject.model(_Buffered(), decay=STEPS)
        subject.fit(module, *more, epochs=EPOCHS, **options)
        return module

    uninterrupted = run(0, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), enable_checkpointing=True)
    file = torch.load(folder / "epoch=1.ckpt", weights_only=True)["state_dict"]
    for name, buffer in uninterrupted.named_buffers():
        require(name in file and torch.equal(file[name], buffer), f"the file does not hold the buffer {name}")
    difference = first_difference(dict(uninterrupted.state_dict()), dict(run(1, ckpt_path=folder / "epoch=1.ckpt").state_dict()))
    require(not difference, f"the resumed run's final state differs at {difference}")


def _accumulated(subject: Subject, seed: int, *more: Callback, **options: Any) -> tuple[int, dict[str, Tensor]]:
    module = subject.model(decay=STEPS, seed=seed)
    trainer = subject.fit(module, GradientAccumulationScheduler({0: 1, 2: 2}), *more, epochs=EPOCHS, **options)
    return trainer.global_step, dict(module.state_dict())


@check("GradientAccumulationScheduler: the run takes the expected steps, ends sparse and resumes exactly", GROUP)
def accumulation_may_change(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        keeper = ModelCheckpoint(folder / order, filename="{epoch}", save_top_k=-1)
        steps, uninterrupted = _accumulated(subject, 0, keeper, first=first, enable_checkpointing=True)
        require(steps == 12, f"{steps} optimiser steps, with the callback {order}; expected 2 epochs of 4 and 2 of 2")
        require(any((w == 0).any() for w in uninterrupted.values()), f"no weight is zero after fit, with the callback {order}")
        _, resumed = _accumulated(subject, 1, first=first, ckpt_path=folder / order / "epoch=1.ckpt")
        difference = first_difference(uninterrupted, resumed)
        require(not difference, f"resumed where accumulation changes, with the callback {order}, the final state differs at {difference}")


class Backboned(toys.Toy):
    """A toy with a backbone and a head, for BackboneFinetuning. The optimiser starts with the trainable parameters only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Identity(), **options)
        self.backbone, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.backbone(x)))
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make([parameter for parameter in self.parameters() if parameter.requires_grad])


@check("BackboneFinetuning: parameters unfrozen later become sparse too, in files and after fit", GROUP)
def what_is_unfrozen_becomes_sparse(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        module = Backboned(**({"optimizer": subject.optimizer} if subject.optimizer else {}))
        keeper = ModelCheckpoint(folder / order, filename="{epoch}", save_top_k=-1)
        neighbours = (BackboneFinetuning(1, backbone_initial_ratio_lr=1.0), keeper)
        subject.fit(module, *neighbours, first=first, epochs=EPOCHS, enable_checkpointing=True)
        file = torch.load(folder / order / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)["state_dict"]
        for name, w in (("fit", module.backbone.weight), ("saving", file["backbone.weight"])):
            require((w == 0).any(), f"none of the backbone's weights is zero after {name}, with the callback {order}")
