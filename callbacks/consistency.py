"""Check during a run for NaN and inf, and for ranks that no longer agree.

NaN and inf stop the run before they reach a weight or a file. The cost is one pass over the selected gradients a step (1 to 2 % of a
plain step on the CPU) and one over the selected weights an epoch. Gradients are not checked if a GradScaler skips such steps, or if the
module has hooks of its own between backward and the step, because it may repair its gradients there.

Ranks compare whole numbers by one all-gather at a moment that all of them reach, and all get the same result: they raise together, so
none waits for one that has stopped. A single process compares nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import _checks, elementwise
from lightning_sparse._digest import digest
from lightning_sparse.callbacks import compatibility
from lightning_sparse.callbacks.options import Options
from lightning_sparse.step import Steps
from lightning_sparse.support import Support
from lightning_sparse.weights import WeightStore

_UNCHANGED = "the weights are those before this batch"


class Watch:
    """Checks loss, gradients and weights for NaN and inf.

    Args:
        options: the callback's, for its messages.
        steps: the run's optimiser steps; it is told of the GradScaler.
        settings: returns the callback's arguments; messages name those that could be lowered.
    """

    def __init__(self, options: Options, steps: Steps, settings: Callable[[], Mapping[str, Any]]) -> None:
        self.options, self.steps, self.settings = options, steps, settings
        self.weights, self.strength = steps.weights, steps.strength
        self.clips = False  # the module clips gradients itself
        self.compared = False  # the ranks' numbers of batches
        self.checks_gradients = True  # not if a GradScaler skips bad steps or the module may repair them

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Look up the module's hooks and the GradScaler once at the start of a fit, because that takes long."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.steps.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.clips = compatibility.overrides("configure_gradient_clipping", module)
        repairs = self.clips or compatibility.overrides("on_before_optimizer_step", module)  # hooks between a backward and its step
        self.checks_gradients = not repairs and self.steps.scaler is None

    def check_loss(self, trainer: Trainer, loss: Tensor) -> None:
        """Raise FloatingPointError for a loss that is not finite, before its gradient is computed.

        Under a GradScaler only NaN raises, because inf comes from too large a scale and the step will be skipped. With several
        ranks, none of which may be left waiting, the averaged gradients show the bad loss; if those are not checked, the ranks
        decide together.
        """
        values = [loss.item()] if loss.numel() == 1 else loss.detach().flatten().tolist()  # item() reads a scalar without another operation
        bad = any(map(math.isnan, values)) if self.steps.scaler is not None else not all(map(math.isfinite, values))
        if trainer.world_size > 1:
            bad = not self.checks_gradients and trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            nonfinite = elementwise.count_nonfinite(self.weights.all_live())
            state = f"{_listed(nonfinite)} since an earlier step; files written before that are intact" if nonfinite else _UNCHANGED
            value = float(loss.detach().sum())
            raise FloatingPointError(f"the loss is {value} at optimiser step {self.strength.step}; {state}. {self._remedy()}")

    def check_gradients(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Raise FloatingPointError, before the step, if gradients of selected weights are not finite."""
        clipped = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
        grads = {name: p.grad for name, p, _ in self.weights.members(optimizer) if p.grad is not None}
        unknown = elementwise.maybe_nonfinite(grads)
        if unknown and (found := elementwise.count_nonfinite(unknown, nan_only=clipped)):  # because clipping by value makes inf finite
            cause = "while the loss is finite" if trainer.world_size == 1 else "from the loss of this rank or of another"
            raise FloatingPointError(
                f"the gradient of {_listed(found)} at optimiser step {self.strength.step}, {cause}; {_UNCHANGED}. "
                f"{self._remedy()}; Trainer(detect_anomaly=True) names the operation"
            )

    def compare_batches(self, trainer: Trainer) -> None:
        """Raise RuntimeError, before training, if the ranks have different numbers of batches, because DDP would wait forever.

        Every rank calls it once.
        """
        self.compared = True
        known = trainer.num_training_batches if isinstance(trainer.num_training_batches, int) else -1  # inf: a loader without a length
        counts = _gathered(trainer, [known])[:, 0].tolist()
        if len(set(counts)) > 1:
            listed = ", ".join(f"rank {rank}: {count if count >= 0 else 'unknown'}" for rank, count in enumerate(counts[:8]))
            raise RuntimeError(
                f"the ranks have different numbers of training batches ({listed}): those with more would wait for the others' gradients "
                f"forever. Let Lightning's own sampler split the data (use_distributed_sampler=True), use drop_last=True, or set "
                f"limit_train_batches={max(min(counts), 1)}"
            )

    def check_start(self) -> None:
        """Raise ValueError if selected weights are not finite before the first step."""
        if found := elementwise.count_nonfinite(self.weights.all_live()):
            raise ValueError(f"{_listed(found)} before training starts; initialise them, or resume from a file that was written earlier")

    def check_weights(self) -> None:
        """Raise FloatingPointError if selected weights are not finite, before they are evaluated or saved."""
        if found := elementwise.count_nonfinite(self.weights.all_live()):
            raise FloatingPointError(
                f"{_listed(found)} after optimiser step {self.strength.step}; files written before that are intact: resume from one. "
                f"{self._remedy()}"
            )

    def _remedy(self) -> str:
        """Describe what to do about it, naming the arguments that the callback was given."""
        given = self.settings()
        own: list[str] = [name for name in ("lam", "kl_weight") if name in given and self.options.target_sparsity is None]
        own += ["learned_lr, the learning rate of the method's own parameters,"] if "learned_lr" in given else []
        lowered = ", ".join(["the learning rate", *own[:-1]]) + (f" or {own[-1]}" if own else "")
        return f"Check the data, lower {lowered.rstrip(',')}, or clip gradients"


def _listed(found: Mapping[str, tuple[int, int]]) -> str:
    first = [f"{name!r} holds {nan} NaN and {inf} infinite values" for name, (nan, inf) in list(found.items())[:3]]
    more = _checks.more(found, 3)
    return ", ".join(first) + (f"{more} parameters hold such values" if more else "")


# -- processes -------------------------------------------------------------------------------------------------------------


def check_same_settings(trainer: Trainer, recipe: Mapping[str, Any], weights: WeightStore) -> None:
    """Raise RuntimeError, before training, if a rank has other arguments, or another model to select from."""
    settings = re.sub(r" at 0x[0-9a-f]+", "", repr(recipe))  # because a function's address differs between processes
    shapes = [(name, tuple(parameter.shape)) for name, parameter in weights.parameters.items()]
    text = hashlib.blake2b(f"{settings} {shapes}".encode(), digest_size=7).hexdigest()
    if differing := _differing_ranks(_gathered(trainer, [int(text, 16)])[:, 0]):
        raise RuntimeError(
            f"{recipe['class_path']} differs on {differing} from rank 0: its arguments, or the names and shapes of the selected weights "
            f"({', '.join(list(weights.parameters)[:3])}, ...) are not the same; build the same model and callback in every process"
        )


def on_rank_zero(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` on rank 0 alone; the ValueError that it raises is raised on every rank."""
    error: ValueError | None = None
    if trainer.is_global_zero:
        try:
            function()
        except ValueError as raised:
            error = raised
    error = trainer.strategy.broadcast(error)
    if error is not None:
        raise error


@torch.no_grad()
def check_same_weights(trainer: Trainer, weights: WeightStore, support: Support, step: int) -> None:
    """Raise RuntimeError, at an epoch's end, if ranks hold different weights or zeros (FSDP2 holds each once)."""
    if trainer.world_size == 1:
        return
    names = [name for name, parameter in weights.parameters.items() if not elementwise.is_sharded(parameter)]
    found = [digest(weights.live(name), support.zeros(name)).to(trainer.strategy.root_device) for name in names]
    gathered = _gathered(trainer, [step, *found])
    for name, hashes in zip(["the number of optimiser steps", *map(repr, names)], gathered.unbind(1), strict=True):
        if differing := _differing_ranks(hashes):
            raise RuntimeError(
                f"{name} differs on {differing} from rank 0 at the end of epoch {trainer.current_epoch}: the ranks no longer train "
                "one model. Usual causes: weights changed, or a file loaded, on one rank alone; a forward that bypasses the wrapped "
                "module, so that its gradients are not averaged; weights that were frozen when DDP wrapped the module "
                "(BackboneFinetuning), whose gradients it never averages. Make changes on all ranks; resume from the last checkpoint"
            )


def sum_over_ranks(trainer: Trainer, number: Tensor) -> Tensor:
    """Return the sum of a number over all ranks."""
    summed: Tensor = trainer.strategy.reduce(number.to(trainer.strategy.root_device), reduce_op="sum")
    return summed


def on_any_rank(trainer: Trainer, bad: bool) -> bool:
    """Return True on every rank if any rank is ``bad``."""
    return bool(trainer.strategy.reduce_boolean_decision(bad, all=False)) if trainer.world_size > 1 else bad


def _gathered(trainer: Trainer, numbers: list[int | Tensor]) -> Tensor:
    """Gather whole numbers of every rank: (ranks, numbers)."""
    device = trainer.strategy.root_device
    own = torch.stack([torch.as_tensor(number, dtype=torch.int64, device=device) for number in numbers])
    everyone: Tensor = trainer.strategy.all_gather(own) if trainer.world_size > 1 else own[None]
    return everyone.cpu()


def _differing_ranks(numbers: Tensor) -> str:
    """Name the ranks whose number differs from rank 0's; empty if there are none."""
    ranks = (numbers != numbers[0]).nonzero()[:, 0].tolist()
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:5]))}{_checks.more(ranks)}" if ranks else ""
