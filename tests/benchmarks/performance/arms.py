"""Arms of the step cost: every callback of the package, by the name of its goal and floor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lightning.pytorch import Callback

from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, SparsityMonitor, VariationalDropout
from lightning_sparse.noise import Gaussian, ScaledBernoulli
from lightning_sparse.penalties import LogSum
from lightning_sparse.structure import NM, Blocks, Channels, Rows
from performance import jobs

PLAIN = "plain"
LAM, KL_WEIGHT = 1e-3, 1e-5
PENALTY = LogSum(2.0)


def only(make: Callable[[], Callback]) -> jobs.Prepare:
    """Make an arm of one callback, created anew for each run."""
    return lambda module: [make()]


def forms(compiled: bool) -> dict[str, jobs.Prepare]:
    """Return the callbacks that can be compiled; the noise of masks stays for the whole run."""
    masked = partial(AdaptiveMask, PENALTY, LAM, alpha_min=0.9, compile=compiled)
    return {
        "penalty": only(lambda: ReweightedPenalty(PENALTY, LAM, compile=compiled)),
        "prox": only(lambda: AdaptiveProx(PENALTY, LAM, metric="adam", compile=compiled)),
        "prox exact": only(lambda: AdaptiveProx(PENALTY, LAM, metric="adam", exact=True, compile=compiled)),
        "mask": only(partial(masked, noise=ScaledBernoulli())),
        "mask local": only(partial(masked, noise=Gaussian(local=True, share=1.0))),
        QUARTER: only(partial(masked, noise=Gaussian(local=True, share=0.25))),
    }


def grouped() -> dict[str, jobs.Prepare]:
    """Return penalty and mask on groups."""
    made: dict[str, jobs.Prepare] = {}
    for name, structure in (("channels", Channels()), ("rows", Rows()), ("blocks", Blocks((16, 16))), ("2:4", NM(2, 4))):
        made[f"penalty, {name}"] = only(partial(ReweightedPenalty, PENALTY, LAM, structure=structure))
        made[f"mask, {name}"] = only(partial(AdaptiveMask, PENALTY, LAM, noise=ScaledBernoulli(), structure=structure, alpha_min=0.9))
    return made


COMPILED, QUARTER = ", compiled", "mask local, a quarter"
WHOLE = "mask, default"  # whose noise fades during the run: what counts is the mean over the rounds
ARMS: dict[str, jobs.Prepare] = {
    PLAIN: jobs.plain,
    **forms(compiled=False),
    **{f"{name}{COMPILED}": prepare for name, prepare in forms(compiled=True).items()},
    **grouped(),
    WHOLE: only(lambda: AdaptiveMask(PENALTY, LAM)),
    "variational dropout": only(lambda: VariationalDropout(KL_WEIGHT)),
    "monitor": only(lambda: SparsityMonitor()),
}


def of(arm: str) -> jobs.Prepare:
    """Return an arm by name, for a child process."""
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
for net, most in (("lenet", 1.6), ("resnet18", 1.5), ("transformer", 1.5)):
    GOALS[net][WHOLE] = most
GOALS["resnet18"] |= {arm: 1.05 if arm.startswith("penalty") else 1.10 for arm in grouped()}
