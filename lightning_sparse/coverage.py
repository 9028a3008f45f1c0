"""What share of a module a selection covers, what it passes over, and what its zeros do not say; in sentences for a warning."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from lightning_sparse import _roles
from lightning_sparse.select import OWNERS, matrices, passed_over

SMALL = 0.01  # a share of the matrices that moves sparsity/total by less than one per cent
LISTED = 5


class Coverage(NamedTuple):
    """Sizes are numbers of elements; a parameter with several names counts once, one without a shape yet as 0."""

    selected: dict[str, int]
    parameters: int  # of the module
    frozen: int  # in matrices
    passed: dict[str, tuple[str, int]]  # matrices of other layers that the default leaves out: their layer's class and size
    tied: dict[str, str]  # selected matrices that are an embedding's as well, and the name that they have there
    adapters: list[str]  # selected matrices that are added to a frozen one

    @property
    def share(self) -> float:
        return sum(self.selected.values()) / max(self.parameters, 1)

    @property
    def passed_share(self) -> float:
        return sum(size for _, size in self.passed.values()) / max(self.parameters, 1)

    @property
    def is_partial(self) -> bool:
        """What is passed over changes the share of zeros."""
        sizes = [size for _, size in self.passed.values()]
        return bool(sizes) and (min(sizes) == 0 or sum(sizes) >= SMALL * (sum(sizes) + sum(self.selected.values())))


def measure(
    module: nn.Module, chosen: Mapping[str, Tensor], patterns: Sequence[str] | None = None, beside: Iterable[nn.Parameter] = ()
) -> Coverage:
    """The :class:`Coverage` of ``chosen``, which ``patterns`` selected; ``beside``: parameters that others select."""
    taken = {id(parameter) for parameter in (*chosen.values(), *beside)}
    own = {name: holder for name, holder, _ in _roles.own_matrices(module, OWNERS)}
    passed = {name: p for name, p in passed_over(module, patterns).items() if id(p) not in taken}
    frozen = {id(p): p for p in matrices(module).values() if not p.requires_grad}
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
    """Those inside of PEFT's layers, found without importing it."""
    layers = [path for path, part in module.named_modules() if any(base.__name__ == "BaseTunerLayer" for base in type(part).__mro__)]
    return [name for name in names if any(name.startswith(f"{path}.") for path in layers)]


def says_of_passed(found: Coverage, who: str, patterns: Sequence[str] | None, names: Collection[str]) -> str:
    """``who`` ("ReweightedPenalty selects") leaves which matrices out, and both ways to say what is meant; empty where none is."""
    if not found.passed:
        return ""
    groups = grouped({name: kind for name, (kind, _) in found.passed.items()}, names)
    shown = [f"{pattern!r} ({kind}{f', {count} matrices' if count > 1 else ''})" for pattern, (kind, count) in groups.items()]
    more = f" and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
    total, patterns = len(found.selected) + len(found.passed), list(patterns or ())
    return (
        f"{who} {len(found.selected)} of {total} weight matrices, {found.share:.1%} of the parameters: by default not those of layers "
        f"other than torch's own, here {', '.join(shown[:LISTED])}{more} with {found.passed_share:.1%} of the parameters, which "
        f"sparsity/total does not count. Add them with select={['*', *patterns]}, or leave them out without this message with "
        f"select={[*patterns, *('!' + pattern for pattern in list(groups)[:LISTED])]}"
    )


def grouped(kinds: Mapping[str, str], names: Collection[str]) -> dict[str, tuple[str, int]]:
    """Patterns for names that differ in numbers alone (``h.*.attn.weight``), each with its kind and count.

    A pattern that would match another of ``names`` is not made: its members then stand one by one.
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


def says_of_tied(found: Coverage, who: str, patterns: Sequence[str] | None) -> str:
    """Selected matrices that are embeddings too; empty where none is."""
    if not found.tied:
        return ""
    shares = {name: found.selected[name] / max(found.parameters, 1) for name in found.tied}
    listed = [f"{name!r} ({shares[name]:.1%} of the parameters) is the embedding {other!r} too" for name, other in found.tied.items()]
    spared = [*(patterns or ()), *("!" + name for name in list(found.tied)[:LISTED])]
    return (
        f"{who} embeddings that are tied to another layer, through that layer: {', '.join(listed[:LISTED])}. Leave them out with "
        f"select={spared}"
    )


def says_of_frozen(found: Coverage, who: str) -> str:
    """More weights are frozen than selected: the zeros say little of the whole; empty where it is otherwise."""
    if found.frozen <= sum(found.selected.values()):
        return ""
    count, frozen = len(found.selected), found.frozen / found.parameters
    text = (
        f"{who} {count} weight matri{'x' if count == 1 else 'ces'}, {found.share:.1%} of the module's parameters; {frozen:.1%} "
        "are matrices that are frozen and stay as they are, which sparsity/total does not count"
    )
    if found.adapters:
        text += (
            f". {found.adapters[0]!r} and others are adapters: merged, their product is added to a frozen weight, and none of their zeros "
            "is left. For a sparse model merge the adapters first and train the merged weights"
        )
    return f"{text}. To accept that, name what is to be sparse with select=[...]"


def is_general(patterns: Sequence[str] | None) -> bool:
    """Everything is meant, but for exclusions: no part of the module is named."""
    return all(pattern == "*" or pattern.startswith("!") for pattern in patterns or ())
