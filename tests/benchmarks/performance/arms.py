"""The arms of the step's cost: every form of the package, by the name that its goal and its floor go by."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Callback

from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, SparsityMonitor, VariationalDropout
from lightning_sparse.noise import Gaussian, ScaledBernoulli
from lightning_sparse.penalties import LogSum
from performance import jobs

PLAIN = "plain"
LAM, KL_WEIGHT = 1e-3, 1e-5
PENALTY = LogSum(2.0)


def only(make: Callable[[], Callback]) -> jobs.Prepare:
    """An arm that is one callback, made afresh for each run."""
    return lambda module: [make()]


def forms(compiled: bool) -> dict[str, jobs.Prepare]:
    """The forms that can be compiled."""
    return {
        "penalty": only(lambda: ReweightedPenalty(PENALTY, LAM, compile=compiled)),
        "prox": only(lambda: AdaptiveProx(PENALTY, LAM, metric="adam", compile=compiled)),
        "prox exact": only(lambda: AdaptiveProx(PENALTY, LAM, metric="adam", exact=True, compile=compiled)),
        "mask": only(lambda: AdaptiveMask(PENALTY, LAM, noise=ScaledBernoulli(), compile=compiled)),
        "mask local": only(lambda: AdaptiveMask(PENALTY, LAM, noise=Gaussian(local=True), compile=compiled)),
        QUARTER: only(lambda: AdaptiveMask(PENALTY, LAM, noise=Gaussian(local=True, share=0.25), compile=compiled)),
    }


COMPILED, QUARTER = ", compiled", "mask local, a quarter"
ARMS: dict[str, jobs.Prepare] = {
    PLAIN: jobs.plain,
    **forms(compiled=False),
    **{f"{name}{COMPILED}": prepare for name, prepare in forms(compiled=True).items()},
    "variational dropout": only(lambda: VariationalDropout(KL_WEIGHT)),
    "monitor": only(lambda: SparsityMonitor()),
}


def of(arm: str) -> jobs.Prepare:
    """By name, for a process that is told no more."""
    return ARMS[arm]


_MONITOR = 1.01
_OF_FORMS: dict[str, dict[str, float]] = {
    "lenet": {"penalty": 1.05, "prox": 1.08, "mask": 1.5, "mask local": 1.6, "monitor": _MONITOR},
    "resnet18": {"penalty": 1.02, "prox": 1.03, "mask": 1.10, "mask local": 1.5, "monitor": _MONITOR},
    "transformer": {"penalty": 1.03, "prox": 1.04, "mask": 1.10, "mask local": 1.4, "monitor": _MONITOR},
}
GOALS = {
    net: {f"{arm}{kernel}": goal for arm, goal in (goals | {QUARTER: goals["mask local"]}).items() for kernel in ("", COMPILED)}
    for net, goals in _OF_FORMS.items()
}
