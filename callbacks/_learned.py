"""Learned: a form with parameters of its own, one for each selected weight, which the user's optimiser trains."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter

from lightning_sparse import _checks, attach
from lightning_sparse.callbacks import _groups, _joining, _states, _steps, _swaps
from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.optimizer import suits_logarithms, uniform_rate


class Learned(Sparsifier):
    """Its parameters belong to the callback: the user's module never holds them, the callback's state does.

    They join the weights' optimiser for the batches of an epoch, in a group of their own (no weight decay, learning rate
    ``learned_lr`` under the same schedule). When an epoch starts and a state is loaded they are outside, where others look
    at the groups and know no such parameters; they are left out of the optimiser's state in a file, too, so that the file
    also resumes a run with another form or with none.
    """

    takes_parts = False
    whole_because = "its learned parameters stand beside whole weights, not beside the parts that FSDP2 gives a process"
    learned_lr: float | None = None

    def _forget(self) -> None:
        super()._forget()
        self.learned: dict[str, Parameter] = {}
        self._kept: dict[str, dict[str, Any]] = {}  # the moments, while the parameters are outside
        self._ratios: dict[str, float] = {}  # of their rates to those of their weights
        self._outside = True  # some parameters are in no optimiser

    def start(self, name: str, w: Tensor) -> Tensor:
        """The initial values of a weight's learned parameter."""
        raise NotImplementedError

    # -- joining the weights' optimisers ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # an exception may have left them in an optimiser that the user keeps
            self._leave(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.learned, self._ratios, self._outside = {}, {}, True
        super().on_fit_start(trainer, pl_module)

    def check_form(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check_form(trainer, pl_module)
        for optimizer in trainer.optimizers:
            if self.learned_lr is not None and any(group.get("lr") is None for _, _, group in self._owned(optimizer)):
                raise ValueError(
                    f"learned_lr={self.learned_lr:g} is put in proportion to the weights' learning rate, but {type(optimizer).__name__} "
                    "has lr=None and finds its rate itself; leave learned_lr out, or give the optimiser a rate"
                )
            if any(not suits_logarithms(optimizer, parameter, group) for _, parameter, group in self._owned(optimizer)):
                rank_zero_warn(
                    f"{type(self).__name__} trains parameters of its own, too, and the step size of {type(optimizer).__name__} for those "
                    "is not known: at one lam there may be fewer zeros than under Adam. Compare learned_lr values (now "
                    f"{self.learned_lr}), give target_sparsity in place of lam, or use ReweightedPenalty, which has none"
                )

    def _install(self, pl_module: LightningModule, attachment: attach.Attachment) -> None:
        new = {name: Parameter(self.start(name, self._live(name))) for name in self.parameters if name not in self.learned}
        self.learned |= new
        self._outside |= bool(new)
        super()._install(pl_module, attachment)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _swaps.train(self._optimizers)  # while its learned parameters are outside, a switch would not reach them
        self._leave(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._outside:
            self._join(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._leave(trainer)  # the file's optimiser state has no such groups
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer)
        super().teardown(trainer, pl_module, stage)

    def _join(self, trainer: Trainer) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in self._optimizers:
            inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
            places = {name: at for name, (owner, at) in self._places.items() if owner is optimizer and id(self.learned[name]) not in inside}
            for number in sorted(set(places.values())):
                members = [name for name, where in places.items() if where == number]
                ratio = self._ratio(members, optimizer.param_groups[number])
                _groups.join(optimizer, number, [self.learned[name] for name in members], ratio, schedulers)
            for name in places:
                _groups.give_back(optimizer, self.learned[name], self._kept.pop(name, {}))
        self._outside, self._seen = False, _joining.signature(self, trainer)  # these groups are no newcomers

    def _ratio(self, members: list[str], group: dict[str, Any]) -> float:
        """Of ``learned_lr`` to the weights' rate, once and for all; beside a rate of 0 there is none."""
        highest = _groups.reference(group)
        ratio = 1.0 if self.learned_lr is None or highest == 0 else self.learned_lr / highest
        self._ratios = dict.fromkeys(members, ratio) | self._ratios
        return self._ratios[members[0]]

    def _leave(self, trainer: Trainer) -> None:
        names = {id(parameter): name for name, parameter in self.learned.items()}
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in self._optimizers:
            self._kept |= {names[one]: kept for one, kept in _groups.leave(optimizer, set(names), schedulers).items()}
        if self._optimizers and not self._outside:
            self._outside, self._places = True, _joining.places(self.parameters, self._optimizers)
            self._seen = _joining.signature(self, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if not self._outside:
            own = [(name, number) for name, (owner, number) in self._places.items() if owner is optimizer]
            _groups.follow(optimizer, [(number, self.learned[name], self._ratios[name]) for name, number in own])
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._limit(trainer, optimizer)

    def _limit(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Where gradients are not divided by their size, as under SGD, shorten those that would move a logarithm by more than 1."""
        own = {id(parameter) for parameter in self.learned.values()}
        for group in optimizer.param_groups:
            rate = uniform_rate(optimizer, group) / _steps.scale(trainer, optimizer)
            for parameter in group["params"] if rate > 0 else ():
                if id(parameter) in own and parameter.grad is not None:
                    parameter.grad.clamp_(-1 / rate, 1 / rate)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        super()._stepped(optimizer)
        for name, _, _ in self._owned(optimizer):  # a manual loop may clear the module's gradients alone
            self.learned[name].grad = None

    # -- what a subclass uses -------------------------------------------------------------------------------------------------

    def value(self, name: str, w: Tensor) -> Tensor:
        """A learned parameter's values; what they start at where a fit has not yet begun."""
        return self.learned[name].detach() if name in self.learned else self.start(name, w)

    def reduce_gradients(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """The mean over the ranks: no strategy knows of these parameters."""
        for name, parameter, _ in self._owned(optimizer):
            if trainer.world_size > 1 and parameter.grad is not None:  # the same weights on every rank
                self.learned[name].grad = trainer.strategy.reduce(self.grad_of(name), reduce_op="mean")

    def grad_of(self, name: str) -> Tensor:
        """The gradient of a learned parameter, zeros at first."""
        parameter = self.learned[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def descend(self, name: str, slope: Tensor, strength: float) -> None:
        """Add ``strength * slope`` to the gradient of a learned parameter."""
        self.grad_of(name).add_(slope, alpha=strength)

    # -- state ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self.learned:
            return state
        values = {name: parameter.detach().clone() for name, parameter in self.learned.items()}
        joined = {name: _groups.moments(self._optimizers, parameter) for name, parameter in self.learned.items()}
        moments = {name: joined[name] or self._kept.get(name, {}) for name in joined}
        return state | {"learned": values, "moments": moments, "ratios": dict(self._ratios)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        _groups.strip(checkpoint, trainer.optimizers, schedulers, {id(parameter) for parameter in self.learned.values()})

    def check_state(self, state: Any) -> None:
        super().check_state(state)
        if "learned" in state:
            _states.entry(self, state, "learned", _states.are_tensors, "a dict of finite floating tensors by parameter name")
            _states.entry(self, state, "moments", _are_moments, "a dict of the optimiser's numbers and tensors by parameter name")
            _states.entry(self, state, "ratios", _are_ratios, "a dict of numbers > 0 by parameter name")
        for name, value in state.get("learned", {}).items():
            if name in self.parameters and value.shape != self.parameters[name].shape:
                raise _states.damaged(
                    self, f"'learned' of {name!r} has shape {tuple(value.shape)}, the weight {tuple(self.parameters[name].shape)}"
                )

    @torch.no_grad()
    def _resume(self, state: dict[str, Any]) -> None:
        super()._resume(state)
        for name, parameter in self.learned.items():
            value = state.get("learned", {}).get(name)  # another form's state has none: start from the weights it left
            parameter.copy_(self.start(name, self._live(name)) if value is None else value)
        self._kept, self._ratios = dict(state.get("moments", {})), dict(state.get("ratios", {}))


def rate(lr: Any) -> float | None:
    """A learning rate > 0, or None."""
    return None if lr is None else _checks.positive("learned_lr", lr)


def _are_moments(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(kept, dict) for kept in value.values())


def _are_ratios(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(ratio, float) and 0 < ratio < float("inf") for ratio in value.values())
