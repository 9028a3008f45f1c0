"""The table of the studies: each change of the mask form beside the default and the penalty form at the same lam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exchange.frontier import Runs, error_at, points
from exchange.grid import Arm
from exchange.studies import ABOUT, LAMS, STUDIES, study
from exchange.tables import MISSING, figures, mean_share, of_arm, ratio, table
from lightning_sparse.reproduction.table import spread

_HEAD = ("variant", "form", "lam", "non-zero %", "to the penalty form's", "val error %", "test error %", "pruning there: test error %")


def markdown(runs: Runs) -> str:
    """One table a study, each begun by the penalty form and the mask form as they are by default."""
    return "\n\n".join(f"**{name}**: {ABOUT[name]}.{_table(study(name), runs)}" for name in STUDIES)


def _table(arms: Sequence[Arm], runs: Runs) -> str:
    there = any(of_arm(runs, arm.name) for arm in arms)
    return f"\n\n{table(_HEAD, _rows(arms, runs))}" if there else f" {MISSING.capitalize()}."


def _rows(arms: Sequence[Arm], runs: Runs) -> Iterator[Sequence[str]]:
    net = arms[0].net
    lams = LAMS if net == "lenet_300_100" else arms[0].strengths
    for lam in lams:
        for variant, name in (("default", f"{net}/logsum/penalty"), ("default", f"{net}/logsum/mask")):
            yield _row(variant, "AdaptiveMask" if name.endswith("mask") else "ReweightedPenalty", name, net, lam, runs)
        for arm in arms:
            yield _row(arm.variant, arm.form, arm.name, net, lam, runs)


def _row(variant: str, form: str, name: str, net: str, lam: float, runs: Runs) -> Sequence[str]:
    own, base = (at(runs, arm, lam) for arm in (name, f"{net}/logsum/penalty"))
    share, error = figures(own)
    val = spread([run["val_error"] for run in own]) or MISSING
    return variant, form, f"{lam:g}", share, ratio(own, [] if own == base else base)[0], val, error, _pruned(runs, net, own)


def at(runs: Runs, name: str, lam: float) -> Runs:
    """The runs of an arm at one strength."""
    return [run for run in of_arm(runs, name) if run["lam"] == lam]


def _pruned(runs: Runs, net: str, own: Runs) -> str:
    error = error_at(points(of_arm(runs, f"{net}/pruning")), mean_share(own)) if own else None
    return "" if error is None else f"{error:.2f}"
