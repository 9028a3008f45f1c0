"""Train weights and log eta together, by the paper's eta-trick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import _checks, duality
from lightning_sparse.duality import Penalty
from lightning_sparse.methods.base import Member, Method, Run, Scale, Step
from lightning_sparse.methods.learned_parameters import WHOLE_BECAUSE, LearnedParameters

KEEP = 0.9933  # 1 / (1 + e^-5)


class EtaTrick(Method):
    """Minimises ``L + (lam / 2) sum (w^2 / eta + f(eta))`` over w and log eta; the minimum over eta is ``L + lam * Omega(w)``.

    Args:
        penalty: a penalty whose dual f has a slope.
        lam: the strength at which ``keep_start`` is defined.
        learned_lr: the learning rate of log eta, which follows the weights' schedule; None uses the weights' own.
        keep_start: the initial keep probability 1 / (1 + lam / eta), from which each eta is set; None uses KEEP.
        by_scale: start at eta_hat of the root mean square of the parameter's weights if ``keep_start`` is None.
    """

    takes_parts, whole_because, requires_hook = False, WHOLE_BECAUSE, True

    def __init__(
        self, penalty: Penalty, lam: float, learned_lr: float | None = None, keep_start: float | None = None, by_scale: bool = False
    ) -> None:
        super().__init__(penalty)
        _check_dual(penalty)
        self.lam, self.by_scale = lam, by_scale and keep_start is None
        self.keep_start = _checks.between("keep_start", KEEP if keep_start is None else keep_start, 0, 1)
        self.learned = LearnedParameters(self.start, learned_lr)

    def start(self, name: str, w: Tensor) -> Tensor:
        """Return the log eta that has the keep probability ``keep_start`` at ``lam``, or that of a typical weight."""
        eta = duality.eta(torch.tensor(self.keep_start, dtype=torch.float64), self.lam)
        if self.by_scale and w.numel():
            typical = self.penalty.eta_hat(w.detach().double().square().mean().sqrt())
            eta = typical if 0 < float(typical) < math.inf else eta
        return torch.full_like(w, math.log(eta), dtype=torch.promote_types(w.dtype, torch.float32))

    # -- formulas ----------------------------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...]:
        """Return w and the learned log eta."""
        return w, self.learned.value(name, w)

    def eta(self, lam: float, *terms: Tensor) -> Tensor:
        """Return the learned eta."""
        w, log_eta = terms
        return log_eta.exp().to(w.dtype)

    def is_at_rest(self, lam: float, rho: Tensor | float, memory: float, *terms: Tensor) -> Tensor:
        """Return True only if both |w| and eta_hat^-1(eta) lie in the prox's zero region, because eta lags behind w."""
        lagging = duality.magnitude(self.penalty, self.eta(lam, *terms))
        return super().is_at_rest(lam, rho, memory, *terms) & super().is_at_rest(lam, rho, memory, lagging)

    def _descend(self, in_w: Tensor, in_log_eta: Tensor, w: Tensor, log_eta: Tensor, strength: float) -> None:
        slopes = duality.joint_slopes(self.penalty, w, log_eta)
        in_w.add_(slopes[0], alpha=strength)
        in_log_eta.add_(slopes[1], alpha=strength)

    # -- moments -----------------------------------------------------------------------------------------------------------

    def reset(self, run: Run) -> None:
        super().reset(run)
        self.learned.reset(run)

    def prepare(self) -> None:
        self.learned.prepare()

    def check(self, optimizer: Optimizer, members: list[Member]) -> str:
        return self.learned.check(type(self).__name__, optimizer, members)

    def attach(self, module: nn.Module, wrappers: Iterable[Any] = ()) -> None:
        self.learned.attach(wrappers)

    def before_forward(self, batch: Any) -> None:
        self.learned.arrange()

    def after_backward(self, scale: Scale, overflowed: Callable[[bool], bool] | None = None) -> None:
        if overflowed is not None and self.run.support.frozen is None:
            self.learned.show_overflow(overflowed)

    @torch.no_grad()
    def before_optimizer(self, step: Step) -> None:
        self.learned.before_optimizer(step)
        rows: dict[float, list[tuple[Tensor, ...]]] = {}
        for name, parameter, group in step.trained():
            row = (parameter.grad, self.learned.grad_of(name), self.run.weights.live(name), self.learned.values[name].detach())
            rows.setdefault(step.lam_on_gradient(group), []).append(row)  # type: ignore[arg-type]
        for strength, found in rows.items():
            step.engine.update_(list(zip(*found, strict=True)), self._descend, (strength,), written=2)
        self.learned.limit(step)

    def after_optimizer(self, step: Step) -> None:
        self.learned.after_optimizer(step)

    def movement(self) -> str:
        return self.learned.movement()

    def finish(self) -> None:
        self.learned.store_moments()

    def release(self) -> None:
        self.learned.release()

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self.learned.state_dict()

    def check_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        self.learned.check_state(state, parameters)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learned.load_state_dict(state)


def _check_dual(penalty: Penalty) -> None:
    """Raise ValueError for a penalty whose eta gradient descent cannot find, because its dual is infinite or flat."""
    eta = torch.logspace(-4, 4, 65, dtype=torch.float64)
    value, slope = penalty.dual(eta), penalty.dual_slope(eta)
    if bool(torch.isfinite(value).all()) and bool((slope > 0).any()):
        return
    why = "is flat" if bool(torch.isfinite(value).all()) else f"is infinite from eta = {float(eta[~torch.isfinite(value)][0]):.3g} on"
    raise ValueError(f"EtaTrick learns eta by descent on the dual f, but f of {penalty!r} {why}; use ReweightedPenalty or AdaptiveProx")
