"""Tables of the studies: each change and the two forms without it, at the same lam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exchange.frontier import Runs, error_at, points
from exchange.grid import Arm
from exchange.studies import ABOUT, STUDIES, references, same_schedule, study
from exchange.tables import MISSING, figures, mean_share, of_arm, ratio, table
from lightning_sparse.reproduction.table import spread

_HEAD = ("variant", "form", "lam", "non-zero %", "to the penalty form's", "val error %", "test error %", "pruning there: test error %")


def markdown(runs: Runs) -> str:
    """Format one table per study, starting with its reference penalty form and mask form."""
    return "\n\n".join(f"**{name}**: {ABOUT[name]}.{_table(study(name), runs)}" for name in STUDIES)


def _table(arms: Sequence[Arm], runs: Runs) -> str:
    there = any(of_arm(runs, arm.name) for arm in arms)
    return f"\n\n{table(_HEAD, _rows(arms, runs))}" if there else f" {MISSING.capitalize()}."


def _rows(arms: Sequence[Arm], runs: Runs) -> Iterator[Sequence[str]]:
    word, penalty, mask = references(arms)
    for lam in sorted({run["lam"] for arm in arms for run in of_arm(runs, arm.name)}):
        base = at(runs, penalty, lam)
        yield _row((word, "ReweightedPenalty"), lam, base, [], runs)
        yield _row((word, "AdaptiveMask"), lam, at(runs, mask, lam), base, runs)
        for arm in (arm for arm in arms if at(runs, arm.name, lam) or not of_arm(runs, arm.name)):
            beside = same_schedule(arm, penalty)
            yield _row((arm.variant, arm.form), lam, at(runs, arm.name, lam), [] if beside == arm.name else at(runs, beside, lam), runs)


def _row(what: tuple[str, str], lam: float, own: Runs, base: Runs, runs: Runs) -> Sequence[str]:
    share, error = figures(own)
    val = spread([run["val_error"] for run in own]) or MISSING
    return *what, f"{lam:g}", share, ratio(own, base)[0], val, error, _pruned(runs, own)


def at(runs: Runs, name: str, lam: float) -> Runs:
    """Return the runs of an arm at one strength."""
    return [run for run in of_arm(runs, name) if run["lam"] == lam]


def _pruned(runs: Runs, own: Runs) -> str:
    error = error_at(points(of_arm(runs, f"{own[0]['net']}/pruning")), mean_share(own)) if own else None
    return "" if error is None else f"{error:.2f}"
