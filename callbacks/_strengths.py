"""Where a form's strength comes from: a number, a schedule, a mask rule's own, or an ascent to a target share of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_sparse.ascent import NEAR, START, Ascent
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.schedules import Constant, Schedule

if TYPE_CHECKING:
    from lightning_sparse.callbacks._supported import Supported

SHORTEST = 20  # optimiser steps in which an ascent can find lam


def strength(form: str, given: Penalty | MaskRule, lam: float | Schedule | None, target: float | None) -> float | Schedule:
    """``lam``, or a mask rule's own, or where an ascent to ``target`` starts."""
    if lam is not None:
        return lam
    if isinstance(given, MaskRule):
        return given.lam
    if target is not None:
        return START
    raise ValueError(f"{form} needs lam, because {given!r} knows no strength; for example lam=1e-3, or target_sparsity=0.95 to find it")


def given(form: str, name: str, lam: float | Schedule | None, target: float | None) -> float | Schedule:
    """``lam``, or where an ascent to ``target`` starts; TypeError, naming the argument, where there is neither."""
    if lam is None and target is None:
        raise TypeError(f"{form} needs {name}; or give target_sparsity, such as target_sparsity=0.95, which finds it")
    return START if lam is None else lam


def ascent(penalty: Penalty, schedule: Schedule, target: float | None) -> Ascent | None:
    """What finds lam for a target share of zeros, None without one; ValueError where lam does not decide the zeros or has a schedule."""
    if target is None:
        return None
    if not penalty.separable:
        raise ValueError(f"target_sparsity works through lam, which does not decide the zeros of {penalty!r}; set its own share instead")
    if not isinstance(schedule, Constant):
        raise ValueError(f"target_sparsity finds lam itself: give the number to start from, or none (null in a recipe), got {schedule!r}")
    return Ascent(target, schedule.lam)


def check_way(callback: Supported) -> None:
    """Before training: a target that the run's length or the zeros it starts with put out of reach."""
    way = callback.total * (1 - callback.freeze)
    if callback.ascent is not None and way < SHORTEST:
        raise ValueError(
            f"target_sparsity={callback.ascent.target:g} needs at least {SHORTEST} optimiser steps before the support is frozen, "
            f"got {way:.0f} of {callback.total:.0f} with freeze={callback.freeze:g}; train longer, or lower freeze"
        )
    held = callback.share_of_zeros() if callback.ascent is not None and callback.keep_zeros else 0.0
    if callback.ascent is not None and held > callback.ascent.target + NEAR:
        raise ValueError(
            f"target_sparsity={callback.ascent.target:g} is out of reach: {held:.2%} of the selected weights are zero already and "
            "keep_zeros=True keeps them so; raise the target, or set keep_zeros=False"
        )
