"""Attach a sparsity callback to a run: to the module's weights, their averages and the optimisers; and detach it again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import coupling
from lightning_sparse import step as steps
from lightning_sparse.callbacks import consistency, progress, weight_averaging
from lightning_sparse.methods.base import Method, Run
from lightning_sparse.step_sizes import is_always_read
from lightning_sparse.structure import Coupled

AtStep = Callable[[Optimizer], None]


class Connections:
    """Holds the hooks of a fit.

    Args:
        run: the run of the method; its support's weights are hooked.
        method: attached with them.
        compiled: compile the method's kernels.
    """

    def __init__(self, run: Run, method: Method, compiled: bool) -> None:
        self.run, self.method, self.compiled, self.weights = run, method, compiled, run.support.weights
        self.averages: weight_averaging.Averages | None = None
        self.measured: set[int] = set()  # optimisers whose step sizes are measured, by id
        self.with_modes: list[Any] = []  # optimisers that hold other weights in evaluation
        self._handles: list[steps.Handle] = []
        self.trainable: tuple[int, ...] = ()  # changes when parameters become trainable

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Tell the run its processes, its seed and how the module is optimised."""
        self.run.seed, self.run.rank = trainer.strategy.broadcast(torch.initial_seed()), trainer.global_rank  # one seed for all
        self.run.mean = partial(trainer.strategy.reduce, reduce_op="mean") if trainer.world_size > 1 else None
        self.run.total = partial(consistency.sum_over_ranks, trainer)
        self.run.manual = not module.automatic_optimization

    def attach(self, trainer: Trainer, module: LightningModule, filed: Callable[[str], Tensor], begin: AtStep, end: AtStep) -> None:
        """Attach to the module, its averages and its optimisers, in the place of what was attached before.

        Args:
            trainer: the Trainer.
            module: its module.
            filed: returns what a file written now holds of a parameter.
            begin: called when an optimiser's step begins.
            end: called when it has ended.
        """
        self.detach_all()
        weights, support = self.weights, self.run.support
        weights.attach(module, trainer.optimizers, filed)
        self.run.group(self.method)
        self.averages = weight_averaging.Averages(weights, support, trainer)
        self._handles = [steps.around(one, begin, end) for one in weights.optimizers]
        wrappers: Any = module.optimizers(use_pl_optimizer=True)  # Lightning's wrappers, which also clear gradients
        self.method.attach(module, wrappers if isinstance(wrappers, list) else [wrappers])
        if self.compiled:
            self.method.compile(self.run.engine, [(optimizer, weights.members(optimizer)) for optimizer in trainer.optimizers])
        self.with_modes = [*weight_averaging.with_modes(weights.optimizers)]
        measures = support.needs_step_sizes or self.method.needs_step_sizes
        self.measured = {id(one) for one in weights.optimizers if measures and not is_always_read(one)}
        self.trainable = weights.trainable(trainer.optimizers)

    def couple(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the groups of a structure that spans several parameters."""
        structure = self.run.support.structure
        if not isinstance(structure, Coupled):
            return
        try:
            self.run.couple(structure, module, progress.example_inputs(trainer, module))
        except coupling.ForwardFails as error:
            if module.example_input_array is not None:
                raise
            raise ValueError(
                f"{structure!r} traces the network, but {error.name}.forward fails on the first training batch's inputs ({error.reason}); "
                "set self.example_input_array = (x, ...), or a dict of keyword arguments, in __init__"
            ) from None

    def release(self) -> None:
        """Restore the live weights and remove the hooks on the optimisers."""
        if self.weights.attachment is not None:
            self.weights.attachment.end_forwards()
            self.weights.attachment.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.method.release()
        self.run.engine.clear()

    def detach(self) -> None:
        """Restore the live weights and remove all hooks but those on averages."""
        self.release()
        self.weights.close()

    def detach_all(self) -> None:
        """Remove all hooks; not after an exception, because a file written then holds the average."""
        self.detach()
        if self.averages is not None:
            self.averages.detach()
