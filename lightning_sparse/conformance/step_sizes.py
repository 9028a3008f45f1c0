"""Optimisers that keep the count of steps, betas, rate or moments elsewhere than torch's: they run, and lam means the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import SIZE, zeros
from lightning_sparse.conformance.steps import GROUP, own_steps

Make = Callable[[Any], torch.optim.Optimizer]


class Foreign(torch.optim.Optimizer):
    """What optimisers outside torch share here: a step per weight in :meth:`move`."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            self.begin(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def begin(self, group: dict[str, Any]) -> None:
        """Before a group's weights are moved; nothing by default."""

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move the weights of one parameter."""
        raise NotImplementedError


def _moments(grad: Tensor, state: dict[str, Any], names: tuple[str, str], second: float) -> tuple[Tensor, Tensor]:
    mean, square = (state.setdefault(name, torch.zeros_like(grad)) for name in names)
    return mean.lerp_(grad, 0.1), square.lerp_(grad**2, 1 - second)


class GroupStep(Foreign):
    """Adam with its count of steps in the group, as timm's Lamb and Adan, Prodigy and schedule-free ones."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, step=0)

    def begin(self, group: dict[str, Any]) -> None:
        group["step"] += 1

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean, square = _moments(grad, state, ("exp_avg", "exp_avg_sq"), 0.999)
        corrected = mean / (1 - 0.9 ** group["step"]), square / (1 - 0.999 ** group["step"])
        w.sub_(group["lr"] * corrected[0] / (corrected[1].sqrt() + group["eps"]))


class NoBetas(Foreign):
    """Adam whose group holds neither betas nor eps, and whose count of steps is in itself."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, lr=lr)
        self.count = 0

    def begin(self, group: dict[str, Any]) -> None:
        self.count += 1

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean, square = _moments(grad, state, ("exp_avg", "exp_avg_sq"), 0.999)
        w.sub_(group["lr"] * mean / (1 - 0.9**self.count) / ((square / (1 - 0.999**self.count)).sqrt() + 1e-8))


class OtherNames(GroupStep):
    """Adam whose moments have other names, as AdaBelief's."""

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        held = {"exp_avg": state.get("m", torch.zeros_like(w)), "exp_avg_sq": state.get("s", torch.zeros_like(w))}
        super().move(w, grad, held, group)
        state.update(m=held["exp_avg"], s=held["exp_avg_sq"])


class NoRate(Foreign):
    """A rate of its own, with ``lr=None`` and factored second moments, as Adafactor's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=None, eps=(1e-30, 1e-3))

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = count = state.get("step", 0) + 1
        square = grad**2 + 1e-30
        if w.dim() > 1:
            row, column = (state.get(name, square.mean(dim)).lerp(square.mean(dim), 1 / count) for name, dim in (("row", 1), ("column", 0)))
            state.update(row=row, column=column)
            square = row[:, None] * column / row.mean()
        w.sub_(min(1e-2, 1 / math.sqrt(count)) * grad / square.sqrt().clamp(min=1e-8))


class Signs(Foreign):
    """The sign of the mean gradient, as Lion's step: no second moments at all."""

    def __init__(self, parameters: Any, lr: float = 6e-3) -> None:
        super().__init__(parameters, lr=lr, betas=(0.9, 0.99))

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean = state.setdefault("exp_avg", torch.zeros_like(w))
        w.sub_(group["lr"] * (0.9 * mean + 0.1 * grad).sign())
        mean.lerp_(grad, 0.01)


class Slow(Foreign):
    """Steps an Adam that it holds, and every fifth time goes half of the way back, as Lookahead does."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        held = torch.optim.Adam(parameters, lr)
        super().__init__([{"params": group["params"]} for group in held.param_groups], lr=lr, k=5)
        self.held, self.count = held, 0
        self.param_groups = held.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.held.step(closure)
        self.count += 1
        for parameter in (one for group in self.param_groups for one in group["params"]):
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            if self.count % 5 == 0:
                slow.copy_(parameter.lerp_(slow, 0.5))
        return loss


class OwnStep(torch.optim.Adam):
    """A subclass of torch's that keeps less than its base, and steps by itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in (one for one in group["params"] if one.grad is not None):
                mean, square = _moments(parameter.grad, self.state[parameter], ("exp_avg", "exp_avg_sq"), 0.999)
                update = mean / (1 - 0.9 ** group["count"]) / ((square / (1 - 0.999 ** group["count"])).sqrt() + 1e-8)
                parameter.sub_(group["lr"] * update)
        return loss


FOREIGN: dict[str, Make] = {
    "the count of steps in its group": GroupStep,
    "no betas in its group": NoBetas,
    "moments of other names": OtherNames,
    "lr=None and factored moments": NoRate,
    "steps that are signs": Signs,
    "an Adam that it holds": Slow,
    "Adam's class and a step of its own": partial(OwnStep, lr=1e-2),
}


@check("optimisers that keep step, betas, rate or moments elsewhere run, with zeros within a factor of 2 of Adam's", GROUP)
def foreign_optimizers_work(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    wanted = _zeros(subject, lambda parameters: torch.optim.Adam(parameters, 1e-2))
    for name, make in FOREIGN.items():
        try:
            found = _zeros(subject, make)
        except ValueError as error:
            require(getattr(error, "before", False), f"under an optimiser with {name}: {error}")
            continue
        near = wanted <= 2 * found and found <= 2 * wanted
        require(near, f"{found} of {SIZE} weights are zero under an optimiser with {name}, {wanted} under Adam")


def _zeros(subject: Subject, make: Make) -> int:
    module = toys.Toy(optimizer=make)
    torch.manual_seed(0)
    try:
        subject.fit(module, epochs=8)
    except ValueError as error:
        error.before = module.trainer.global_step == 0  # type: ignore[attr-defined]
        raise
    return zeros(module)
