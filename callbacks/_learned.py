"""Learned: a form with parameters of its own, one for each selected weight, and an optimiser like the weights' that trains them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter

from lightning_sparse import _checks, _step_hooks, attach
from lightning_sparse import optimizer as steps
from lightning_sparse._second_optimizer import SecondOptimizer, Share, overflowed, reference
from lightning_sparse.callbacks import _states
from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.step_sizes import suits_logarithms, uniform_rate


class Learned(Sparsifier):
    """Its parameters belong to the callback: the user's module never holds them, the callback's state does.

    They have an optimiser of their own for each of the user's, of its class and settings, without weight decay. It steps
    whenever that does, at the rate of the group of their weight under the same schedule, times the ratio of ``learned_lr``
    to that group's rate. The user's optimisers, groups and schedulers, and what files hold of them, are as without the
    callback. Clipping by the Trainer sees the gradients of the weights; those of the learned parameters are shortened by the
    same factor.
    """

    takes_parts = False
    whole_because = "its learned parameters stand beside whole weights, not beside the parts that FSDP2 gives a process"
    learned_lr: float | None = None

    def _forget(self) -> None:
        super()._forget()
        self.learned: dict[str, Parameter] = {}
        self._second: dict[int, SecondOptimizer] = {}  # of each of the user's optimisers, by id
        self._kept: dict[str, dict[str, Any]] = {}  # the moments, while there is none
        self._ratios: dict[str, float] = {}  # of their rates to those of their weights
        self._arranged = False  # every learned parameter has its optimiser

    def start(self, name: str, w: Tensor) -> Tensor:
        """The initial values of a weight's learned parameter."""
        raise NotImplementedError

    # -- their own optimisers ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.learned, self._ratios = {}, {}
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
        self._arranged = False
        super()._install(pl_module, attachment)
        wrappers: Any = pl_module.optimizers(use_pl_optimizer=True)  # Lightning's, which clear gradients by themselves
        cleared = [*self._optimizers, *(wrappers if isinstance(wrappers, list) else [wrappers])]
        self._handles += [_step_hooks.around(one, None, self._clear, "zero_grad") for one in cleared]

    def _clear(self, optimizer: Any) -> None:
        """The gradients of an optimiser's weights were cleared: so are those of their learned parameters."""
        for name, *_ in self._owned(getattr(optimizer, "_optimizer", optimizer)):
            if name in self.learned:
                self.learned[name].grad = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._arranged:  # not earlier: others may still have set rates
            self._arrange()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._put_by()
        super().teardown(trainer, pl_module, stage)

    def _arrange(self) -> None:
        """Give every learned parameter its optimiser, with the moments that were kept for it."""
        self._put_by()
        for optimizer in self._optimizers:
            numbers: dict[int, list[str]] = {}
            for name, (owner, number) in self._places.items():
                if owner is optimizer:
                    numbers.setdefault(number, []).append(name)
            groups = [(number, names, optimizer.param_groups[number]) for number, names in sorted(numbers.items())]
            second = SecondOptimizer(optimizer, [share for group in groups for share in self._shares(*group)])
            self._second[id(optimizer)] = second
            for name in (name for names in numbers.values() for name in names):
                second.give_back(self.learned[name], self._kept.pop(name, {}))
        self._arranged = True

    def _shares(self, number: int, names: list[str], group: dict[str, Any]) -> list[Share]:
        """The parameters of one group by the ratio of their rates, which is fixed when they join; beside a rate of 0 it is 1."""
        highest = reference(group)
        ratio = 1.0 if self.learned_lr is None or highest == 0 else self.learned_lr / highest
        known = next((self._ratios[name] for name in names if name in self._ratios), ratio)
        self._ratios = dict.fromkeys(names, known) | self._ratios
        ratios = dict.fromkeys(self._ratios[name] for name in names)
        members = {one: [name for name in names if self._ratios[name] == one] for one in ratios}
        return [Share(number, one, [self.parameters[n] for n in of], [self.learned[n] for n in of]) for one, of in members.items()]

    def _put_by(self) -> None:
        """Keep the moments and let the optimisers go."""
        moments = {name: self._moments(name) for name in self.learned}
        self._kept |= {name: kept for name, kept in moments.items() if kept}
        self._second, self._arranged = {}, False

    def _moments(self, name: str) -> dict[str, Any]:
        return next((kept for second in self._second.values() if (kept := second.moments(self.learned[name]))), {})

    # -- their gradients and steps ---------------------------------------------------------------------------------------------

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        if _scaler(trainer) is not None and not self.frozen:
            self._show_overflow(trainer)

    @torch.no_grad()
    def _show_overflow(self, trainer: Trainer) -> None:
        """Where a learned gradient has overflowed, so has its weight's: then the GradScaler skips the step and lowers its scale."""
        bad = overflowed(self.learned.values())
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        graded = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None] if bad else []
        for grad in graded:
            grad.view(-1)[:1] = torch.inf

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if id(optimizer) in self._second:
            self._second[id(optimizer)].follow()
            self._unscale(trainer, optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._limit(trainer, optimizer)

    @torch.no_grad()
    def _limit(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Where gradients are not divided by their size, as under SGD, shorten those that would move a logarithm by more than 1."""
        for group in self._second[id(optimizer)].groups if id(optimizer) in self._second else ():
            rate = uniform_rate(optimizer, group) / steps.grad_scale(getattr(trainer.precision_plugin, "scaler", None), optimizer)
            for grad in (parameter.grad for parameter in group["params"]) if rate > 0 else ():
                if grad is not None:
                    grad.clamp_(-1 / rate, 1 / rate)

    def _unscale(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Divide by the GradScaler's scale, as it did with the weights' gradients; a fused optimiser does so itself."""
        scaler = _scaler(trainer)
        if scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            self._shorten(optimizer, 1 / float(scaler.get_scale()))

    @torch.no_grad()
    def _shorten(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        """Multiply the gradients of an optimiser's learned parameters."""
        for grad in (self.learned[name].grad for name, *_ in self._owned(optimizer)):
            if grad is not None and factor != 1:
                grad.mul_(factor)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if id(optimizer) in self._second:
            self._shorten(optimizer, self._clipping.last)
            self._second[id(optimizer)].step()
        super().after_step(optimizer)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        super()._stepped(optimizer)
        self._clear(optimizer)  # a manual loop may clear the module's gradients alone

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
        moments = {name: self._moments(name) or self._kept.get(name, {}) for name in self.learned}
        return state | {"learned": values, "moments": moments, "ratios": dict(self._ratios)}

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
        self._second, self._arranged = {}, False
        self._kept, self._ratios = dict(state.get("moments", {})), dict(state.get("ratios", {}))


def _scaler(trainer: Trainer) -> Any | None:
    """The GradScaler that is at work, if there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def rate(lr: Any) -> float | None:
    """A learning rate > 0, or None."""
    return None if lr is None else _checks.positive("learned_lr", lr)


def _are_moments(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(kept, dict) for kept in value.values())


def _are_ratios(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(ratio, float) and 0 < ratio < float("inf") for ratio in value.values())
