"""Determine the role of a parameter: matrix of a layer not torch's own, embedding, norm, bias, or table of positions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from lightning_sparse import _unfit, elementwise

_LISTS = (nn.ParameterList, nn.ParameterDict)
_EMBEDDING_WORDS = frozenset({"emb", "embs", "embed", "embeds", "pos", "position", "positions", "positional", "token", "tokens", "cls"})


def embeddings(module: nn.Module) -> dict[int, str]:
    """Return the full name of each embedding's matrix, by the matrix's id."""
    parts = ((prefix, part) for prefix, part in module.named_modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag)))
    return {id(part.weight): f"{prefix}.weight".lstrip(".") for prefix, part in parts}


def own_matrices(module: nn.Module, layers: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield the matrices outside of ``layers``, frozen ones too, each once: (full name, layer that holds it, parameter).

    A matrix has two dimensions of more than one element, so (1, 1, D) is a vector. Embeddings (also those recognised by the name
    of the class or the parameter, such as ``pos_embed`` or ``cls_token``), norms, biases, and the parameters that a weight is
    computed from are left out.
    """
    parts = dict(module.named_modules())
    seen = {*embeddings(module), *(id(p) for part in parts.values() if isinstance(part, layers) for p in part.parameters(recurse=False))}
    for path, part in parts.items():
        above, _, last = path.rpartition(".")
        listed = isinstance(part, _LISTS) and bool(path)  # then the list's own name and the module above show its role
        for attribute, parameter in part.named_parameters(recurse=False):
            holder, known_as = (parts[above], f"{last}.{attribute}") if listed else (part, attribute)
            other = is_other(holder) or _names_other(known_as) or _is_source(part, attribute)
            if id(parameter) not in seen and _is_matrix(parameter) and not other:
                seen.add(id(parameter))
                yield f"{path}.{attribute}".lstrip("."), holder, parameter


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Return True for more than one row and more than one column, or a shape that is not known yet."""
    if isinstance(parameter, nn.UninitializedParameter):
        return True
    return parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) >= 2


def is_trained(module: nn.Module) -> bool:
    """Return True if, in any norm, the biases (without biases: the weights) are not all equal, as they are before training.

    Frozen norms, as those of a teacher in the module, and networks without norms count as not trained. Weights that are split over
    processes are gathered.
    """
    for part in module.modules():
        if "norm" in type(part).__name__.lower():
            own = dict(part.named_parameters(recurse=False))
            if any(isinstance(parameter, nn.UninitializedParameter) for parameter in own.values()):
                continue
            shown = own.get("bias", own.get("weight"))
            shapes = {parameter.shape for parameter in own.values()}  # more than one in a linear layer of a normalised weight
            if shown is None or not shown.requires_grad or len(shapes) > 1 or ("bias" not in own and shown.dim() > 1):
                continue
            values = elementwise.full_tensor(shown.detach())
            if values.numel() and bool((values != values.flatten()[0]).any()):
                return True
    return False


def is_other(layer: nn.Module) -> bool:
    """Return True for an embedding or a norm, by the name of its class."""
    kind = type(layer).__name__.lower()
    return "norm" in kind or "embed" in kind


def _names_other(attribute: str) -> bool:
    """Return True for a bias, an embedding or a table of positions or tokens, by a parameter's own name."""
    words = {*re.split(r"[^a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", attribute).lower())}
    return "bias" in attribute.lower() or "embed" in attribute.lower() or not words.isdisjoint(_EMBEDDING_WORDS)


def _is_source(part: nn.Module, attribute: str) -> bool:
    """Return True if a weight is computed from it, by a parametrisation or by the hook of an older function of that kind."""
    return isinstance(part, nn.utils.parametrize.ParametrizationList) or _unfit.stem_of(part, attribute) != attribute
