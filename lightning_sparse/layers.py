"""Find the layers of a module that hooks can observe, and run extra passes without side effects."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lightning_sparse.select import owners

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_compiled(module: nn.Module) -> bool:
    """Return True for torch.compile(module), module.compile(), or a LightningModule that was given to the Trainer compiled."""
    marks = ("_compiled_call_impl", "_compiler_ctx")
    return type(module).__name__ == "OptimizedModule" or any(getattr(module, mark, None) is not None for mark in marks)


def uncompiled(module: nn.Module) -> list[nn.Module]:
    """Return the parts of ``module`` that are neither compiled nor inside a compiled part."""
    compiled = {id(part) for root in module.modules() if _is_compiled(root) for part in root.modules()}
    return [part for part in module.modules() if id(part) not in compiled]


def layers(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """Return the Linear or ConvNd layer of each selected ``weight`` whose forward is really called, by parameter name.

    Weights with several owners, subclasses such as attention's output projection (whose forward is bypassed), and compiled layers
    are left out, because one layer's input and output do not show all uses of the weight, or because hooks would break the
    compiled graph at every layer.
    """
    open_to_hooks = {id(part) for part in uncompiled(module)}
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, list[nn.Module]] = {}
    for _, owner, attribute, parameter in owners(module):
        if id(parameter) in names:
            known = type(owner) in LAYERS and attribute == "weight" and id(owner) in open_to_hooks
            found.setdefault(names[id(parameter)], []).extend([owner] if known else [owner, owner])
    return {name: hits[0] for name, hits in found.items() if len(hits) == 1}


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, silence ``log`` and ``log_dict`` and keep metrics, for extra passes through a module's step."""
    training = [part for part in module.modules() if part.training]
    metrics = [(part, copy.deepcopy(part.__dict__)) for part in module.modules() if hasattr(part, "metric_state")]
    module.eval()
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
        for metric, state in metrics:
            metric.__dict__.clear()
            metric.__dict__.update(state)
        for part in training:
            part.training = True
