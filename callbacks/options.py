"""Check and store the arguments that all sparsity callbacks share."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Literal

from torch import Tensor

from lightning_sparse import _checks, duality, mask_rules, penalties, scores, structure
from lightning_sparse._construction import brief
from lightning_sparse._plain import plain
from lightning_sparse.curvature import Curvature
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.methods.base import MOMENTS, Method
from lightning_sparse.schedules import START, Constant, Schedule, TargetSparsity, as_schedule
from lightning_sparse.scores import LAMP, Score
from lightning_sparse.step import Strength
from lightning_sparse.structure import NM, Element, Structure

Finish = Literal["keep", "prune"]


@dataclass(frozen=True)
class Options:
    """Stores the arguments of a sparsity callback, except penalty, strength and its own arguments; ``form`` is its class name.

    Descriptions of a callback list them in this order.
    """

    form: str
    compile: bool = False
    select: list[str] | None = None
    tol: float = 0.05
    threshold: float | None = None
    gap_samples: int = 0
    keep_zeros: bool = False
    freeze: float = 0.0
    target_sparsity: float | None = None
    finish: str = "keep"
    score: Score | None = None
    least_kept: float = 0.0
    structure: Structure = Element()  # noqa: RUF009 - frozen

    @classmethod
    def checked(cls, form: str, **given: Any) -> Options:
        """Check the arguments and return the options; raise TypeError or ValueError, naming the argument, for a value not accepted."""
        target, threshold = given["target_sparsity"], given["threshold"]
        return cls(
            form,
            select=patterns(given["select"]),
            tol=_checks.between("tol", given["tol"], 0, 1),
            freeze=_checks.share("freeze", given["freeze"], closed="l"),
            threshold=None if threshold is None else _checks.between("threshold", threshold, 0, float("inf"), closed="l"),
            gap_samples=_checks.whole("gap_samples", given["gap_samples"], 0),
            keep_zeros=_checks.truth("keep_zeros", given["keep_zeros"]),
            target_sparsity=target,
            finish=finish(given["finish"], target),
            compile=_checks.truth("compile", given["compile"]),
            score=score_of(given["score"]),
            least_kept=least_kept(given["least_kept"], target),
            structure=structure_of(given["structure"]),
        )

    @property
    def ranking(self) -> Score:
        """Return the score; LAMP if none is given."""
        return self.score or LAMP()

    def changed(self, name: str, value: Any) -> Options:
        """Return the options with another value of one argument, checked as :meth:`checked` does."""
        return Options.checked(**(vars(self) | {name: plain(value)}))


def patterns(select: Any) -> list[str] | None:
    """Return a list of strings, or None."""
    if select is None:
        return None
    if isinstance(select, str) or not isinstance(select, Sequence) or not all(isinstance(item, str) for item in select):
        raise TypeError(f"select must be a list of patterns such as ['*', '!head.*'], got {_listed(select)}")
    if not select:
        raise ValueError("select=[] selects nothing; omit it, or give None, for every weight matrix")
    return list(select)


def _listed(select: Any) -> str:
    """Show what was given as patterns; of a tensor only type and shape, not its numbers."""
    if isinstance(select, (list, tuple)):
        return f"[{', '.join(_listed(item) for item in select)}]"
    return f"a {type(select).__name__} of shape {tuple(select.shape)}" if isinstance(select, Tensor) else repr(select)


def score_of(value: Any) -> Score | None:
    """Return the score, or None; raise TypeError for another type."""
    if not isinstance(value, (Score, type(None))):
        near = _checks.closest(value, names(scores), 1) if isinstance(value, str) else ""
        raise TypeError(f"score must be a Score such as scores.LAMP() or scores.Magnitude(), got {_checks.shown(value, Score)}{near}")
    return value


def least_kept(value: Any, target: float | None) -> float:
    """Return the least share of weights kept in each parameter; raise ValueError if a ``target`` leaves less than that overall."""
    least = _checks.share("least_kept", value, closed="l")
    if target is not None and least > 1 - target + 1e-9:
        raise ValueError(
            f"least_kept={least:g} keeps that share of each parameter's weights, but target_sparsity={target:g} leaves {1 - target:.2%} "
            "of all; lower one of them"
        )
    return least


def names(catalogue: ModuleType) -> list[str]:
    """Return the classes of a module as calls, for errors."""
    return [f"{name}()" for name in catalogue.__all__ if isinstance(getattr(catalogue, name), type)]


def structure_of(value: Any) -> Structure:
    """Return the structure; raise TypeError for another type."""
    if not isinstance(value, Structure):
        given = _checks.shown(value, Structure)
        near = _checks.closest(value, names(structure), 1) if isinstance(value, str) else ""
        raise TypeError(f"structure must be a Structure such as structure.Channels() or structure.Rows(), got {given}{near}")
    return value


def check_structure(options: Options, method: Method, given: Penalty | MaskRule) -> None:
    """Raise ValueError for what does not work with a structure: compiled kernels, rules that rank weights, a duality gap, a target."""
    form, structure = options.form, options.structure
    if type(structure) is Element:
        return
    if options.compile:
        raise ValueError(f"compile=True is for single weights; with structure={structure!r} omit it")
    if options.gap_samples:
        raise ValueError(f"gap_samples draws masks of single weights; with structure={structure!r} set gap_samples=0")
    if not method.penalty.separable and method.takes_groups:
        raise ValueError(f"{form} with structure={structure!r} needs a separable penalty, {given!r} ranks single weights; use Element()")
    if structure.ranks_within and options.target_sparsity is not None and method.takes_groups:
        raise ValueError(
            f"structure={structure!r} fixes the share of zeros: give a callback such as ReweightedPenalty lam and freeze=0.25 instead of "
            "target_sparsity, or use MagnitudePruning"
        )
    if isinstance(structure, NM) and options.target_sparsity is not None and options.target_sparsity < 1 - structure.n / structure.m:
        raise ValueError(
            f"structure={structure!r} makes {1 - structure.n / structure.m:.0%} of the weights zero by itself: target_sparsity must be at "
            f"least {1 - structure.n / structure.m:.4g}, got {options.target_sparsity:g}"
        )


def finish(value: Any, target: float | None) -> str:
    """Return the value, "keep" or "prune"; raise ValueError for another value, and for "prune" without a target to prune to."""
    _checks.one_of("finish", value, ("keep", "prune"))
    if value == "prune" and target is None:
        raise ValueError("finish='prune' cuts to target_sparsity when training ends, but none is given; give it, or use finish='keep'")
    return str(value)


def check_compile(form: str, method: Method, given: Penalty | MaskRule) -> None:
    """Raise ValueError if there is nothing to compile."""
    if not method.compiles:
        raise ValueError(f"{form} has no kernel to compile; omit compile=True, or use ReweightedPenalty")
    if not method.penalty.separable:
        raise ValueError(f"compile=True needs a penalty that works weight by weight, {given!r} does not; omit compile=True")


def check_moments(form: str, method: Method) -> None:
    """Raise TypeError, with the closest name, for a method that acts at no moment of a step, and so trains nothing."""
    if method.moments():
        return
    kind = type(method)
    if kind is Method:
        raise TypeError(f"{form} names no method, so it trains nothing: set method_type to a subclass of lightning_sparse.methods.Method")
    own = [name for name in dir(kind) if not name.startswith("_") and not hasattr(Method, name)]
    near = next((f"; {name!r} is none of them{_checks.closest(name, MOMENTS, 1)}" for name in own if _checks.closest(name, MOMENTS, 1)), "")
    raise TypeError(f"{kind.__name__} defines none of the moments of a step, {', '.join(MOMENTS)}, so it trains nothing{near}")


def penalty_of(given: Any, needs_separable: bool, form: str) -> Penalty:
    """Return the penalty of ``given``; raise TypeError for another type, ValueError if the duality or the method does not admit it."""
    if not isinstance(given, (Penalty, MaskRule)):
        found = _checks.shown(given, Penalty, MaskRule)
        near = _checks.closest(given, [*names(penalties), *names(mask_rules)], 1) if isinstance(given, str) else ""
        raise TypeError(f"{form} takes a Penalty or a MaskRule such as penalties.LogSum(eps=2.0), got {found}{near}")
    penalty = duality.to_penalty(given)
    if penalty.separable:
        duality.check_admissible(penalty)
    elif needs_separable or not isinstance(given, MaskRule):
        raise ValueError(f"{form} needs a separable penalty, {brief(given)} is not: its value at one weight depends on the others")
    return penalty


def strength_of(form: str, given: Penalty | MaskRule, penalty: Penalty, lam: float | Schedule | None, target: float | None) -> Strength:
    """Return the strength of ``lam``, of a mask rule's own, or that finds lam for a ``target``; raise TypeError if there is none."""
    schedule = start_of(form, given.lam if lam is None and isinstance(given, MaskRule) else lam, target)
    if target is None:
        return Strength(schedule)
    if not penalty.separable:
        raise ValueError(f"target_sparsity adjusts lam, which does not decide the zeros of {penalty!r}; set its own share instead")
    if not isinstance(schedule, Constant):
        raise ValueError(
            "target_sparsity finds lam itself: give the number to start from, or none (lam: null in a recipe, --sparsify.lam null on the "
            f"command line), got {schedule!r}"
        )
    return Strength(schedule, TargetSparsity(target, None if lam is None else schedule.lam))


def start_of(form: str, lam: float | Schedule | None, target: float | None) -> Schedule:
    """Return the schedule of ``lam``, or the start of the search for a ``target``; raise TypeError, naming the class, without either."""
    if lam is None and target is None:
        raise TypeError(f"{form} needs lam, its strength, such as lam=1e-3; or give target_sparsity=0.95 instead, which finds lam")
    return as_schedule(START if lam is None else lam)


def only_one(owner: str, old: str, value: float | None, target: float | None) -> float:
    """Return the share given as target_sparsity or under its old name; raise TypeError if none or both are given."""
    if value is not None and target is not None:
        raise TypeError(f"{owner} takes target_sparsity or its old name {old}, got both: target_sparsity={target!r}, {old}={value!r}")
    if value is None and target is None:
        raise TypeError(f"{owner} needs the share of zeros to reach, for example target_sparsity=0.9")
    return target if value is None else value  # type: ignore[return-value] # one of them is given


def describe(value: Any) -> Any:
    """Describe a dataclass or a Curvature by class_path and init_args, a function by its name, other values as plain Python ones."""
    value = plain(value)
    if isinstance(value, enum.Enum):
        return describe(value.value)
    if isinstance(value, (list, tuple)):
        return [describe(one) for one in value]
    if isinstance(value, Curvature):
        return {"class_path": type(value).__name__, "init_args": {name: describe(part) for name, part in value.settings().items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        arguments = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class_path": type(value).__name__, "init_args": arguments}
    if isinstance(value, FunctionType):  # because its repr differs between processes
        return f"{value.__module__}.{value.__qualname__}"
    return value if type(value) in (int, float, str, bool, type(None)) else repr(value)
