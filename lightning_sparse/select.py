"""Select the parameters to make sparse, by glob patterns on parameter names or by default."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_sparse import _checks, _roles, _unfit

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OWNERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_PRUNED = ("Unstructured", "Structured", "FromMask", "PruningContainer")  # in the names of the methods of torch.nn.utils.prune


def owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield every (full name, owning module, attribute, parameter); a shared parameter appears once for each owner."""
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            yield (f"{prefix}.{attribute}" if prefix else attribute), owner, attribute, parameter


def default_selection(module: nn.Module, trainable: bool = True) -> dict[str, nn.Parameter]:
    """Return the floating, trainable matrices of linear, convolution, attention and recurrent layers.

    Embeddings, norms, biases, the parameters that a weight is computed from (see :func:`left_out`) and the matrices of other
    layers (see :func:`skipped_matrices`) are not selected. A parameter with several names is listed once, under the first of them.
    """
    return _once({name: parameter for name, parameter in _weights(module).items() if _fits(parameter, trainable)})


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return every weight matrix of the layers that are selected by default, also those that cannot be made sparse."""
    plain = ((name, p) for name, owner, attribute, p in owners(module) if isinstance(owner, OWNERS) and _is_weight(owner, attribute))
    return {name: parameter for name, parameter in plain if _unfit.is_matrix(parameter)}


def _is_weight(owner: nn.Module, attribute: str) -> bool:
    return "bias" not in attribute and _unfit.stem_of(owner, attribute) == attribute


def _fits(parameter: nn.Parameter, trainable: bool) -> bool:
    return not _unfit.obstacle(parameter) and (parameter.requires_grad or not trainable)


def select(module: nn.Module, patterns: Sequence[str] | None = None, trainable: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters to make sparse, by full name.

    ``None`` is :func:`default_selection`. A pattern with a wildcard (``*``, ``?``, ``[``) selects from that set and from the
    matrices of other layers (:func:`skipped_matrices`); a plain name selects any floating, trainable parameter. A leading ``!``
    excludes; with exclusions alone the rest of the default is kept. A pattern that is the full name of a parameter selects
    only that one, whatever characters the name has. ``trainable=False`` includes frozen parameters.

    Raises ValueError, listing the closest names, for a pattern that matches nothing and for an empty selection; and, saying how to
    exclude it, for a weight that is complex, quantised, lazy without a shape, or given sparse gradients.
    """
    return _Selection(module, trainable).pick(list(patterns or ()))


def countable(module: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Return the names of the weights whose zeros can be counted: as :func:`select`, with frozen and computed weights."""
    return list(_Selection(module, trainable=False, counting=True).pick(list(patterns or ())))


def left_out(module: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, str]:
    """Return the weights that ``patterns`` match but that are not parameters, each with the reason why it is left out."""
    included, excluded = _split(patterns or ())
    kinds = {type(part) for part in module.modules() if not _roles.is_other(part)}
    computed = _unfit.computed(module, (*OWNERS, *kinds), trainable=True)
    known = {*computed, *(name for name, *_ in owners(module))}
    asked = {name for pattern in included or ["*"] for name in _matching(pattern, computed, known)}
    spared = {name for pattern in excluded for name in _matching(pattern, computed, known)}
    return {name: weight.reason for name, weight in computed.items() if name in asked - spared}


def skipped_matrices(module: nn.Module, patterns: Sequence[str] | None = None, trainable: bool = True) -> dict[str, nn.Parameter]:
    """Return the matrices that the default selection skips because their layers are not torch's own, by full name.

    These are floating parameters of two or more dimensions that are not embeddings, norms or biases, such as those of the Conv1D in
    GPT-2 or of 3-D experts. ``patterns`` removes those that it excludes; if it includes any, nothing is skipped. Wildcards in
    :func:`select` match these matrices. ``trainable`` leaves out frozen ones.
    """
    included, excluded = _split(patterns or ())
    if included:
        return {}
    own, known = _own(module, trainable), {name for name, *_ in owners(module)}
    spared = {name for pattern in excluded for name in _matching(pattern, known, known)}
    return {name: parameter for name, parameter in own.items() if name not in spared}


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return every matrix that patterns may match, also frozen, packed and complex ones."""
    return _weights(module) | {name: parameter for name, _, parameter in _roles.own_matrices(module, OWNERS)}


def _own(module: nn.Module, trainable: bool) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, _, parameter in _roles.own_matrices(module, OWNERS)}
    lazy = nn.UninitializedParameter
    return {name: p for name, p in found.items() if (p.requires_grad or not trainable) and (isinstance(p, lazy) or not _unfit.obstacle(p))}


class _Selection:
    """Applies patterns to a module; knows which weights are selectable, refused or computed."""

    def __init__(self, module: nn.Module, trainable: bool, counting: bool = False) -> None:
        self.module, self.trainable, self.counting = module, trainable, counting
        self.every = {name: parameter for name, _, _, parameter in owners(module)}
        self.computed = _unfit.computed(module, OWNERS, trainable)
        self.sparse = _unfit.sparse_gradients(module)
        self.default = default_selection(module, trainable)
        self.reasons = {name: reason for name, parameter in self.every.items() if (reason := self._reason(parameter))}
        known = _weights(module)
        self.default |= {name: known[name] for name in self.reasons if name in known}
        if counting:
            self.default |= {name: weight.matrix for name, weight in self.computed.items()}
        else:
            self._add_packed()
        self.own = _own(module, trainable)
        self.reach = self.default | self.own  # weights that a wildcard may match
        self.all_computed = _unfit.computed(module, OWNERS, trainable=False)
        self.known = {*self.every, *self.reach, *self.all_computed}

    def _reason(self, parameter: nn.Parameter) -> str:
        """Explain why a parameter must not be selected; a frozen one without other problems is skipped instead."""
        lazy = isinstance(parameter, nn.UninitializedParameter)
        if not lazy and (self.counting or (parameter.is_complex() and not parameter.requires_grad)):
            return ""
        return _unfit.obstacle(parameter) or self.sparse.get(id(parameter), "")

    def _add_packed(self) -> None:
        packed = _unfit.packed(self.module)
        self.reasons |= packed
        self.default |= {name: nn.Parameter(torch.empty(0), requires_grad=False) for name in packed}

    def pick(self, patterns: list[str]) -> dict[str, nn.Parameter]:
        if not self.default and not patterns:
            if self.trainable and (frozen := default_selection(self.module, trainable=False)):
                raise ValueError(
                    f"{type(self.module).__name__} has no selectable weight: all {len(frozen)} weight matrices of its layers are frozen "
                    f"(requires_grad=False), such as {next(iter(frozen))!r}; unfreeze those to make sparse before the fit, with "
                    "requires_grad_(True)"
                )
            if self.computed and not self.own:
                pruned = any(word in one.reason for one in self.computed.values() for word in _PRUNED)
                cure = (
                    ". Lightning's ModelPruning does that in this Trainer if it is among the callbacks: keep one of the two"
                    if pruned
                    else ""
                )
                raise ValueError(
                    f"{type(self.module).__name__} has no selectable weight: its matrices are computed from other tensors"
                    f"{self._computed_hint()}{cure}"
                )
            raise ValueError(
                f"{type(self.module).__name__} has no selectable weight: none of its layers is linear, convolutional, attention "
                f"or recurrent with trainable floating weights; {self._remedy()}"
            )
        included, excluded = _split(patterns)
        chosen = dict(self.default) if not included else {}
        for pattern in included:
            chosen |= self._match(pattern)
        for pattern in excluded:
            chosen = self._exclude(pattern, chosen)
        self._check(chosen)
        if not chosen:
            raise ValueError(f"select={patterns} leaves no parameter; selectable: {sorted(self.reach)}")
        return _once(chosen)

    def _computed_hint(self) -> str:
        return "".join(f" ({name!r} {weight.reason})" for name, weight in list(self.computed.items())[:1])

    def _remedy(self) -> str:
        if self.own:
            return f"other layers have the matrices {list(self.own)[:5]}{_checks.more(self.own)}: select=['*'] selects them"
        return "name parameters with select=[...]"

    def _match(self, pattern: str) -> dict[str, nn.Parameter]:
        if pattern in self.known or not _is_wild(pattern):
            return {pattern: self._named(pattern)}
        hits = {name: parameter for name, parameter in self.reach.items() if fnmatchcase(name, pattern)}
        if not hits:
            kind = "; patterns are globs such as 'blocks.*', not regular expressions" if "\\" in pattern else ""
            raise ValueError(f"select pattern {pattern!r} matches no selectable parameter{kind}{self._why_none(pattern)}")
        return hits

    def _why_none(self, pattern: str) -> str:
        """Explain what a pattern matches that it cannot select, and what to write instead."""
        others = [name for name in self.every if fnmatchcase(name, pattern)]
        named = [name for name in others if not self._obstacle(name)]
        if named:
            listed = f"{named[:5]}{_checks.more(named)}"
            return f"; it matches only {listed}, which are not selected by default: name them in full{_hint(pattern, self.reach)}"
        if others:
            listed = f"{others[:5]}{_checks.more(others)}"
            return f"; it matches only {listed}, of which {others[0]!r} {self._obstacle(others[0])}{_hint(pattern, self.reach)}"
        literal = pattern.replace("[", "[[]")
        if any(fnmatchcase(name, literal) for name in self.reach):
            return f"; a [ begins a set of characters in a pattern: write {literal!r}"
        return self._as_module(pattern) or _hint(pattern, self.reach)

    def _as_module(self, pattern: str, sign: str = "") -> str:
        """Explain how to name the weights of the modules that a pattern matches by their own names; empty if it matches none."""
        kinds = {type(part).__name__ for name, part in self.module.named_modules() if name and fnmatchcase(name, pattern)}
        if not kinds:
            return ""
        what, inside = f"; it names a module ({', '.join(sorted(kinds)[:3])})", f"{pattern}.*"
        if weights := [name for name in (self.every if sign else self.reach) if fnmatchcase(name, inside)]:
            return f"{what}: for its weights {weights[:5]}{_checks.more(weights)} write {sign + inside!r}"
        return what + (self._why_none(inside) if any(fnmatchcase(name, inside) for name in self.every) else " without parameters")

    def _obstacle(self, name: str) -> str:
        """Explain why a parameter cannot be selected by its full name either; empty if it can."""
        if reason := self.reasons.get(name, ""):
            return reason
        for weight, (reason, sources, _) in self.all_computed.items():
            if name in sources and not self.counting:
                return f"is not a weight itself: {weight!r} {reason}"
        if not self.every[name].is_floating_point():
            return f"is {self.every[name].dtype}: only floating parameters can become sparse"
        if not self.every[name].requires_grad and self.trainable:
            return "is frozen: only trained parameters can become sparse, so unfreeze it before the fit with requires_grad_(True)"
        return ""

    def _named(self, name: str) -> nn.Parameter:
        if name in self.default:
            return self.default[name]
        if not self.counting:
            self._check_computed(name)
        if name not in self.every:
            hint = self._as_module(name) or _checks.closest(name, self.reach) or _hint(name, self.every)
            raise ValueError(f"select name {name!r} is not a parameter of {type(self.module).__name__}{hint}")
        parameter = self.every[name]
        if name not in self.reasons and not _fits(parameter, self.trainable):
            cure = "" if parameter.requires_grad else ": unfreeze it before the fit with requires_grad_(True)"
            raise ValueError(
                f"select name {name!r} is {parameter.dtype} with requires_grad={parameter.requires_grad}; it must be trained{cure}"
            )
        return parameter

    def _check_computed(self, name: str) -> None:
        for weight, (reason, sources, _) in self.all_computed.items():
            if name in (weight, *sources):
                raise ValueError(f"select name {name!r} cannot be sparsified: {weight!r} {reason}")

    def _exclude(self, pattern: str, chosen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Remove what the pattern matches; a shared parameter is removed by any of its names."""
        hits = _matching(pattern, self.known, self.known)
        if not hits:
            hint = self._as_module(pattern, "!") or _hint(pattern, chosen or self.reach)
            raise ValueError(f"select exclusion {'!' + pattern!r} matches nothing{hint}")
        out = {id(self.every[name]) for name in hits if name in self.every}
        return {name: parameter for name, parameter in chosen.items() if name not in hits and id(parameter) not in out}

    def _check(self, chosen: Iterable[str]) -> None:
        odd = [name for name in chosen if name in self.reasons]
        if odd:
            more = f" ({_checks.counted(len(odd) - 1, 'more weight is', 'more weights are')} refused)" if len(odd) > 1 else ""
            raise ValueError(f"{odd[0]!r} {self.reasons[odd[0]]}; or exclude it with select={['!' + name for name in odd[:5]]}{more}")


def _split(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split patterns into those to include, and those to exclude without their ``!``."""
    return [p for p in patterns if not p.startswith("!")], [p[1:] for p in patterns if p.startswith("!")]


def _is_wild(pattern: str) -> bool:
    return any(wildcard in pattern for wildcard in "*?[")


def _matching(pattern: str, names: Iterable[str], known: Container[str]) -> list[str]:
    """Return the ``names`` that a pattern selects: the name that it equals if that is ``known``, else those that it matches."""
    if pattern in known:
        return [name for name in names if name == pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def _hint(pattern: str, names: dict[str, nn.Parameter]) -> str:
    return _checks.closest(pattern, names) or f"; selectable: {sorted(names)[:8]}{_checks.more(names, 8)}"


def _once(chosen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Drop later names of a parameter that was already picked under another name."""
    first = {id(parameter): name for name, parameter in reversed(chosen.items())}
    return {name: parameter for name, parameter in chosen.items() if first[id(parameter)] == name}
