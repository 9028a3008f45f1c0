"""Which parameters are sparsified: glob patterns on parameter names, or the default set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_sparse import _checks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OWNERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every (full name, owning module, attribute, parameter); a shared parameter appears once for each owner."""
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            yield (f"{prefix}.{attribute}" if prefix else attribute), owner, attribute, parameter


def default_selection(module: nn.Module, trainable: bool = True) -> dict[str, nn.Parameter]:
    """Floating, trainable parameters of two or more dimensions owned by linear, convolution, attention or recurrent layers.

    Not embeddings, norms or biases. A parameter with several names is listed once, under the first of them.
    """
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, owner, attribute, parameter in owners(module):
        fits = isinstance(owner, OWNERS) and "bias" not in attribute and _fits(parameter, trainable) and parameter.dim() >= 2
        if fits and id(parameter) not in seen:
            seen.add(id(parameter))
            chosen[name] = parameter
    return chosen


def _fits(parameter: nn.Parameter, trainable: bool) -> bool:
    return parameter.is_floating_point() and (parameter.requires_grad or not trainable)


def select(module: nn.Module, patterns: Sequence[str] | None = None, trainable: bool = True) -> dict[str, nn.Parameter]:
    """The parameters to sparsify, by full name.

    ``None`` is :func:`default_selection`. A pattern with a wildcard (``*``, ``?``, ``[``) picks from that set; a plain
    name picks any floating, trainable parameter. A leading ``!`` excludes; with exclusions alone the rest is kept.
    ``trainable=False`` lets frozen parameters in, for counting.

    Raises ValueError, listing the closest names, for a pattern that matches nothing and for an empty selection.
    """
    default = default_selection(module, trainable)
    if not default and not patterns:
        raise ValueError(
            f"{type(module).__name__} has no selectable weight: none of its layers is linear, convolutional, attention or "
            "recurrent with trainable floating weights; name parameters with select=[...]"
        )
    if patterns is None:
        return default
    included = [pattern for pattern in patterns if not pattern.startswith("!")]
    chosen = dict(default) if not included else {}
    for pattern in included:
        chosen |= _match(pattern, default, module, trainable)
    for pattern in (pattern[1:] for pattern in patterns if pattern.startswith("!")):
        chosen = _exclude(pattern, chosen, default)
    if not chosen:
        raise ValueError(f"select={list(patterns)} leaves no parameter; selectable: {sorted(default)}")
    return _once(chosen)


def _match(pattern: str, default: dict[str, nn.Parameter], module: nn.Module, trainable: bool) -> dict[str, nn.Parameter]:
    if not any(wildcard in pattern for wildcard in "*?["):
        return {pattern: _named(pattern, module, trainable)}
    hits = {name: parameter for name, parameter in default.items() if fnmatchcase(name, pattern)}
    if not hits:
        others = [name for name, *_ in owners(module) if fnmatchcase(name, pattern)]
        aside = f"; it matches only {others[:5]}, which are not selected by default: name them in full" if others else ""
        raise ValueError(f"select pattern {pattern!r} matches no selectable parameter{aside}{_hint(pattern, default)}")
    return hits


def _named(name: str, module: nn.Module, trainable: bool) -> nn.Parameter:
    known = {full: parameter for full, _, _, parameter in owners(module)}
    if name not in known:
        raise ValueError(f"select name {name!r} is no parameter of {type(module).__name__}{_hint(name, known)}")
    parameter = known[name]
    if parameter.is_complex():
        raise ValueError(f"select name {name!r} is complex; only real floating parameters can be sparsified")
    if not _fits(parameter, trainable):
        raise ValueError(f"select name {name!r} is {parameter.dtype} with requires_grad={parameter.requires_grad}; it must be trained")
    return parameter


def _exclude(pattern: str, chosen: dict[str, nn.Parameter], default: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    kept = {name: parameter for name, parameter in chosen.items() if not fnmatchcase(name, pattern)}
    if len(kept) == len(chosen):
        raise ValueError(f"select exclusion {'!' + pattern!r} matches nothing{_hint(pattern, chosen or default)}")
    return kept


def _hint(pattern: str, names: dict[str, nn.Parameter]) -> str:
    return _checks.closest(pattern, names) or f"; selectable: {sorted(names)[:8]}"


def _once(chosen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Drop later names of a parameter that was already picked under another name."""
    first = {id(parameter): name for name, parameter in reversed(chosen.items())}
    return {name: parameter for name, parameter in chosen.items() if first[id(parameter)] == name}
