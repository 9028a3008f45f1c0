"""Which parameters are sparsified: glob patterns on parameter names, or the default set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_sparse import _checks, _unfit

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OWNERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every (full name, owning module, attribute, parameter); a shared parameter appears once for each owner."""
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            yield (f"{prefix}.{attribute}" if prefix else attribute), owner, attribute, parameter


def default_selection(module: nn.Module, trainable: bool = True) -> dict[str, nn.Parameter]:
    """Floating, trainable parameters of two or more dimensions owned by linear, convolution, attention or recurrent layers.

    Not embeddings, norms or biases, nor what a weight is computed from (see :func:`left_out`). A parameter with several
    names is listed once, under the first of them.
    """
    return _once({name: parameter for name, parameter in _weights(module).items() if _fits(parameter, trainable)})


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight matrix of the layers that are selected by default, whether it can be sparsified or not."""
    plain = ((name, p) for name, owner, attribute, p in owners(module) if isinstance(owner, OWNERS) and _is_weight(owner, attribute))
    return {name: parameter for name, parameter in plain if _unfit.is_matrix(parameter)}


def _is_weight(owner: nn.Module, attribute: str) -> bool:
    return "bias" not in attribute and _unfit.stem_of(owner, attribute) == attribute


def _fits(parameter: nn.Parameter, trainable: bool) -> bool:
    return not _unfit.obstacle(parameter) and (parameter.requires_grad or not trainable)


def select(module: nn.Module, patterns: Sequence[str] | None = None, trainable: bool = True) -> dict[str, nn.Parameter]:
    """The parameters to sparsify, by full name.

    ``None`` is :func:`default_selection`. A pattern with a wildcard (``*``, ``?``, ``[``) picks from that set; a plain
    name picks any floating, trainable parameter. A leading ``!`` excludes; with exclusions alone the rest is kept.
    ``trainable=False`` lets frozen parameters in.

    Raises ValueError, listing the closest names, for a pattern that matches nothing and for an empty selection; and where
    a weight is picked that is complex, quantised, lazy without a shape, or given sparse gradients, saying how to exclude it.
    """
    return _Selection(module, trainable).pick(list(patterns or ()))


def countable(module: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """The names of the weights whose zeros can be counted: as :func:`select`, frozen and computed weights included."""
    return list(_Selection(module, trainable=False, counting=True).pick(list(patterns or ())))


def left_out(module: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, str]:
    """Weights that ``patterns`` ask for but that are no parameters: each name with the reason why it is left out."""
    included, excluded = _split(patterns or ())
    computed = _unfit.computed(module, OWNERS, trainable=True)
    asked = {name for name in computed if _any_match(name, included or ["*"]) and not _any_match(name, excluded)}
    return {name: weight.reason for name, weight in computed.items() if name in asked}


class _Selection:
    """What of a module can be picked by default, what is refused with which reason, and what is computed."""

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

    def _reason(self, parameter: nn.Parameter) -> str:
        """Why a parameter must not be picked; a frozen one that nothing else is wrong with is passed over instead."""
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
            raise ValueError(
                f"{type(self.module).__name__} has no selectable weight: none of its layers is linear, convolutional, attention "
                f"or recurrent with trainable floating weights{self._aside()}; name parameters with select=[...]"
            )
        included, excluded = _split(patterns)
        chosen = dict(self.default) if not included else {}
        for pattern in included:
            chosen |= self._match(pattern)
        for pattern in excluded:
            chosen = self._exclude(pattern, chosen)
        self._check(chosen)
        if not chosen:
            raise ValueError(f"select={patterns} leaves no parameter; selectable: {sorted(self.default)}")
        return _once(chosen)

    def _aside(self) -> str:
        return "".join(f" ({name!r} {weight.reason})" for name, weight in list(self.computed.items())[:1])

    def _match(self, pattern: str) -> dict[str, nn.Parameter]:
        if not any(wildcard in pattern for wildcard in "*?["):
            return {pattern: self._named(pattern)}
        hits = {name: parameter for name, parameter in self.default.items() if fnmatchcase(name, pattern)}
        if not hits:
            others = [name for name in self.every if fnmatchcase(name, pattern)]
            aside = f"; it matches only {others[:5]}, which are not selected by default: name them in full" if others else ""
            raise ValueError(f"select pattern {pattern!r} matches no selectable parameter{aside}{_hint(pattern, self.default)}")
        return hits

    def _named(self, name: str) -> nn.Parameter:
        if name in self.default:
            return self.default[name]
        if not self.counting:
            self._check_computed(name)
        if name not in self.every:
            raise ValueError(f"select name {name!r} is no parameter of {type(self.module).__name__}{_hint(name, self.every)}")
        parameter = self.every[name]
        if name not in self.reasons and not _fits(parameter, self.trainable):
            raise ValueError(f"select name {name!r} is {parameter.dtype} with requires_grad={parameter.requires_grad}; it must be trained")
        return parameter

    def _check_computed(self, name: str) -> None:
        for weight, (reason, sources, _) in _unfit.computed(self.module, OWNERS, trainable=False).items():
            if name in (weight, *sources):
                raise ValueError(f"select name {name!r} cannot be sparsified: {weight!r} {reason}")

    def _exclude(self, pattern: str, chosen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        kept = {name: parameter for name, parameter in chosen.items() if not fnmatchcase(name, pattern)}
        if len(kept) == len(chosen) and not any(fnmatchcase(name, pattern) for name in self.computed):
            raise ValueError(f"select exclusion {'!' + pattern!r} matches nothing{_hint(pattern, chosen or self.default)}")
        return kept

    def _check(self, chosen: Iterable[str]) -> None:
        odd = [name for name in chosen if name in self.reasons]
        if odd:
            more = f" ({len(odd) - 1} more weights are refused)" if len(odd) > 1 else ""
            raise ValueError(f"{odd[0]!r} {self.reasons[odd[0]]}; or leave it out with select={['!' + name for name in odd[:5]]}{more}")


def _split(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """What to include, and what to exclude without its ``!``."""
    return [p for p in patterns if not p.startswith("!")], [p[1:] for p in patterns if p.startswith("!")]


def _any_match(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _hint(pattern: str, names: dict[str, nn.Parameter]) -> str:
    return _checks.closest(pattern, names) or f"; selectable: {sorted(names)[:8]}"


def _once(chosen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Drop later names of a parameter that was already picked under another name."""
    first = {id(parameter): name for name, parameter in reversed(chosen.items())}
    return {name: parameter for name, parameter in chosen.items() if first[id(parameter)] == name}
