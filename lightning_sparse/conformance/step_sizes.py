"""Optimisers that store step count, betas, rate or moments differently from torch's: they run, and lam keeps its meaning."""

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
    """Base class of the optimisers here. Subclasses implement :meth:`move`, the update of one parameter."""

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
        """Prepare the update of a param group; does nothing by default."""

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update one parameter in place."""
        raise NotImplementedError


def _moments(grad: Tensor, state: dict[str, Any], names: tuple[str, str], second: float) -> tuple[Tensor, Tensor]:
    mean, square = (state.setdefault(name, torch.zeros_like(grad)) for name in names)
    return mean.lerp_(grad, 0.1), square.lerp_(grad**2, 1 - second)


class GroupStep(Foreign):
    """Adam with the step count in the param group, like timm's Lamb and Adan, Prodigy and schedule-free optimisers."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, step=0)

    def begin(self, group: dict[str, Any]) -> None:
        group["step"] += 1

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean, square = _moments(grad, state, ("exp_avg", "exp_avg_sq"), 0.999)
        corrected = mean / (1 - 0.9 ** group["step"]), square / (1 - 0.999 ** group["step"])
        w.sub_(group["lr"] * corrected[0] / (corrected[1].sqrt() + group["eps"]))


class NoBetas(Foreign):
    """Adam without betas and eps in the param group, and with the step count as an attribute of the optimiser."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, lr=lr)
        self.count = 0

    def begin(self, group: dict[str, Any]) -> None:
        self.count += 1

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean, square = _moments(grad, state, ("exp_avg", "exp_avg_sq"), 0.999)
        w.sub_(group["lr"] * mean / (1 - 0.9**self.count) / ((square / (1 - 0.999**self.count)).sqrt() + 1e-8))


class OtherNames(GroupStep):
    """Adam with other names for the moments, like AdaBelief."""

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        moments = {"exp_avg": state.get("m", torch.zeros_like(w)), "exp_avg_sq": state.get("s", torch.zeros_like(w))}
        super().move(w, grad, moments, group)
        state.update(m=moments["exp_avg"], s=moments["exp_avg_sq"])


class NoRate(Foreign):
    """``lr=None``, an internal learning rate, and factored second moments, like Adafactor."""

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
    """Steps by the sign of the mean gradient, without second moments, like Lion."""

    def __init__(self, parameters: Any, lr: float = 6e-3) -> None:
        super().__init__(parameters, lr=lr, betas=(0.9, 0.99))

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean = state.setdefault("exp_avg", torch.zeros_like(w))
        w.sub_(group["lr"] * (0.9 * mean + 0.1 * grad).sign())
        mean.lerp_(grad, 0.01)


class Slow(Foreign):
    """A wrapper around Adam that moves half of the way back after every fifth step, like Lookahead."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        inner = torch.optim.Adam(parameters, lr)
        super().__init__([{"params": group["params"]} for group in inner.param_groups], lr=lr, k=5)
        self.inner, self.count = inner, 0
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.count += 1
        for parameter in (one for group in self.param_groups for one in group["params"]):
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            if self.count % 5 == 0:
                slow.copy_(parameter.lerp_(slow, 0.5))
        return loss


class OwnStep(torch.optim.Adam):
    """A subclass of torch's Adam with its own ``step`` and less state than Adam."""

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


@check("optimisers that store step, betas, learning rate or moments elsewhere end with zeros within a factor of 2 of Adam's", GROUP)
def foreign_optimizers_work(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    expected = _zeros(subject, lambda parameters: torch.optim.Adam(parameters, 1e-2))
    for name, make in FOREIGN.items():
        try:
            count = _zeros(subject, make)
        except ValueError as error:
            require(getattr(error, "before", False), f"under an optimiser with {name}: {error}")
            continue
        near = expected <= 2 * count and count <= 2 * expected
        require(near, f"{count} of {SIZE} weights are zero under an optimiser with {name}, {expected} under Adam")


def _zeros(subject: Subject, make: Make) -> int:
    module = toys.Toy(optimizer=make)
    torch.manual_seed(0)
    try:
        subject.fit(module, epochs=8)
    except ValueError as error:
        error.before = module.trainer.global_step == 0  # type: ignore[attr-defined]
        raise
    return zeros(module)
