"""Train the parameters that a method learns, one for each selected weight, with optimisers of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_sparse import _checks, counts
from lightning_sparse import step as steps
from lightning_sparse.methods.base import Member, Run, Step
from lightning_sparse.methods.optimizer_like import SCALING, innermost, like, moved
from lightning_sparse.state import are_tensors, by_name, entry
from lightning_sparse.step import uniform_rate
from lightning_sparse.step_sizes import finds_scale, suits_logarithms

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # entries of a group that schedulers set
WHOLE_BECAUSE = "its learned parameters belong to whole weights, not to the parts that FSDP2 gives each process"


class LearnedParameters:
    """Stores and trains a method's learned parameters; the user's module never holds them.

    Each of the user's optimisers gets a second one of its class and settings, without weight decay, for the learned parameters. It
    steps together with the user's, at the learning rate of the weight's param group times a fixed ratio of ``rate`` to that rate. The
    user's optimisers, groups and schedulers, and their checkpoints, do not change. Clipping applies to the gradients of the weights;
    those of the learned parameters are multiplied by the same factor.

    Args:
        start: returns the initial values of a weight's learned parameter, given its name and values.
        rate: their learning rate, which follows the weights' schedule; None uses the weights' own.
    """

    def __init__(self, start: Callable[[str, Tensor], Tensor], rate: float | None = None) -> None:
        self.start = start
        self.rate = None if rate is None else _checks.positive("learned_lr", rate)
        self.reset()

    def reset(self, run: Run | None = None) -> None:
        """Reset before a new run."""
        self.run: Any = run
        self.values: dict[str, Parameter] = {}
        self._second: dict[int, SecondOptimizer] = {}  # by the id of the user's optimiser
        self._stored: dict[str, dict[str, Any]] = {}  # the moments, while there is no second optimiser
        self._ratios: dict[str, float] = {}  # of their rates to those of their weights
        self._arranged = False  # every learned parameter has its optimiser
        self._handles: list[steps.Handle] = []

    def prepare(self) -> None:
        """Prepare for a run."""
        self.values, self._ratios = {}, {}

    def check(self, form: str, optimizer: Optimizer, members: list[Member]) -> str:
        """Raise ValueError if ``rate`` has no meaning with an optimiser; return a warning, or ""."""
        name = type(optimizer).__name__
        if self.rate is not None and any(group.get("lr") is None for _, _, group in members):
            raise ValueError(
                f"learned_lr={self.rate:g} is set in proportion to the weights' learning rate, but {name} has lr=None and finds its rate "
                "itself; omit learned_lr, or give the optimiser a rate"
            )
        if any(not suits_logarithms(optimizer, parameter, group) for _, parameter, group in members):
            compare = f"Compare learned_lr values (now {self.rate})"
            if self.rate is not None and any(finds_scale(group) for _, _, group in members):
                compare = f"{name} multiplies lr by a scale that it finds itself, and learned_lr={self.rate:g}, too: omit learned_lr"
            fewer, target = ": at the same lam it may find fewer zeros than with Adam", ", give target_sparsity instead of lam"
            if self.run.strength.target is not None:
                fewer = target = ""
            return (
                f"{form} trains parameters of its own, too, and the step size of {name} for those is not known{fewer}. {compare}{target}, "
                "or use ReweightedPenalty, which has no parameters of its own"
            )
        return ""

    def attach(self, wrappers: Iterable[Any]) -> None:
        """Create missing learned parameters, and clear their gradients whenever those of the weights are cleared."""
        for name in self.run.weights.parameters:
            if name not in self.values:
                self.values[name] = Parameter(self.start(name, self.run.weights.live(name)))
        self._arranged = False
        self._remove_hooks()
        cleared = [*self.run.weights.optimizers, *wrappers]
        self._handles = [steps.around(one, None, self.clear, "zero_grad") for one in cleared]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self, optimizer: Any) -> None:
        """Clear the gradients of the learned parameters when those of an optimiser's weights were cleared."""
        for name, *_ in self.run.weights.members(getattr(optimizer, "_optimizer", optimizer)):
            if name in self.values:
                self.values[name].grad = None

    def arrange(self) -> None:
        """Give every learned parameter its optimiser, with the moments that were stored for it.

        Call it at a batch's start, because until then others may still set rates.
        """
        if self._arranged:
            return
        self.store_moments()
        for optimizer in self.run.weights.optimizers:
            numbers: dict[int, list[str]] = {}
            for name, (owner, number) in self.run.weights.places.items():
                if owner is optimizer:
                    numbers.setdefault(number, []).append(name)
            groups = [(number, names, optimizer.param_groups[number]) for number, names in sorted(numbers.items())]
            second = SecondOptimizer(optimizer, [share for group in groups for share in self._shares(*group)])
            self._second[id(optimizer)] = second
            for name in (name for names in numbers.values() for name in names):
                second.restore_moments(self.values[name], self._stored.pop(name, {}))
        self._arranged = True

    def _shares(self, number: int, names: list[str], group: dict[str, Any]) -> list[Share]:
        """Group the parameters of one param group by the ratio of their rates, fixed at creation; it is 1 for a rate of 0."""
        reference_rate = reference(group)
        ratio = 1.0 if self.rate is None or reference_rate == 0 else self.rate / reference_rate
        known = next((self._ratios[name] for name in names if name in self._ratios), ratio)
        self._ratios = dict.fromkeys(names, known) | self._ratios
        ratios, weights = dict.fromkeys(self._ratios[name] for name in names), self.run.weights.parameters
        members = {one: [name for name in names if self._ratios[name] == one] for one in ratios}
        return [Share(number, one, [weights[n] for n in of], [self.values[n] for n in of]) for one, of in members.items()]

    def store_moments(self) -> None:
        """Store the moments and drop the optimisers."""
        moments = {name: self._moments(name) for name in self.values}
        self._stored |= {name: kept for name, kept in moments.items() if kept}
        self._second, self._arranged = {}, False

    def _moments(self, name: str) -> dict[str, Any]:
        return next((kept for second in self._second.values() if (kept := second.moments(self.values[name]))), {})

    def release(self) -> None:
        """Remove the hooks when training has ended or failed."""
        self._remove_hooks()

    # -- gradients and steps ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def show_overflow(self, anywhere: Callable[[bool], bool]) -> None:
        """Write inf to the weights' gradients if a learned gradient overflowed, so that the GradScaler skips the step."""
        grads = [value.grad for value in self.values.values() if value.grad is not None]
        bad = anywhere(any(not bool(torch.isfinite(grad).all()) for grad in grads))
        for grad in self.run.weights.gradients() if bad else []:
            grad.view(-1)[:1] = torch.inf

    def before_optimizer(self, step: Step) -> None:
        """Copy rate and momentum from the user's groups, and unscale the gradients as the GradScaler did with the weights'."""
        if id(step.optimizer) in self._second:
            self._second[id(step.optimizer)].follow()
            self._scale_gradients(step, step.grad_scale / step.loss_scale())

    @torch.no_grad()
    def limit(self, step: Step) -> None:
        """Clamp gradients that would move a logarithm by more than 1, for optimisers such as SGD that do not normalise them."""
        for group in self._second[id(step.optimizer)].groups if id(step.optimizer) in self._second else ():
            rate = uniform_rate(step.optimizer, group) / step.grad_scale
            for grad in (parameter.grad for parameter in group["params"]) if rate > 0 else ():
                if grad is not None:
                    grad.clamp_(-1 / rate, 1 / rate)

    @torch.no_grad()
    def _scale_gradients(self, step: Step, factor: float) -> None:
        for grad in (self.values[name].grad for name, *_ in step.members):
            if grad is not None and factor != 1:
                grad.mul_(factor)

    def after_optimizer(self, step: Step) -> None:
        """Step the learned parameters after the weights' optimiser."""
        if id(step.optimizer) in self._second:
            self._scale_gradients(step, step.clip_factor)
            self._second[id(step.optimizer)].step()
        self.clear(step.optimizer)  # because a manual loop may clear the module's gradients only

    def average(self, step: Step) -> None:
        """Average the gradients over the processes, because no strategy knows these parameters."""
        for name, parameter, _ in step.members:
            if self.run.mean is not None and parameter.grad is not None:  # the same condition on every rank
                self.values[name].grad = self.run.mean(self.grad_of(name))

    def value(self, name: str, w: Tensor) -> Tensor:
        """Return a learned parameter's values; its initial values before a run has begun."""
        return self.values[name].detach() if name in self.values else self.start(name, w)

    def grad_of(self, name: str) -> Tensor:
        """Return the gradient of a learned parameter, initialised to zeros."""
        parameter = self.values[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    @torch.no_grad()
    def movement(self) -> str:
        """Describe, to complete a sentence, how far the learned parameters have moved."""
        optimizers, live = self.run.weights.optimizers, self.run.weights.live
        moved = counts.mean((value.detach() - self.start(name, live(name))).abs() for name, value in self.values.items())
        uniform = any(uniform_rate(one, group) > 0 for one in optimizers for group in one.param_groups)
        lam, name = self.run.strength.lam, type(optimizers[0]).__name__
        slow = f", because {name} moves them in proportion to their gradients, which are as small as {lam:.3g}"
        return f"; its learned parameters have moved by {moved:.2g} on average{slow if uniform else ''}"

    # -- state -----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return values, moments and ratios of rates; empty before there are any."""
        if not self.values:
            return {}
        values = {name: parameter.detach().clone() for name, parameter in self.values.items()}
        moments = {name: self._moments(name) or self._stored.get(name, {}) for name in self.values}
        return {"learned": values, "moments": moments, "ratios": dict(self._ratios)}

    def check_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise ValueError unless ``state`` may be loaded."""
        if "learned" in state:
            entry(state, "learned", are_tensors, "a dict of finite floating tensors by parameter name")
            entry(state, "moments", _are_moments, "a dict of the optimiser's numbers and tensors by parameter name")
            entry(state, "ratios", _are_ratios, "a dict of numbers > 0 by parameter name")
        for name, value in state.get("learned", {}).items():
            if name in parameters and value.shape != parameters[name].shape:
                raise ValueError(f"'learned' of {name!r} has shape {tuple(value.shape)}, the weight {tuple(parameters[name].shape)}")

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; after another method start from the current weights."""
        for name, parameter in self.values.items():
            value = state.get("learned", {}).get(name)
            parameter.copy_(self.start(name, self.run.weights.live(name)) if value is None else value)
        self._second, self._arranged = {}, False
        self._stored, self._ratios = dict(state.get("moments", {})), dict(state.get("ratios", {}))


def _are_moments(value: Any) -> bool:
    return by_name(value) and all(isinstance(kept, dict) for kept in value.values())


def _are_ratios(value: Any) -> bool:
    return by_name(value) and all(isinstance(ratio, float) and 0 < ratio < float("inf") for ratio in value.values())


# -- the second optimiser ---------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """Parameters that follow group ``number`` of the user's optimiser at ``ratio`` times its rate, and the ``weights`` they belong to."""

    number: int
    ratio: float
    weights: list[Parameter]
    parameters: list[Parameter]


class SecondOptimizer:
    """Optimises some parameters like the user's ``first``, with one optimiser for each one needed that ``first`` holds.

    ``first``, its groups and its schedulers are not changed: rate and momentum are copied from its groups before each step.
    """

    def __init__(self, first: Optimizer, shares: Iterable[Share]) -> None:
        self.first = first
        found: dict[int, tuple[Optimizer, list[Share]]] = {}
        for share in shares:
            inner = innermost(first, share.weights[0])
            found.setdefault(id(inner), (inner, []))[1].append(share)
        self._parts = [(like(inner, [self._group(share) for share in of_it]), of_it) for inner, of_it in found.values()]

    def _group(self, share: Share) -> dict[str, Any]:
        return _settings(self.first.param_groups[share.number], share.ratio) | {"params": share.parameters}

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Return the param groups, as the next step uses them."""
        return [group for part, _ in self._parts for group in part.param_groups]

    def follow(self) -> None:
        """Copy rate and momentum from the user's groups, before they step."""
        for part, shares in self._parts:
            of = {id(parameter): share for share in shares for parameter in share.parameters}
            for group in part.param_groups:  # the optimiser's class may have split them
                share = of[id(group["params"][0])]
                group.update(_settings(self.first.param_groups[share.number], share.ratio))

    def step(self) -> None:
        """Step once, under the scale of a GradScaler if the user's optimiser was given one for this step."""
        scaling = {name: vars(self.first)[name] for name in SCALING if name in vars(self.first)}
        for part, _ in self._parts:
            vars(part).update(scaling)
            part.step(*_closure(part))
            for name in scaling:
                delattr(part, name)

    def moments(self, parameter: Parameter) -> dict[str, Any]:
        """Return the optimiser's state of a parameter."""
        return next((dict(part.state[parameter]) for part, _ in self._parts if parameter in part.state), {})

    def restore_moments(self, parameter: Parameter, kept: Mapping[str, Any]) -> None:
        """Restore :meth:`moments`, on the parameter's device; step counts stay on the device that the optimiser needs."""
        for part, _ in self._parts:
            for group in part.param_groups:
                if kept and any(one is parameter for one in group["params"]):
                    part.state[parameter] = dict(moved(kept, parameter, bool(group.get("fused") or group.get("capturable"))))


def _closure(optimizer: Optimizer) -> tuple[Any, ...]:
    """Return a closure without a loss, for an optimiser whose ``step`` requires one."""
    needed = [one for one in inspect.signature(optimizer.step).parameters.values() if one.default is one.empty]
    return ((lambda: None),) if any(one.kind is one.POSITIONAL_OR_KEYWORD for one in needed) else ()


def reference(group: Mapping[str, Any]) -> float:
    """Return the rate that a group's schedule scales: the highest if it is known, else the initial one; 0 for none."""
    return float(group.get("max_lr", group.get("initial_lr", group.get("lr"))) or 0.0)


def _settings(group: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Return a group's settings for other parameters: without weight decay, at ``ratio`` times its rate.

    Tensors are copied, because an optimiser may keep running sums in its groups and update them in place (Prodigy).
    """
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
    settings = {key: value.clone() if isinstance(value, Tensor) else value for key, value in settings.items()}
    settings |= {key: group[key] * ratio for key in _RATES if group.get(key) is not None}
    return settings | ({"weight_decay": 0.0} if "weight_decay" in group else {})
