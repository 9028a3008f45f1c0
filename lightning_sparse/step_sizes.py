"""Find the step sizes of optimisers: read them from the state of torch's own, measure them for all others.

Torch's optimisers store the terms of their step size under known names. In other optimisers the same names may mean something else:
the step count is in the group, the second moments belong to rotated or reduced gradients, the step is a sign. For those the steps
themselves are compared with the gradients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import elementwise
from lightning_sparse.optimizer import Kind, step_size_kind

_SAMPLE = 4096  # weights of a parameter whose steps are compared with their gradients
_WINDOW = 0.98  # weight of the past in the mean step and the mean gradient, because it exceeds the memory of most momenta
_NEW = 0.1  # weight of the present in their ratio
_SQUARES = 0.999  # weight of the past in the mean square of a gradient, as in Adam
_ENOUGH = 50  # steps after which the comparison must have found a step size
_MOSTLY = 0.5  # share of the mean step's variance that gradients divided by their size explain in optimisers that divide them
_FITS = 0.01  # least share of the mean step's variance that the gradients must explain

_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.SparseAdam)  # RAdam's state lacks a factor of its steps
_SHRINKING = (torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax)  # steps become small after large gradients
_READABLE = (torch.optim.SGD, torch.optim.ASGD, torch.optim.RMSprop, *_ADAMS, *_SHRINKING)


class Rate(NamedTuple):
    """The optimiser's state of a parameter and its group's settings, from which the step size is computed."""

    state: Mapping[str, Any]
    group: dict[str, Any]


_UNKNOWN = Rate({}, {"lr": 0.0})


class Doubt(NamedTuple):
    """Why the effect of lam under an optimiser is not known, and whether its step size is measured all the same."""

    reason: str
    is_measured: bool = False


def source(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> tuple[Optimizer, dict[str, Any]]:
    """Return the optimiser that steps ``parameter`` and its group there: an inner one if ``optimizer`` only wraps it (Lookahead)."""
    if is_readable(type(optimizer)):
        return optimizer, group
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer) and inner is not optimizer:
            for own in inner.param_groups:
                if any(one is parameter for one in own["params"]):
                    return source(inner, parameter, own)
    return optimizer, group


def is_readable(kind: Any) -> bool:
    """Return True if the state of such optimisers gives the step size: torch's classes, and subclasses whose ``step`` calls theirs."""
    return kind in _READABLE or _steps_as_torch(kind)


@lru_cache(maxsize=256)
def _steps_as_torch(kind: Any) -> bool:
    if not issubclass(kind, _READABLE):
        return False
    step = inspect.unwrap(kind.step)
    return step.__module__.startswith("torch.") or "step" in getattr(getattr(step, "__code__", None), "co_names", ())


def is_always_read(optimizer: Optimizer) -> bool:
    """Return True for one of torch's own classes, whose steps need no measurement."""
    return type(optimizer) in _READABLE


def has_second_moments(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> bool:
    """Return True for one of torch's kinds of Adam, whose second moments can be read."""
    inner = source(optimizer, parameter, group)[0]
    return is_readable(type(inner)) and isinstance(inner, _ADAMS)


def kind_of(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> Kind:
    """Predict the kind of step size before the first step."""
    inner, own = source(optimizer, parameter, group)
    return step_size_kind(inner, own) if is_readable(type(inner)) else "root"


def suits_logarithms(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> bool:
    """Return True if a learned logarithm moves by about the learning rate a step, or as with SGD by a share of its gradient."""
    inner = source(optimizer, parameter, group)[0]
    return is_readable(type(inner)) and not isinstance(inner, _SHRINKING)


def finds_scale(group: Mapping[str, Any]) -> bool:
    """Return True if an optimiser multiplies ``lr`` by a scale that it finds itself and keeps in its groups (Prodigy, D-Adaptation)."""
    return "d" in group and ("d0" in group or "growth_rate" in group)


class StepSizes:
    """The step sizes of the parameters that a callback works on.

    Those of torch's optimisers are read. Others are measured, which costs one float of memory per weight and two passes over each
    gradient: a step is modelled as ``c / (sqrt(v) + eps)`` times the gradient, with v its mean square, or as one number times it,
    whichever explains the steps better. c is estimated on up to 4096 weights of a parameter, by regression of their mean step on
    their mean gradient, so that it includes momentum, trust ratios, signs and rates set elsewhere; for a penalty's gradient by the
    ratio of their norms.
    """

    def __init__(self) -> None:
        self._measured: dict[int, Measured] = {}  # by the parameter's id
        self._warned: set[type[Optimizer]] = set()

    def of(self, optimizer: Optimizer, parameter: Tensor, group: dict[str, Any], added: bool = False) -> Rate:
        """Return what step_size_terms of ``lightning_sparse.optimizer`` takes, of the last step; a rate of 0 while it is unknown.

        ``added`` is for a gradient that is added to the loss's, such as a penalty's (:meth:`Measured.rate`).
        """
        if type(optimizer) in _READABLE:
            return Rate(optimizer.state.get(parameter, {}), group)
        inner, own = source(optimizer, parameter, group)
        if self._is_read(inner, parameter, own):
            return Rate(inner.state.get(parameter, {}), own)
        return self._measured[id(parameter)].rate(own, added) if id(parameter) in self._measured else _UNKNOWN

    def before(self, optimizer: Optimizer, live: Iterable[tuple[Tensor, dict[str, Any], Tensor]]) -> None:
        """Record the weights right before a step of these parameters; each comes with its group and its live weights."""
        if type(optimizer) in _READABLE:
            return
        for parameter, group, w in live:
            inner, own = source(optimizer, parameter, group)
            if not self._is_read(inner, parameter, own):
                self._measured.setdefault(id(parameter), Measured()).before(elementwise.local_part(w.detach()))

    def after(self, optimizer: Optimizer, stepped: Iterable[tuple[Tensor, dict[str, Any]]]) -> Doubt | None:
        """Measure right after the step; return, once per class of optimiser, why a step size is unknown."""
        if type(optimizer) in _READABLE:
            return None
        lost = rateless = False
        for parameter, group in stepped:
            if id(parameter) in self._measured and parameter.grad is not None:
                one, own = self._measured[id(parameter)], source(optimizer, parameter, group)[1]
                one.after(elementwise.local_part(parameter.detach()), elementwise.local_part(parameter.grad.detach()), own)
                lost, rateless = lost or not one.found, rateless or ("lr" in own and own["lr"] is None)
        why = "its steps do not follow its gradients" if lost else ""
        if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):  # schedule-free
            why = "it trains other weights than it evaluates"
        if not (why or rateless) or type(optimizer) in self._warned:
            return None
        self._warned.add(type(optimizer))
        name = f"the step size of {type(optimizer).__name__} is not known"
        return Doubt(f"{name}: {why}") if why else Doubt(f"{name} in advance: it has lr=None and finds its learning rate itself", True)

    def state_dict(self, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the measurements by parameter name; empty if step sizes are read."""
        known = {name: self._measured[id(one)] for name, one in parameters.items() if id(one) in self._measured}
        return {name: one.state_dict() for name, one in known.items() if one.steps}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, Tensor]) -> None:
        """Restore the measurements."""
        found = {name: one for name, one in parameters.items() if name in state}
        self._measured = {id(one): Measured(state[name], elementwise.local_part(one.detach())) for name, one in found.items()}

    def _is_read(self, optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        if not is_readable(type(optimizer)) or id(parameter) in self._measured:
            return type(optimizer) in _READABLE
        return type(optimizer) in _READABLE or _is_complete(optimizer, optimizer.state.get(parameter, {}), group)


class Measured:
    """Measures the step size of one parameter from its steps and its gradients."""

    def __init__(self, kept: Mapping[str, Tensor] | None = None, like: Tensor | None = None) -> None:
        self.steps = 0
        self.square = torch.empty(0)  # the mean of g^2
        self._means = torch.empty(0)  # means over a sample of the weights: steps, gradients, and gradients / sqrt(v)
        self._fit = torch.zeros(4, dtype=torch.float64)  # means of c and of its share of the steps' variance, of both kinds
        self._index: Tensor | None = None
        self._old: Tensor | None = None
        if kept is not None and like is not None:
            self.steps, self._fit = int(kept["steps"]), kept["fit"].clone()
            self.square, self._means = kept["square"].clone().to(like.device), kept["means"].clone().to(like.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the measurements as tensors only."""
        kept = {"square": self.square, "means": self._means, "fit": self._fit, "steps": torch.tensor(self.steps)}
        return {key: value.clone() for key, value in kept.items()}

    def before(self, w: Tensor) -> None:
        """Record the weights before a step."""
        if self._index is None and w.numel() > _SAMPLE:  # multiples of the golden ratio are spread evenly
            spread = torch.arange(_SAMPLE, dtype=torch.float64).mul_((math.sqrt(5) - 1) / 2).frac_()
            self._index = spread.mul_(w.numel()).long().clamp_(max=w.numel() - 1).to(w.device)
        self._old = self._sample(w).clone()

    def after(self, w: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Compare the step with the gradient that caused it."""
        old, self._old = self._old, None
        lr = number(group.get("lr"), 1.0)
        if old is None or lr == 0 or grad.layout != torch.strided:
            return
        if self.steps == 0:
            self.square = torch.zeros_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
            self._means = torch.zeros(3, len(old), dtype=old.dtype, device=old.device)
        self.steps += 1
        exact = grad.to(self.square.dtype)
        self.square.mul_(_SQUARES).addcmul_(exact, exact, value=1 - _SQUARES)
        downhill = self._sample(grad) * (1.0 if group.get("maximize") else -1.0)
        scaled = downhill / (self._sample(self.square).div(self._share).sqrt() + _eps(group))
        self._means.lerp_(torch.stack([self._sample(w).sub(old).div_(lr), downhill, scaled]), 1 - _WINDOW)
        self._compare()

    @property
    def _share(self) -> float:
        """Return the share of the mean square's weights that belongs to the steps so far."""
        return 1 - _SQUARES**self.steps

    def _compare(self) -> None:
        products = (self._means @ self._means.T).double().cpu()
        moved, along, own = products[0, 0], products[0, 1:], products.diagonal()[1:]
        fit = torch.cat([along / own, along.clamp(min=0) ** 2 / (own * moved)])
        if bool(fit.isfinite().all()):  # not finite if no weight moved
            self._fit.lerp_(fit, max(_NEW, 1 / self.steps))

    def _sample(self, tensor: Tensor) -> Tensor:
        taken = tensor.reshape(-1) if self._index is None else torch.take(tensor, self._index)
        return taken.to(torch.promote_types(taken.dtype, torch.float32))

    def rate(self, group: Mapping[str, Any], added: bool = False) -> Rate:
        """Return state and settings of an RMSprop or an SGD with the measured rate.

        The regression gives the rate in the directions of large mean gradients. It explains little of the steps of optimisers that
        orthogonalise them (Muon, SOAP), because those move less in these directions. An ``added`` gradient, which has no preferred
        direction, then moves a weight further: by the norm of the mean step divided by that of the mean gradient.

        A momentum that sums up gradients, as SGD's, is part of the rate and has no further memory. Optimisers that divide gradients by
        their size (MADGRAD) average them instead: their rate exceeds SGD's, and the divided gradients explain most of their steps.
        """
        plain, scaled, fits, fits_scaled = self._fit.tolist()
        averages = "momentum" not in group or (plain > 2 / (1 - _memory(group)) and fits_scaled > _MOSTLY)
        if added:
            plain, scaled = plain / math.sqrt(max(fits, _FITS)), scaled / math.sqrt(max(fits_scaled, _FITS))
        lr, settings = number(group.get("lr"), 1.0), {"betas": (_memory(group), 0.0)}
        if fits > fits_scaled:
            return Rate({}, (settings if averages else {}) | {"lr": lr * max(plain, 0.0)})
        if scaled <= 0:
            return _UNKNOWN
        root = math.sqrt(self._share)
        return Rate({"square_avg": self.square}, settings | {"lr": lr * scaled * root, "eps": _eps(group) * root})

    @property
    def found(self) -> bool:
        """Return True if the gradients explain the steps, or if there were not enough steps yet."""
        return self.steps < _ENOUGH or float(self._fit[2:].max()) > _FITS


def _is_complete(optimizer: Optimizer, state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Return True if the state of a subclass holds all that its base's step size needs, or is still empty."""
    if not state or isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD)):
        return True
    needs = next((needs for moment, needs in _NEEDS.items() if moment in state), ("",))
    return all(name in (state if name == "step" else group) for name in needs)


_NEEDS = {"exp_avg_sq": ("step", "betas", "eps"), "square_avg": ("eps",), "sum": ("step", "lr_decay", "eps"), "exp_inf": ()}


def are_step_sizes(value: Any) -> bool:
    """Return True for a value of :meth:`StepSizes.state_dict`."""
    return isinstance(value, dict) and all(isinstance(name, str) and _is_kept(kept) for name, kept in value.items())


def _is_kept(kept: Any) -> bool:
    names = {"square", "means", "fit", "steps"}
    whole = isinstance(kept, dict) and kept.keys() == names and all(isinstance(one, Tensor) for one in kept.values())
    return whole and all(bool(torch.isfinite(one).all()) for one in kept.values()) and kept["fit"].shape == (4,)


def number(value: Any, default: float) -> float:
    """Return a finite number, also one in a tensor; else ``default``."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return default
    return number if math.isfinite(number) else default


def _eps(group: Mapping[str, Any]) -> float:
    eps = number(group.get("eps"), 1e-8)
    return eps if 0 < eps < 1e-3 else 1e-8


def _memory(group: Mapping[str, Any]) -> float:
    """Return the first beta, or the momentum of an optimiser without betas; Adam's default if the group has neither."""
    if "betas" not in group and "momentum" not in group:
        return 0.9
    betas = group.get("betas")
    first = betas[0] if isinstance(betas, (tuple, list)) and betas else group.get("momentum")
    beta = number(first, 0.0)
    return beta if 0 <= beta < 1 else 0.0
