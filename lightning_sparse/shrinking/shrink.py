"""``shrink``: remove the zero groups of a trained network, and check that its outputs stay the same."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from lightning_sparse import _checks, coupling, surgery
from lightning_sparse._tracing import UNREACHED
from lightning_sparse.coupling import Group
from lightning_sparse.shrinking import files, rounding
from lightning_sparse.shrinking.dead import Dead
from lightning_sparse.shrinking.report import Report, changed_widths, count_multiply_adds, count_samples, measure

Module = TypeVar("Module", bound=nn.Module)
_FEW = 0.1  # share of zero weights below which a checkpoint may be the dense one


@dataclass(frozen=True)
class Shrunk(Generic[Module]):
    """A shrunk copy of a module, of the same class, and what changed. ``print(shrunk.report)`` shows the table."""

    module: Module
    report: Report


def shrink(
    module: Module,
    example_inputs: Any,
    round_to: int | str = 8,
    *,
    groups: Sequence[Group] | None = None,
    heads: Mapping[str, int] | None = None,
    allow_branches: bool = False,
    verbose: bool = False,
) -> Module:
    """Return a smaller copy of a module without its zero channels, neurons and heads.

    A group goes if nothing reads it (zero columns), or if it is constant: 0, or a constant that the next layer's bias can take over.
    The smaller network must equal the given one on the example inputs, in evaluation mode: max |a - b| / max |a| <= 1e-5. The module
    is not changed. The copy has the same class, training mode and ``requires_grad``; its parameters are new, so it needs a new
    optimiser. Save it with :func:`save_shrunk`.

    Args:
        module: a trained module with zeros; any method may have made them.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments of ``forward``.
        round_to: keep a multiple of this many channels or neurons of each axis (with zero groups if need be), because odd widths can
            be slower; 1 removes all. "fastest" tries multiples of 1, 4, 8, 16 and 32 and takes the network that is measured to be the
            fastest on the example inputs. Heads are not rounded. At least one group of each axis stays.
        groups: the groups to look at, from ``coupling.groups``; by default all that it finds.
        heads: number of heads of attention modules by name, as in ``coupling.groups``.
        allow_branches: accept a forward that branches on values of tensors.
        verbose: print the report of :func:`shrink_and_report`, with the latency before and after.

    Raises ValueError if there is nothing to remove, if the outputs differ, and where ``coupling.groups`` does.
    """
    options: dict[str, Any] = {"groups": groups, "heads": heads, "allow_branches": allow_branches}
    seconds = 1.0 if _checks.truth("verbose", verbose) else 0.0
    found = shrink_and_report(module, example_inputs, round_to, seconds=seconds, **options)
    if verbose:
        print(found.report)
    return found.module


def shrink_and_report(
    module: Module,
    example_inputs: Any,
    round_to: int | str = 8,
    *,
    groups: Sequence[Group] | None = None,
    heads: Mapping[str, int] | None = None,
    allow_branches: bool = False,
    seconds: float = 1.0,
) -> Shrunk[Module]:
    """Shrink a module as :func:`shrink` does, and return the copy with a report of what changed.

    ``seconds`` is about how long to measure the latency; 0 does not measure it. The other arguments and errors are those of ``shrink``.
    """
    _checks.module(module, "shrink(module, example_inputs)")
    rounding.check(round_to)
    found = coupling.groups(module, example_inputs, heads=heads, allow_branches=allow_branches) if groups is None else list(groups)
    model, inputs = coupling.prepare(module, example_inputs, allow_branches)
    reference = surgery.outputs(model, inputs)
    dead = Dead(model, inputs, found)
    smaller: Module | None
    if isinstance(round_to, str):
        chosen = rounding.fastest(lambda unit: _cut(module, dead, rounded(found, dead.removed, unit)), example_inputs)
        smaller, unit, said = (None, 1, "") if chosen is None else (chosen.module, chosen.unit, str(chosen))
    else:
        smaller, unit, said = _cut(module, dead, rounded(found, dead.removed, round_to)), round_to, ""
    removed = rounded(found, dead.removed, unit)
    if smaller is None:
        raise ValueError(_nothing(module, found, dead, unit))
    _check(smaller, inputs, reference, model)
    _warn_of_unreached(found)
    report = _report(module, smaller, example_inputs, found, dead, removed, seconds)
    return Shrunk(smaller, replace(report, rounding=said, stayed=_stayed(dead, removed), unit=unit))


def _cut(module: Module, dead: Dead, removed: list[Group]) -> Module | None:
    """Return a copy of the module without these groups; None if there are none."""
    if not removed:
        return None
    smaller: Module = surgery.duplicate(module)
    surgery.zero_(smaller, coupling.indices(dead.removed))
    _take_biases(smaller, dead)
    kept, sizes = coupling.kept(smaller, removed)
    surgery.cut_(smaller, kept, sizes)
    files.remember(smaller, module, kept, sizes)
    return smaller


def rounded(found: Iterable[Group], removed: Iterable[Group], round_to: int) -> list[Group]:
    """Return the groups to remove so that each axis keeps a multiple of ``round_to``, or all of its groups."""
    zero = {group.name for group in removed}
    axes: dict[str, list[Group]] = {}
    for group in found:
        if group.exact:
            axes.setdefault(group.axis, []).append(group)
    chosen = []
    for members in axes.values():
        gone = [group for group in members if group.name in zero]
        unit = 1 if members[0].kind == "head" else round_to
        stay = -(-(len(members) - len(gone)) // unit) * unit
        chosen += gone[: max(len(members) - max(stay, 1), 0)] if gone else []
    return chosen


def _stayed(dead: Dead, removed: Iterable[Group]) -> dict[str, tuple[int, str]]:
    """Return {axis: (number, kind)} of the dead groups that are not removed."""
    gone = {group.name for group in removed}
    kinds = {group.axis: group.kind for group in dead.removed}
    left = Counter(group.axis for group in dead.removed if group.name not in gone)
    return {axis: (count, kinds[axis]) for axis, count in left.items()}


def _nothing(module: nn.Module, found: list[Group], dead: Dead, round_to: int) -> str:
    name, exact = type(module).__name__, sum(group.exact for group in found)
    if dead.removed:
        zero = _checks.counted(len(dead.removed), f"group of {name} is zero", f"groups of {name} are zero")
        return (
            f"{zero}, but none can go with round_to={round_to}, which rounds widths up to multiples of {round_to}: give round_to=1, which "
            f"removes all of them, or round_to={rounding.FASTEST!r}, which measures several multiples"
        )
    if dead.constants:
        group, why = next(iter(dead.constants.items()))
        return f"nothing to remove from {name}: {group} stays, because {why} ({len(dead.constants)} such groups)"
    reasons = coupling.listed({axis: why for axis, _, why in coupling.left_out(found)})
    if not exact:
        return f"nothing to remove from {name}: no group can be removed ({reasons})"
    weights = [p for p in module.parameters() if p.dim() > 1]
    share = 1 - sum(int(p.count_nonzero()) for p in weights) / max(sum(p.numel() for p in weights), 1)
    none = f"nothing to remove from {name}: none of its {exact} channels, neurons and heads is zero"
    heads = {group.kind for group in found if group.exact} == {"head"}
    remedy = f"train with structure={'Heads()' if heads else 'Channels()'}, or to a higher share of zeros"
    stay = {entry.name: group.axis for group in found if not group.exact for entry in group.parameters("producer") if entry.dim == 0}
    zero_rows = {
        name: int((module.get_parameter(name).flatten(1) == 0).all(1).sum()) for name in stay if module.get_parameter(name).dim() > 1
    }
    whole = {name: rows for name, rows in zero_rows.items() if rows}
    if whole:
        first = ", ".join(f"{rows} of {name}" for name, rows in list(whole.items())[:3])
        axes = {stay[name] for name in whole}
        reasons = coupling.listed({axis: why for axis, _, why in coupling.left_out(found) if axis in axes})
        return f"{none}. Whole rows are zero ({first}{_checks.more(whole, 3)}), but of channels that cannot be removed: {reasons}"
    if share < _FEW:
        return f"{none}, and {share:.1%} of its weights are. Is this the sparse checkpoint? If it is, {remedy}"
    return f"{none}. Its zeros ({share:.1%}) are spread over all of them, which brings no smaller network: {remedy}"


@torch.no_grad()
def _take_biases(smaller: nn.Module, dead: Dead) -> None:
    """Copy the biases that took over constants from the working copy."""
    source, own = (dict(m.named_parameters(remove_duplicate=False)) for m in (dead.model, smaller))
    for name in dead.folded:
        own[name].copy_(source[name])


def _check(smaller: nn.Module, inputs: Any, reference: list[torch.Tensor], model: nn.Module) -> None:
    """Raise ValueError unless the smaller network gives the reference, in the precision of ``model``."""
    copied = surgery.duplicate(smaller)
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    coarse = max((torch.finfo(p.dtype).eps for p in smaller.parameters() if p.is_floating_point()), default=0.0)
    gap = surgery.difference(reference, surgery.outputs(copied.double() if wide else copied, inputs))
    if not gap <= max(coupling.TOLERANCE, 8 * coarse):
        raise ValueError(
            f"the shrunk {type(smaller).__name__} differs from the given one by {gap:.2g} of its largest output on the example inputs, so "
            "nothing was returned; please report the network, and remove less with groups=[...]"
        )


def _warn_of_unreached(found: Iterable[Group]) -> None:
    """Warn of layers that forward does not reach: what another method of the module gives them has changed its width."""
    names = [axis for axis, _, why in coupling.left_out(found) if why == UNREACHED]
    if names:
        keep = "it keeps its width" if len(names) == 1 else "they keep their widths"
        warnings.warn(
            f"the trace of forward does not reach {', '.join(names[:5])}{_checks.more(names)}, so {keep}: where another method of the "
            "module, such as training_step, gives them the channels that were removed, the shapes no longer fit. Call these layers in "
            "forward, or shrink for inference by forward alone",
            stacklevel=4,
        )


def _report(
    before: nn.Module, after: nn.Module, inputs: Any, found: list[Group], dead: Dead, removed: list[Group], seconds: float
) -> Report:
    gone = {group.name for group in removed}
    count = [sum(p.numel() for p in module.parameters()) for module in (before, after)]
    multiply_adds = [count_multiply_adds(module, inputs) for module in (before, after)]
    return Report(
        changed_widths(found, [group for group in found if group.name not in gone]),
        (count[0], count[1]),
        (multiply_adds[0], multiply_adds[1]),
        surgery.difference(surgery.outputs(before, inputs), surgery.outputs(after, inputs)),
        dead.count,
        [*coupling.left_out(found)],
        dead.constants,
        measure(before, after, inputs, seconds) if seconds else {},
        samples=count_samples(inputs),
    )
