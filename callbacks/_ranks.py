"""What processes that train one model together must agree on: their arguments, their batches, every weight and every zero.

Each question is one all-gather of whole numbers at a moment that all ranks reach, and all ranks come to the same answer:
they raise together, and none waits for one that has stopped. On a single process nothing is asked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse import elementwise
from lightning_sparse._digest import digest

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form


def check_start(callback: Form, trainer: Trainer) -> None:
    """Before training: RuntimeError where a rank was given another callback, or another model to select from."""
    settings = re.sub(r" at 0x[0-9a-f]+", "", repr(callback.recipe()))  # a function's address is its process's own
    shapes = [(name, tuple(parameter.shape)) for name, parameter in callback.parameters.items()]
    text = hashlib.blake2b(f"{settings} {shapes}".encode(), digest_size=7).hexdigest()
    if odd := _odd(_gathered(trainer, [int(text, 16)])[:, 0]):
        raise RuntimeError(
            f"{type(callback).__name__} differs on {odd} from rank 0: its arguments, or the names and shapes of the selected weights "
            f"({', '.join(list(callback.parameters)[:3])}, ...) are not the same; build model and callback alike in every process"
        )


def check_batches(callback: Form, trainer: Trainer) -> None:
    """Before training: RuntimeError where the ranks have different numbers of batches, which makes DDP wait forever."""
    callback._compared = True
    batches = trainer.num_training_batches
    known = batches if isinstance(batches, int) else -1  # inf: a loader without a length
    counts = _gathered(trainer, [known])[:, 0].tolist()
    if len(set(counts)) > 1:
        listed = ", ".join(f"rank {rank}: {count if count >= 0 else 'unknown'}" for rank, count in enumerate(counts[:8]))
        raise RuntimeError(
            f"the ranks have different numbers of training batches ({listed}): those with more would wait for the others' gradients "
            f"forever. Let Lightning's own sampler deal the data (use_distributed_sampler=True), use drop_last=True, or set "
            f"limit_train_batches={max(min(counts), 1)}"
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
def check_weights(callback: Form, trainer: Trainer) -> None:
    """At an epoch's end: RuntimeError where ranks hold different weights, or zeros, of a parameter (FSDP2 holds each once)."""
    if trainer.world_size == 1:
        return
    names = [name for name, parameter in callback.parameters.items() if not elementwise.is_sharded(parameter)]
    found = [digest(callback._live(name), callback.zeros(name)).to(trainer.strategy.root_device) for name in names]
    gathered = _gathered(trainer, [callback.step, *found])
    for name, hashes in zip(["the number of optimiser steps", *map(repr, names)], gathered.unbind(1), strict=True):
        if odd := _odd(hashes):
            raise RuntimeError(
                f"{name} differs on {odd} from rank 0 at the end of epoch {trainer.current_epoch}: the ranks no longer train one model. "
                "Usual causes: weights changed, or a file loaded, on one rank alone; a forward that goes around the wrapped module, so "
                "that its gradients are not averaged; weights that were frozen when DDP wrapped the module (BackboneFinetuning), whose "
                "gradients it never averages. Make every change on all ranks, and resume from the last checkpoint"
            )


def _gathered(trainer: Trainer, numbers: list[int | Tensor]) -> Tensor:
    """Whole numbers of every rank: (ranks, numbers)."""
    device = trainer.strategy.root_device
    own = torch.stack([torch.as_tensor(number, dtype=torch.int64, device=device) for number in numbers])
    everyone: Tensor = trainer.strategy.all_gather(own) if trainer.world_size > 1 else own[None]
    return everyone.cpu()


def _odd(numbers: Tensor) -> str:
    """The ranks whose number is not rank 0's, in words; empty if there is none."""
    ranks = (numbers != numbers[0]).nonzero()[:, 0].tolist()
    more = f" and {len(ranks) - 5} more" if len(ranks) > 5 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:5]))}{more}" if ranks else ""
