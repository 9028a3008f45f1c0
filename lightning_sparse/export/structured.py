"""2:4 sparsity: at most two non-zero weights in each group of four along a row, the pattern of NVIDIA's sparse tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse.export.conversion import Module, copied, refuse_quantised

_TYPES = (torch.float16, torch.bfloat16)
_SIDES = (32, 64)  # torch's kernels need rows and columns that are multiples of these for 16-bit types


def is_semi_structured(weight: Tensor) -> bool:
    """Return True if a matrix has at most two non-zero weights in each group of four along its rows. Works on every device."""
    return weight.dim() == 2 and weight.shape[1] % 4 == 0 and bool((weight.detach().ne(0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def semi_structured(module: Module) -> Module:
    """Return a copy of the module in eval mode whose Linear layers with a 2:4 pattern use sparse tensor cores.

    The given module is not changed. The copy is for inference: torch's 2:4 tensors are not trained and have no ``state_dict`` in files.

    Raises ValueError if no Linear layer has the pattern (each is named with the reason), if the module is quantised, and if it is not
    on a CUDA device in float16 or bfloat16.
    """
    _checks.module(module, "semi_structured(module)")
    refuse_quantised(module, "semi_structured")
    layers = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    reasons = {name: _unfit(layer.weight) for name, layer in layers.items()}
    fits = [name for name, reason in reasons.items() if not reason]
    if not fits:
        listed = "; ".join(f"{name or 'the module'}: {reason}" for name, reason in list(reasons.items())[:3]) or "there is no nn.Linear"
        raise ValueError(f"no layer has a 2:4 pattern: {listed}")
    weight = layers[fits[0]].weight
    if not weight.is_cuda:
        raise ValueError(
            f"2:4 sparsity needs a CUDA device of compute capability 8.0 or later; this module is on {weight.device}, where "
            f"{len(fits)} of {len(layers)} Linear layers have the pattern. Move it with .cuda(); to_sparse works on a CPU"
        )
    if weight.dtype not in _TYPES:
        raise ValueError(f"2:4 kernels are for float16 and bfloat16, got {weight.dtype}: convert the module with .bfloat16()")
    result = copied(module).eval()
    for name in fits:
        packed = torch.sparse.to_sparse_semi_structured(layers[name].weight.detach())
        result.get_submodule(name).weight = nn.Parameter(packed, requires_grad=False)
    return result


def _unfit(weight: Tensor) -> str:
    rows, columns = weight.shape
    if rows % _SIDES[0] or columns % _SIDES[1]:
        return f"its shape {rows} x {columns} is not a multiple of {_SIDES[0]} x {_SIDES[1]}"
    return "" if is_semi_structured(weight) else "a group of four weights along a row has more than two that are not zero"
