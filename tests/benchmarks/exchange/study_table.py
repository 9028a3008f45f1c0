"""The table of the studies: each change beside the two forms as they are in the grid, at the same lam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exchange.frontier import Runs, error_at, points
from exchange.grid import Arm
from exchange.studies import ABOUT, STUDIES, study
from exchange.tables import MISSING, figures, mean_share, of_arm, ratio, table
from lightning_sparse.reproduction.table import spread

_HEAD = ("variant", "form", "lam", "non-zero %", "to the penalty form's", "val error %", "test error %", "pruning there: test error %")


def markdown(runs: Runs) -> str:
    """One table a study, each begun by the penalty form and the mask form as they are in the grid."""
    return "\n\n".join(f"**{name}**: {ABOUT[name]}.{_table(study(name), runs)}" for name in STUDIES)


def _table(arms: Sequence[Arm], runs: Runs) -> str:
    there = any(of_arm(runs, arm.name) for arm in arms)
    return f"\n\n{table(_HEAD, _rows(arms, runs))}" if there else f" {MISSING.capitalize()}."


def _rows(arms: Sequence[Arm], runs: Runs) -> Iterator[Sequence[str]]:
    net = arms[0].net
    for lam in sorted({run["lam"] for arm in arms for run in of_arm(runs, arm.name)}):
        for variant, name in (("as elsewhere", f"{net}/logsum/penalty"), ("as elsewhere", f"{net}/logsum/mask")):
            yield _row(variant, "AdaptiveMask" if name.endswith("mask") else "ReweightedPenalty", name, net, lam, runs)
        for arm in (arm for arm in arms if at(runs, arm.name, lam) or not of_arm(runs, arm.name)):
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
