"""Turn the coupled groups of a network into parts: what makes up a group's size, what its mask multiplies, what is zero with it.

====================================  ==========================================  ===============================
a group of                            its size, and what penalty and mask act on   zero with it
====================================  ==========================================  ===============================
channels or neurons with batch norm   batch norm's weights and biases              rows, columns, depthwise filters
channels or neurons without           the rows and biases of what produces it      columns
heads                                 columns of the output projection (masked),   -
                                      rows and biases of queries, keys, values
====================================  ==========================================  ===============================

The size r_g of a group is the root mean square of the d_g weights in the second column, its carriers, and d_g counts these alone: two a
batch norm, not the hundreds that are zero with them. There are two reasons. The row in front of batch norm is scale-free (a mask on it is
undone by the normalisation): its magnitude says nothing of the channel, so it must not be part of r_g. And sum_j w_j^2 = d_g r_g^2 makes
d_g omega(r_g) the penalty whose gradient, prox, eta-trick and mask are the scalar formulas at the same lam; with the number of all weights
that are zero with the group in the place of d_g, each group would need another lam. So lam is the price of a carrier, not of a weight that
is removed; a ``target_sparsity`` counts all weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import Parameter

from lightning_sparse import _checks, coupling, surgery
from lightning_sparse._groups import Group
from lightning_sparse._parts import Part
from lightning_sparse.grouped import Groups
from lightning_sparse.structure import Coupled

Slice = tuple[str, int]  # a parameter and a dimension
_OUTPUT = "it is part of the output"  # the reason that coupling gives; nobody expects to remove these


@dataclass(frozen=True)
class Found:
    """The groups of a network.

    Args:
        groups: their parts.
        parameters: the parameters that have weights in them, by name.
        left_out: why axes were left out, by name.
    """

    groups: Groups
    parameters: dict[str, Parameter]
    left_out: dict[str, str]

    def message(self, structure: Coupled) -> str:
        """Describe what was left out."""
        axes = _checks.counted(len(self.groups.parts), "axis", "axes")
        return (
            f"{structure!r} makes groups zero on {axes} and leaves out {len(self.left_out)} whose groups cannot be "
            f"removed exactly: {coupling.listed(self.left_out)}"
        )


def find(structure: Coupled, module: nn.Module, selected: Iterable[str], example_inputs: Any) -> Found:
    """Return the groups whose producers are among the ``selected`` parameters; raise ValueError if there are none.

    Groups that cannot be removed exactly are left out, with the reason.
    """
    axes: dict[str, list[Group]] = {}
    left_out: dict[str, str] = {}
    chosen, known = set(selected), dict(module.named_parameters())
    elsewhere: set[str] = set()
    outputs, uncut, others = dict[str, str](), dict[str, str](), dict[str, str]()  # what to say if no group is left
    try:
        every = coupling.groups(module, example_inputs)
    except coupling.ForwardBranches as error:
        raise ValueError(
            f"{structure!r} traces the network, but {error.problem}. Write the choice with torch.where, or use Rows(), and afterwards "
            "shrink(module, example_inputs, allow_branches=True) if the path is always the same"
        ) from None
    for group in every:
        if group.kind == "layer":
            uncut[group.axis] = group.reason
        elif (group.kind == "head") != structure.heads:
            elsewhere |= {entry.name for entry in group.parameters()} if group.exact else set()
        elif any(entry.name in chosen for entry in group.parameters("producer", "normaliser")):
            axes.setdefault(group.axis, []).append(group)
        elif group.exact:
            others[group.axis] = (group.parameters("producer") or group.parameters("normaliser"))[0].name
    parts: dict[str, list[Part]] = {}
    along: dict[str, list[Part]] = {}
    for axis, members in axes.items():
        reason = next((group.reason for group in members if group.reason), "") or _obstacle(members, module, known)
        if reason == _OUTPUT:
            outputs[axis] = reason
            continue
        if reason:
            left_out[axis] = reason
        else:
            parts[axis], along[axis] = _parts(members, module, known)
    if not parts:
        why = _why_none(structure, left_out | outputs | uncut, others, bool(elsewhere), _of_torch(module, uncut))
        raise ValueError(f"{structure!r} finds no groups that can be removed exactly in {type(module).__name__}{why}")
    names = {part.name for listed in (parts, along) for of in listed.values() for part in of}
    costs = _multiply_adds(module, example_inputs) if structure.cost == "multiply_adds" else None
    return Found(Groups(parts, along, True, elsewhere, costs), {name: known[name] for name in known if name in names}, left_out)


def _multiply_adds(module: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Return for each weight of a convolution or Linear layer the number of multiply-adds that it takes part in in one call."""
    layers = {f"{name}.weight": part for name, part in module.named_modules() if isinstance(part, (nn.Linear, _ConvNd))}
    found = dict.fromkeys(layers, 0.0)

    def count(name: str, layer: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        at = given[0] if isinstance(layer, _ConvTransposeNd) else out
        found[name] += at.numel() / len(layers[name].weight)  # because each value of a channel is one use of each of its weights

    handles = [layer.register_forward_hook(partial(count, name)) for name, layer in layers.items()]
    try:
        surgery.outputs(module, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _of_torch(module: nn.Module, axes: Iterable[str]) -> dict[str, nn.MultiheadAttention]:
    """Return the attentions of torch among the layers that cannot be cut, by name."""
    layers = dict(module.named_modules())
    return {axis: layer for axis in axes if isinstance(layer := layers.get(axis), nn.MultiheadAttention)}


def _why_none(
    structure: Coupled, reasons: Mapping[str, str], others: Mapping[str, str], elsewhere: bool, fixed: Mapping[str, nn.MultiheadAttention]
) -> str:
    """Return why a network has no groups of a structure, and what to do.

    Args:
        structure: the structure.
        reasons: why layers and axes have none.
        others: axes that are not selected, and a parameter that produces them.
        elsewhere: there are groups of the other structure.
        fixed: attentions whose heads cannot be removed, by name.
    """
    listed = f"; {coupling.listed(reasons)}" if reasons else ""
    if others:
        names = [*others.values()]
        return f"{listed}. None of the selected weights produces groups; these would: {names[:5]}{_checks.more(names)}. Add them to select"
    if structure.heads and any(reason.startswith(coupling.FAILS) for reason in reasons.values()):
        return listed  # with its cure
    if structure.heads and fixed:
        first, names = next(iter(fixed.values())), [f"{name}.out_proj.weight" for name in fixed]
        return (
            f"{listed}. For heads that are zero and stay in the network: structure=Blocks(({first.embed_dim}, {first.head_dim})), a block "
            f"for each head, with select={names[:5]}{_checks.more(names)}"
        )
    if structure.heads and not listed:
        listed = (
            "; it has no attention whose queries, keys and values are Linear layers and whose number of heads is an attribute such as "
            "num_heads"
        )
    other = "Heads()" if not structure.heads else "Channels()"
    return f"{listed}. Use {f'{other}, ' if elsewhere else ''}Rows() or Columns()"


def _roles(members: list[Group], module: nn.Module, *roles: Any) -> dict[Slice, list[tuple[int, ...]]]:
    """Return, for each slice of a role, the indices of each group."""
    found: dict[Slice, list[tuple[int, ...]]] = {}
    for number, group in enumerate(members):
        for entry in group.parameters(*roles):
            rows = found.setdefault((entry.name, entry.dim), [() for _ in members])
            rows[number] = (*rows[number], *entry.indices)
    return found


def _normalises(name: str, module: nn.Module) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), _BatchNorm)


def _obstacle(members: list[Group], module: nn.Module, known: Mapping[str, Parameter]) -> str:
    """Return why a mask on the groups of an axis would do nothing."""
    statistics = {entry.name.rpartition(".")[0] for entry in members[0].entries if entry.role == "statistic"}
    scaled = {name.rpartition(".")[0] for name, _ in _roles(members, module, "normaliser")}
    if bare := sorted(statistics - scaled):
        return f"batch norm {bare[0]!r} has no weight that carries the scale of its channels"
    carriers = _carriers(members, module)
    frozen = [name for name, _ in carriers if not known[name].requires_grad]
    return f"{frozen[0]!r} is not trained" if frozen else "" if carriers else "no parameter carries its scale"


def _carriers(members: list[Group], module: nn.Module) -> dict[Slice, list[tuple[int, ...]]]:
    if members[0].kind == "head":
        return _roles(members, module, "consumer", "producer")
    norms = {key: rows for key, rows in _roles(members, module, "normaliser").items() if _normalises(key[0], module)}
    return norms or _roles(members, module, "producer")


def _parts(members: list[Group], module: nn.Module, known: Mapping[str, Parameter]) -> tuple[list[Part], list[Part]]:
    """Return what makes up the sizes of an axis, and what is zero along with it."""
    carriers, columns = _carriers(members, module), _roles(members, module, "consumer")
    every = _roles(members, module, "producer", "normaliser", "consumer")
    masked = {key for key in carriers if members[0].kind != "head" or key in columns}
    made = {key: _part(*key, rows, known[key[0]], key in masked) for key, rows in every.items()}
    return [made[key] for key in carriers], [part for key, part in made.items() if key not in carriers]


def _part(name: str, dim: int, rows: list[tuple[int, ...]], w: Tensor, is_masked: bool) -> Part:
    index = torch.full((w.shape[dim],), -1, dtype=torch.long)
    for number, places in enumerate(rows):
        index[list(places)] = number
    whole = len(rows) == len(index) and bool((index == torch.arange(len(index))).all())
    here = _Places(w.device, dim, len(rows), None if whole else index)
    return Part(name, here.pool, here.spread, is_masked)


class _Places:
    """The group of each index along a dimension: ``index``, -1 for none; None where index i is group i."""

    def __init__(self, device: torch.device, dim: int, count: int, index: Tensor | None) -> None:
        self.dim, self.count = dim, count
        self.index = None if index is None else index.to(device)
        self.inside = None if index is None else (index >= 0).nonzero().flatten().to(device)

    def pool(self, x: Tensor) -> Tensor:
        sums = x.sum([dim for dim in range(x.dim()) if dim != self.dim]) if x.dim() > 1 else x
        if self.index is None or self.inside is None:
            return sums
        return sums.new_zeros(self.count).index_add_(0, self.index[self.inside].to(sums.device), sums[self.inside])

    def spread(self, value: Tensor, like: Tensor, default: float) -> Tensor:
        if self.index is not None and self.inside is not None:
            whole = torch.full((len(self.index),), default, dtype=value.dtype, device=value.device)
            whole[self.inside] = value[self.index[self.inside]]
            value = whole
        return value.reshape([-1 if dim == self.dim else 1 for dim in range(like.dim())])
