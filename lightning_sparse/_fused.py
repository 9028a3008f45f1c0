"""What the penalty form and the proximal form do to each weight, as one compiled kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_sparse import _rates, proximal
from lightning_sparse._compiled import Kernel
from lightning_sparse.duality import Penalty


class Pull:
    """grad += strength * w / eta_hat(w), in place."""

    def __init__(self, penalty: Penalty) -> None:
        self._add = Kernel(_adding, penalty, what=repr(penalty))

    def check(self, like: Iterable[Tensor]) -> None:
        """RuntimeError unless it compiles for weights that are like these."""
        self._add.check(like, (0.5, 0.5), (0.5,))

    def __call__(self, grad: Tensor, w: Tensor, strength: float) -> None:
        self._add((grad, w), (float(strength),))


def _adding(penalty: Penalty) -> Any:
    def add(grad: Tensor, w: Tensor, strength: Tensor) -> None:
        grad.add_(penalty.gradient(w) * strength)

    return add


class Shrinkage:
    """The exact prox of rate * omega, or the reweighted step, in place."""

    def __init__(self, penalty: Penalty, exact: bool) -> None:
        self._step = Kernel(_stepping, penalty, exact, what=f"{'the prox of ' if exact else ''}{penalty!r}")

    def check(self, like: Iterable[Tensor], rate: _rates.Kind) -> None:
        """RuntimeError unless it compiles for weights that are like these, with such a rate."""
        self._step.check(like, *{"root": ((0.5, 0.5), (0.5, 0.5)), "tensor": ((0.5, 0.5), ()), "number": ((0.5,), (0.5,))}[rate])

    def __call__(self, w: Tensor, state: Mapping[str, Any], group: dict[str, Any], metric: str, factor: float) -> None:
        """Of weights with that much of an optimiser's state, at ``factor`` times :func:`proximal.rate`."""
        rooted = None if metric == "plain" else _rates.of_root(state, group, factor)
        if rooted is not None:
            self._step((w, rooted[0]), [*map(float, rooted[1:])])
            return
        rate = proximal.rate(state, group, metric, factor)
        if isinstance(rate, Tensor):
            self._step((w, rate), ())
        else:
            self._step((w,), (float(rate),))


def _stepping(penalty: Penalty, exact: bool) -> Any:
    def step(w: Tensor, *rate: Tensor) -> None:
        rho = _rates.over_root(*rate) if len(rate) == 3 else rate[0]
        w.copy_(penalty.prox(w, rho) if exact else proximal.reweighted_step(penalty, w, rho))

    return step
