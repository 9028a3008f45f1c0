"""Shrink the weights by a proximal step after each optimiser step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import _checks, step_sizes
from lightning_sparse import optimizer as steps
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import Engine
from lightning_sparse.methods.base import Member, Method, Step

Metric = Literal["auto", "adam", "plain"]


@dataclass(frozen=True)
class ProximalStep:
    """Computes w <- w / (1 + step / eta_hat(w)), or the exact prox of step * omega; ``step`` is lam times the step size."""

    penalty: Penalty
    exact: bool

    def __call__(self, w: Tensor, *step_size: Any) -> None:
        step = steps.step_size(*step_size)
        w.copy_(self.penalty.prox(w, step) if self.exact else reweighted_step(self.penalty, w, step))


def reweighted_step(penalty: Penalty, w: Tensor, step: Tensor | float, out: Tensor | None = None) -> Tensor:
    """Return w / (1 + step / eta_hat(w)), step = rho lam: one majorise-minimise step of the prox, never an exact zero by itself.

    The result is written to ``out`` if it is given; ``out`` may be ``w``.
    """
    eta = penalty.eta_hat(w).clamp(min=torch.finfo(w.dtype).tiny)  # so that a step of 0 changes nothing where eta_hat is 0
    pull = torch.div(torch.as_tensor(step, dtype=w.dtype, device=w.device), eta, out=eta)
    return torch.div(w, pull.add_(1), out=out)


class Proximal(Method):
    """Applies ``w <- w / (1 + rho lam / eta_hat(w))`` after each optimiser step (AdaProx), or the exact prox of rho lam omega.

    ``metric`` says what rho is: the learning rate ("plain"), Adam's lr / (sqrt(v_hat) + eps) ("adam"), or the optimiser's own
    step size ("auto"). ``bounded`` adds lam to eps there, as if the penalty's gradient were in v_hat: a weight whose gradients are tiny,
    as in the first steps, then moves by at most lr in a step (for slopes of at most 1).
    """

    compiles = True
    adds_gradients = False

    def __init__(self, penalty: Penalty, metric: Metric = "auto", exact: bool = False, bounded: bool = False) -> None:
        super().__init__(penalty)
        _checks.one_of("metric", metric, ("auto", "adam", "plain"))
        self.metric, self.exact, self.bounded = metric, exact, bounded
        self._shrink = ProximalStep(penalty, exact)

    @property
    def oscillates(self) -> bool:
        """Return True for the reweighted step, False for the exact prox, which reaches zero by itself."""
        return not self.exact

    @property
    def needs_step_sizes(self) -> bool:
        return self.metric == "auto"

    def check(self, optimizer: Optimizer, members: list[Member]) -> str:
        for _, parameter, group in members:
            self._check_metric(optimizer, parameter, group)
        return ""

    def _check_metric(self, optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> None:
        name = type(optimizer).__name__
        if self.metric == "adam" and not step_sizes.has_second_moments(optimizer, parameter, group):
            raise ValueError(
                f"metric='adam' needs an optimiser with second moments, got {name}: one of torch's, such as AdamW, whose state is read. "
                "Use metric='auto', which measures the step size of others, or metric='plain'"
            )
        if self.metric == "plain" and not isinstance(group.get("lr"), (int, float, Tensor)):
            raise ValueError(f"metric='plain' is the learning rate, but {name} has lr={group.get('lr')!r}; use metric='auto'")

    def compile(self, engine: Engine, optimizers: Iterable[tuple[Optimizer, list[Member]]]) -> None:
        what = f"{'the prox of ' if self.exact else ''}{self.penalty!r}"
        for optimizer, members in optimizers:
            for _, parameter, group in members:
                kind = "number" if self.metric == "plain" else step_sizes.kind_of(optimizer, parameter, group)
                values, scalars = {"root": ((0.5, 0.5), (0.5, 0.5)), "tensor": ((0.5, 0.5), ()), "number": ((0.5,), (0.5,))}[kind]
                engine.compile_update_(self._shrink, [parameter], values, scalars, what)

    @torch.no_grad()
    def after_optimizer(self, step: Step) -> None:
        rows = []
        for _, parameter, group in step.trained():
            state, own = self._step_size(step, parameter, group)
            if self.bounded and "eps" in own:
                own = {**own, "eps": own["eps"] + step.lam}
            rows.append((state, own, step.lam_on_prox(own), parameter))
        for columns, scalars in steps.by_step_size(rows, self.metric):
            step.engine.update_(columns, self._shrink, scalars, separable=self.penalty.separable)

    def _step_size(self, step: Step, parameter: Tensor, group: dict[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Return the state and the group that the step size of a parameter is computed from."""
        if self.metric == "auto":
            return step.sizes.of(step.optimizer, parameter, group)
        inner, own = step_sizes.source(step.optimizer, parameter, group)
        return inner.state.get(parameter, {}), own
