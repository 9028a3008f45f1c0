"""Where a form's strength comes from: a number, a schedule, a mask rule's own, or an ascent to a target share of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_sparse import _checks
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.schedules import Constant, Schedule
from lightning_sparse.target import NEAR, START, TargetSparsity

if TYPE_CHECKING:
    from lightning_sparse.callbacks._supported import Supported


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


def only_one(owner: str, old: str, value: float | None, target: float | None) -> float:
    """The share that is given as target_sparsity or under its old name; TypeError where there is none, or two."""
    if value is not None and target is not None:
        raise TypeError(f"{owner} takes target_sparsity or its old name {old}, got both: target_sparsity={target!r}, {old}={value!r}")
    if value is None and target is None:
        raise TypeError(f"{owner} needs the share of zeros to reach, for example target_sparsity=0.9")
    return target if value is None else value  # type: ignore[return-value] # one of them is given


def check_finish(finish: Any, target: float | None) -> Any:
    """The value, "keep" or "prune"; ValueError for another value, and for "prune" without a target to cut to."""
    _checks.one_of("finish", finish, ("keep", "prune"))
    if finish == "prune" and target is None:
        raise ValueError("finish='prune' cuts to target_sparsity where training ends, and none is given; give it, or leave finish='keep'")
    return finish


def ascent(penalty: Penalty, schedule: Schedule, target: float | None) -> TargetSparsity | None:
    """What finds lam for a target share of zeros, None without one; ValueError where lam does not decide the zeros or has a schedule."""
    if target is None:
        return None
    if not penalty.separable:
        raise ValueError(f"target_sparsity works through lam, which does not decide the zeros of {penalty!r}; set its own share instead")
    if not isinstance(schedule, Constant):
        raise ValueError(f"target_sparsity finds lam itself: give the number to start from, or none (null in a recipe), got {schedule!r}")
    return TargetSparsity(target, schedule.lam)


def check_way(callback: Supported) -> None:
    """Before training: a target that the run's length or the zeros it starts with put out of reach."""
    held = callback.share_of_zeros() if callback.ascent is not None and callback.keep_zeros else 0.0
    if callback.ascent is not None and held > callback.ascent.target + NEAR:
        raise ValueError(
            f"target_sparsity={callback.ascent.target:g} is out of reach: {held:.2%} of the selected weights are zero already and "
            "keep_zeros=True keeps them so; raise the target, or set keep_zeros=False"
        )
