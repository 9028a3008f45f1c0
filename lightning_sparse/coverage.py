"""Measure how much of a module a selection covers, and write the warnings about the weights it skips."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from lightning_sparse import _checks, _roles
from lightning_sparse.select import OWNERS, matrices, skipped_matrices

SMALL = 0.01  # share of the matrices that changes sparsity/total by less than one per cent
LISTED = 5  # names in a message


class Coverage(NamedTuple):
    """Counts of elements; a parameter with several names counts once, one without a shape yet counts as 0."""

    selected: dict[str, int]
    parameters: int  # all parameters of the module
    frozen: int  # frozen matrices that the patterns match, or all if none is included
    passed: dict[str, tuple[str, int]]  # matrices of other layers that the default skips: their layer's class and size
    tied: dict[str, str]  # selected matrices that are embeddings too, and their name there
    adapters: list[str]  # selected matrices whose product is added to a frozen weight

    @property
    def share(self) -> float:
        return sum(self.selected.values()) / max(self.parameters, 1)

    @property
    def passed_share(self) -> float:
        return sum(size for _, size in self.passed.values()) / max(self.parameters, 1)

    @property
    def is_partial(self) -> bool:
        """Return True if the skipped matrices would change the share of zeros."""
        sizes = [size for _, size in self.passed.values()]
        return bool(sizes) and (min(sizes) == 0 or sum(sizes) >= SMALL * (sum(sizes) + sum(self.selected.values())))


def measure(
    module: nn.Module, chosen: Mapping[str, Tensor], patterns: Sequence[str] | None = None, beside: Iterable[nn.Parameter] = ()
) -> Coverage:
    """Return the :class:`Coverage` of ``chosen``, selected by ``patterns``; ``beside`` are parameters that others select."""
    taken = {id(parameter) for parameter in (*chosen.values(), *beside)}
    own = {name: holder for name, holder, _ in _roles.own_matrices(module, OWNERS)}
    passed = {name: p for name, p in skipped_matrices(module, patterns).items() if id(p) not in taken}
    frozen = {id(p): p for name, p in matrices(module).items() if not p.requires_grad and is_asked(name, patterns)}
    embeddings = _roles.embeddings(module)
    tied = {name: embeddings[id(p)] for name, p in chosen.items() if id(p) in embeddings and name not in (patterns or ())}
    return Coverage(
        {name: _size(parameter) for name, parameter in chosen.items()},
        sum(_size(parameter) for parameter in module.parameters()),
        sum(_size(parameter) for key, parameter in frozen.items() if key not in taken and key not in embeddings),
        {name: (type(own[name]).__name__, _size(parameter)) for name, parameter in passed.items()},
        tied,
        _adapters(module, chosen),
    )


def _size(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, nn.UninitializedParameter) else parameter.numel()


def _adapters(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names inside of PEFT's layers, found without importing PEFT."""
    layers = [path for path, part in module.named_modules() if any(base.__name__ == "BaseTunerLayer" for base in type(part).__mro__)]
    return [name for name in names if any(name.startswith(f"{path}.") for path in layers)]


def skipped_message(found: Coverage, who: str, patterns: Sequence[str] | None, names: Collection[str]) -> str:
    """Write which matrices ``who`` ("ReweightedPenalty selects") skips and how to select or exclude them; empty if none."""
    if not found.passed:
        return ""
    groups = grouped({name: kind for name, (kind, _) in found.passed.items()}, names)
    every = [f"{pattern!r} ({kind}{f', {count} matrices' if count > 1 else ''})" for pattern, (kind, count) in groups.items()]
    shown = ", ".join(every[:LISTED]) + _checks.more(every, LISTED)
    total, patterns = len(found.selected) + len(found.passed), list(patterns or ())
    return (
        f"{who} {len(found.selected)} of {total} weight matrices, {found.share:.1%} of the parameters: by default not those of layers "
        f"other than torch's own, here {shown} with {found.passed_share:.1%} of the parameters, which "
        f"sparsity/total does not count. Add them with select={['*', *patterns]}, or exclude them without this message with "
        f"select={[*patterns, *('!' + pattern for pattern in list(groups)[:LISTED])]}"
    )


def grouped(kinds: Mapping[str, str], names: Collection[str]) -> dict[str, tuple[str, int]]:
    """Return patterns for names that differ only in numbers (``h.*.attn.weight``), each with its kind and count.

    A pattern that would also match another of ``names`` is not used; its members are then listed one by one.
    """
    members: dict[tuple[str, str], list[str]] = {}
    for name, kind in kinds.items():
        pattern = ".".join("*" if part.isdigit() else glob.escape(part) for part in name.split("."))
        members.setdefault((pattern, kind), []).append(name)
    found: dict[str, tuple[str, int]] = {}
    for (pattern, kind), inside in members.items():
        whole = len(inside) > 1 and all(name in inside for name in names if fnmatchcase(name, pattern))
        found |= {pattern: (kind, len(inside))} if whole else dict.fromkeys(inside, (kind, 1))
    return found


def tied_message(found: Coverage, who: str, patterns: Sequence[str] | None) -> str:
    """Write which selected matrices are embeddings too; empty if there are none."""
    if not found.tied:
        return ""
    shares = {name: found.selected[name] / max(found.parameters, 1) for name in found.tied}
    listed = [f"{name!r} ({shares[name]:.1%} of the parameters) is the embedding {other!r} too" for name, other in found.tied.items()]
    excluded = [*(patterns or ()), *("!" + name for name in list(found.tied)[:LISTED])]
    return (
        f"{who} embeddings that are tied to another layer, through that layer: {', '.join(listed[:LISTED])}. Exclude them with "
        f"select={excluded}"
    )


def frozen_message(found: Coverage, who: str, patterns: Sequence[str] | None = None) -> str:
    """Write that more weights are frozen than selected, so that the zeros say little of the whole; empty otherwise."""
    if found.frozen <= sum(found.selected.values()):
        return ""
    count, frozen = len(found.selected), found.frozen / found.parameters
    general = is_general(patterns)
    asked = "are matrices" if general else f"are matrices which select={list(patterns or ())} matches, too, but"
    text = (
        f"{who} {count} weight matri{'x' if count == 1 else 'ces'}, {found.share:.1%} of the module's parameters; {frozen:.1%} "
        f"{asked} that are frozen and do not change, which sparsity/total does not count"
    )
    if found.adapters:
        text += (
            f". {found.adapters[0]!r} and others are adapters: when merged, their product is added to a frozen weight, and their zeros are "
            "lost. For a sparse model merge the adapters first and train the merged weights"
        )
    remedy = "name the weights to make sparse with select=[...]" if general else "give patterns that match no frozen matrix"
    return f"{text}. To accept that, {remedy}"


def frozen_note(found: Coverage, who: str) -> str:
    """Write that some weights, fewer than are selected, are frozen; empty if none are."""
    if not 0 < found.frozen <= sum(found.selected.values()):
        return ""
    return (
        f"{who} {found.share:.1%} of the module's parameters; {found.frozen / found.parameters:.1%} are matrices that are frozen "
        "now (requires_grad=False); sparsity/total does not count them unless they are trained later"
    )


def is_asked(name: str, patterns: Sequence[str] | None) -> bool:
    """Return True if ``patterns`` would select a matrix of this name if it were trainable."""
    given = [*(patterns or ())]
    included, excluded = [p for p in given if not p.startswith("!")], [p[1:] for p in given if p.startswith("!")]
    return (not included or any(fnmatchcase(name, p) for p in included)) and not any(fnmatchcase(name, p) for p in excluded)


def is_general(patterns: Sequence[str] | None) -> bool:
    """Return True if everything is selected except exclusions, so that no part of the module is named."""
    return all(pattern == "*" or pattern.startswith("!") for pattern in patterns or ())
