"""Find weights that cannot be made sparse, and explain why they are refused or left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

PACKED = "_packed_params", "_all_weight_values"  # attributes of torch.ao's quantised layers that hold weights


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return True for two or more dimensions, or a shape that is not known yet."""
    return isinstance(parameter, nn.UninitializedParameter) or parameter.dim() >= 2


def obstacle(parameter: nn.Parameter) -> str:
    """Explain why the values of a parameter cannot be set to zero one by one; empty if they can."""
    if isinstance(parameter, nn.UninitializedParameter):
        return "has no shape yet; run a batch through its lazy layer first, for example in the LightningModule's configure_model"
    if parameter.is_complex():
        return "is complex; only real floating parameters can be sparsified"
    if nn.Parameter not in type(parameter).__mro__ and type(parameter).__name__ != "DTensor":
        return f"is a {type(parameter).__name__}; a quantised or otherwise packed tensor has no elements that could become zero"
    if not parameter.is_floating_point():
        return f"is {parameter.dtype}; a quantised weight is not trained: sparsify first, then quantise"
    return ""


def packed(module: nn.Module) -> dict[str, str]:
    """Return the weights of torch's quantised layers, which are not parameters, and why they are refused."""
    found = {}
    for prefix, owner in module.named_modules():
        kind = type(owner)
        quantised = "quantized" in kind.__module__.split(".") and any(hasattr(owner, name) for name in PACKED)
        if quantised and "Embedding" not in kind.__name__ and not kind.__name__.endswith("PackedParams"):
            found[f"{prefix}.weight".lstrip(".")] = f"is packed in a quantised {kind.__name__}; sparsify first, then quantise"
    return found


def sparse_gradients(module: nn.Module) -> dict[int, str]:
    """Return why the weights that get sparse gradients are refused, by id."""
    reason = "gets sparse gradients from an embedding, while penalty and mask act on all of its weights; create it with sparse=False"
    wanted = (part for part in module.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse)
    return {id(part.weight): reason for part in wanted if part.weight.requires_grad}


class Computed(NamedTuple):
    """A weight that is not a parameter: the reason to leave it out, its source parameters, and a matrix among them."""

    reason: str
    sources: tuple[str, ...]
    matrix: nn.Parameter


def computed(module: nn.Module, layers: tuple[type[nn.Module], ...], trainable: bool) -> dict[str, Computed]:
    """Return the weight matrices of ``layers`` that are computed from parameters, under the name that the forward reads.

    They are computed by a parametrisation (weight_norm, spectral_norm, orthogonal, ...) or by the hook of an older function of that
    kind (``torch.nn.utils.weight_norm``, ``spectral_norm``, ``prune``). ``trainable`` leaves out those with frozen sources.
    """
    found = {}
    for prefix, owner in module.named_modules():
        for attribute, parts in {**_parametrised(owner), **_hooked(owner)}.items() if isinstance(owner, layers) else ():
            matrices = [part for part in parts.values() if is_matrix(part) and (part.requires_grad or not trainable)]
            if matrices and "bias" not in attribute:
                sources = tuple(f"{prefix}.{part}".lstrip(".") for part in parts)
                found[f"{prefix}.{attribute}".lstrip(".")] = Computed(_reason(owner, attribute, parts), sources, matrices[0])
    return found


def stem_of(owner: nn.Module, attribute: str) -> str:
    """Return ``weight`` for the ``weight_orig``, ``weight_v`` or ``weight_g`` that a hook computes it from, else ``attribute``."""
    stem = attribute.rpartition("_")[0]
    return stem if isinstance(vars(owner).get(stem), Tensor) else attribute


def _parametrised(owner: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    lists = getattr(owner, "parametrizations", {})
    return {name: dict(part.named_parameters(f"parametrizations.{name}", recurse=False)) for name, part in lists.items()}


def _hooked(owner: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    found: dict[str, dict[str, nn.Parameter]] = {}
    for attribute, parameter in owner.named_parameters(recurse=False):
        stem = stem_of(owner, attribute)
        if stem != attribute:
            found.setdefault(stem, {})[attribute] = parameter
    return found


def _reason(owner: nn.Module, attribute: str, parts: Iterable[str]) -> str:
    lists = getattr(owner, "parametrizations", {})
    makers = [*lists[attribute]] if attribute in lists else [*_hooks_of(owner, attribute)]
    names = " and ".join(type(maker).__name__.lstrip("_") for maker in makers) or "a hook"
    remover = "parametrize.remove_parametrizations" if attribute in lists else "remove_weight_norm, remove_spectral_norm or prune.remove"
    sources = ", ".join(parts)
    return f"is computed by {names} from {sources}, and a penalty on those does not act on it; make it a parameter first with {remover}"


def _hooks_of(owner: nn.Module, attribute: str) -> Iterator[object]:
    for hook in owner._forward_pre_hooks.values():
        if attribute in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            yield hook
