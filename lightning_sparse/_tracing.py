"""Candidate groups from torch-pruning's dependency graph: which slices of which tensors belong to each channel."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_sparse import surgery
from lightning_sparse._groups import Entry, Group
from lightning_sparse._naming import HEADS

_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")  # heads times features of a head, where a module stores it
UNREACHED = "it is not on the traced path"
_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
_Units = list[dict[tuple[str, int, str], set[int]]]  # of each unit {(tensor, dim, role): indices}


def traced(model: nn.Module, inputs: Any, heads: Mapping[str, int]) -> list[list[list[Group]]]:
    """Return the candidates of each axis: whole heads first where an axis looks like attention, then channels.

    ``model`` is a copy in evaluation mode whose parameters require gradients; it is not changed. Raises ImportError without
    torch-pruning, ValueError for a name in ``heads`` that is no module.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("coupled groups need the package torch-pruning: pip install 'lightning-sparse[shrink]'") from error
    for name in heads:
        try:
            model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"heads names {name!r}, which is no module of {type(model).__name__}") from None
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad(), surgery.seeded():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(model, inputs, forward_fn=_forward, verbose=False)
        found = [group for group in graph.get_all_groups(root_module_types=_ROOTS) if group[0].dep.target.module in graph.module2node]
        axes = [_Axis(model, graph, group) for group in found]
        axes.sort(key=lambda axis: axis.place)
        found = [[members for members in (axis.whole_heads(heads), axis.channels()) if members] for axis in axes]
    return found + [[[group]] for group in _uncovered(model, found)]


def _uncovered(model: nn.Module, axes: list[list[list[Group]]]) -> Iterator[Group]:
    """Yield a group without entries, and with a reason, for each layer whose matrices are in no axis."""
    named = {entry.name for axis in axes for members in axis for group in members for entry in group.entries}
    inside = {id(part) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for part in m.children()}
    for path, layer in model.named_modules():
        own = [f"{path}.{leaf}".lstrip(".") for leaf, p in layer.named_parameters(recurse=False) if p.dim() > 1]
        if not own or named & set(own) or id(layer) in inside:
            continue
        kind = type(layer).__name__
        reason = f"{kind} is not among the layers that can be cut"
        if isinstance(layer, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention keeps its width: to remove heads, write it with nn.Linear and scaled_dot_product_attention"
        elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            reason = UNREACHED
        name = path or kind
        yield Group(name, name, "layer", (), (), reason)


def _forward(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Return the outputs with a gradient, because the graph is read from their history."""
    tensors = [tensor for tensor in surgery.flat(surgery.call(model, inputs)) if tensor.grad_fn is not None]
    if not tensors:
        raise ValueError("no output has a gradient; does the forward run under torch.no_grad or detach?")
    return tensors


class _Axis:
    """One set of coupled channels: the items of torch-pruning's group, per channel of its root layer."""

    def __init__(self, model: nn.Module, graph: Any, group: Any) -> None:
        self.model, self.graph, self.group = model, graph, group
        self.names = {part: name for name, part in model.named_modules()}
        self.root = group[0].dep.target.module
        self.layers = [item.dep.target.module for item in group.items if item.dep.target.module in self.names]
        producers = {m for m in self.layers if isinstance(m, _ROOTS) and not surgery.is_depthwise(m) and self._is(m, outward=True)}
        self.place, self.name = next((place, name) for place, (m, name) in enumerate(self.names.items()) if m in (producers or {self.root}))

    def channels(self) -> list[Group]:
        """Return a group for each channel; with grouped convolutions, one for the same channel in each group."""
        units = self._merged(self._units(self.group, len(self.group[0].idxs)))
        kind = "channel" if any(isinstance(layer, nn.modules.conv._ConvNd) for layer in self.layers) else "neuron"
        counts = self._plain_norms()
        return [_group(self.name, i, kind, unit, counts, self._uncut()) for i, unit in enumerate(units)]

    def _uncut(self) -> str:
        """Return why a layer of the axis cannot be cut; an empty string if all can."""
        for layer in self.layers:
            kind = type(layer).__name__
            if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
                return f"{self.names[layer]} is nn.{kind}, which cannot be cut"
        return ""

    def _plain_norms(self) -> tuple[tuple[str, int], ...]:
        """Return the size attributes of norms without tensors, whose sizes cannot be read off them."""
        bare = [layer for layer in self.layers if isinstance(layer, nn.modules.batchnorm._NormBase) and not surgery.tensors(layer)]
        return tuple((f"{self.names[layer]}.num_features", 1) for layer in dict.fromkeys(bare))

    def _units(self, group: Any, width: int) -> _Units:
        """Split the items of a group by the root channel that they belong to."""
        units: _Units = [{} for _ in range(width)]
        for item in group.items:
            places = self._places(item.dep)
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                for tensor, dim, role, period in places:
                    units[root].setdefault((tensor, dim, role), set()).add(index % period if period else index)
        return units

    def _places(self, dep: Any) -> list[tuple[str, int, str, int]]:
        """Return (tensor, dim, role, period) that an item removes from; indices are taken modulo a period > 0."""
        layer = dep.target.module
        if isinstance(layer, nn.Parameter):
            return [(self.graph._param_to_name[layer], dep.target.pruning_dim % layer.dim(), "producer", 0)]
        if layer not in self.names:
            return []  # an operation without parameters
        name, outward = self.names[layer], bool(self.graph.is_out_channel_pruning_fn(dep.handler))
        return [(f"{name}.{leaf}" if name else leaf, dim, role, period) for leaf, dim, role, period in _slices(layer, outward)]

    def _merged(self, units: _Units) -> _Units:
        """Join units that must go together: channels that the graph couples, and the same channel of each convolution group."""
        width = len(units)
        fn = self.group[0].dep.handler
        sample = {0, width // 2, width - 1}
        if any(_entries(self._alone(fn, i)) != _entries(units[i]) for i in sample):
            units = _joined([self._alone(fn, i) for i in range(width)])
        many = max((layer.groups for layer in self.layers if _is_grouped(layer)), default=1)
        if many > 1 and len(units) % many == 0:
            step = len(units) // many
            units = [_union(units[i::step]) for i in range(step)]
        return units

    def _alone(self, fn: Any, index: int) -> dict[tuple[str, int, str], set[int]]:
        group = self.graph.get_pruning_group(self.root, fn, [index])
        return _union(self._units(group, len(self.group[0].idxs)))

    def whole_heads(self, given: Mapping[str, int]) -> list[Group]:
        """Return a group for each head if the axis joins the Linear layers of an attention module; else an empty list."""
        producers = [m for m in self.layers if isinstance(m, nn.Linear) and self._is(m, outward=True)]
        consumers = [m for m in self.layers if isinstance(m, nn.Linear) and self._is(m, outward=False)]
        host = self._host(given)
        if host is None or not producers or not consumers or any(isinstance(m, _NORMS) for m in self.layers):
            return []
        name, count, attribute = host
        width = consumers[0].in_features
        if name not in given and len(set(producers)) < 3 and producers[0].out_features != 3 * width:
            return []  # not q, k and v
        if count < 1 or width % count or any(m.out_features % width for m in producers) or any(m.in_features != width for m in consumers):
            return []
        size, units = width // count, []
        for head in range(count):
            columns = range(head * size, (head + 1) * size)
            unit: dict[tuple[str, int, str], set[int]] = {}
            for m in dict.fromkeys(producers):
                rows = {start + i for start in range(0, m.out_features, width) for i in columns}
                for leaf in ("weight", "bias") if m.bias is not None else ("weight",):
                    unit[(f"{self.names[m]}.{leaf}", 0, "producer")] = rows
            for m in dict.fromkeys(consumers):
                unit[(f"{self.names[m]}.weight", 1, "consumer")] = set(columns)
            units.append(unit)
        part = self.model.get_submodule(name)
        sizes = [(f"{name}.{leaf}".lstrip("."), size) for leaf in _WIDTHS if getattr(part, leaf, None) == width]
        counts = ([(f"{name}.{attribute}".lstrip("."), 1)] if attribute else []) + sizes
        return [_group(name or "heads", i, "head", unit, tuple(counts)) for i, unit in enumerate(units)]

    def _is(self, layer: nn.Module, outward: bool) -> bool:
        items = [item.dep for item in self.group.items if item.dep.target.module is layer]
        return any(bool(self.graph.is_out_channel_pruning_fn(dep.handler)) == outward for dep in items)

    def _host(self, given: Mapping[str, int]) -> tuple[str, int, str] | None:
        """Return (module, number of heads, attribute with it) of the attention module around the root layer."""
        path = self.name
        while path:
            path = path.rpartition(".")[0]
            part = self.model.get_submodule(path)
            stored = next((leaf for leaf in HEADS if type(getattr(part, leaf, None)) is int), "")
            if path in given or stored:
                return path, given.get(path, getattr(part, stored) if stored else 0), stored
        return None


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and not surgery.is_depthwise(layer)


def _slices(layer: nn.Module, outward: bool) -> Iterator[tuple[str, int, str, int]]:
    """Yield (tensor, dim, role, period) that one channel takes of a layer's tensors."""
    own = {name: tensor for name, tensor in surgery.tensors(layer).items() if "." not in name and tensor.dim()}
    if isinstance(layer, nn.Linear):
        yield from (
            [("weight", 0, "producer", 0), *([("bias", 0, "producer", 0)] if "bias" in own else [])]
            if outward
            else [("weight", 1, "consumer", 0)]
        )
    elif isinstance(layer, nn.Embedding):
        yield "weight", 1, "producer", 0
    elif surgery.is_depthwise(layer):
        yield from ((name, 0, "normaliser", 0) for name in own)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        first = outward != layer.transposed  # dim 0 of a weight holds outputs, that of a transposed convolution inputs
        period = 0 if first else layer.weight.shape[1]
        yield "weight", 0 if first else 1, "producer" if outward else "consumer", period
        if outward and "bias" in own:
            yield "bias", 0, "producer", 0
    elif isinstance(layer, _NORMS):
        buffers = dict(layer.named_buffers())
        yield from ((name, tensor.dim() - 1, "statistic" if name in buffers else "normaliser", 0) for name, tensor in own.items())


def _group(axis: str, index: int, kind: str, unit: dict[tuple[str, int, str], set[int]], counts: Any, reason: str = "") -> Group:
    entries = tuple(Entry(tensor, dim, tuple(sorted(taken)), role) for (tensor, dim, role), taken in unit.items())  # type: ignore[arg-type]
    return Group(f"{axis}[{index}]", axis, kind, entries, counts, reason)


def _union(units: Iterable[dict[tuple[str, int, str], set[int]]]) -> dict[tuple[str, int, str], set[int]]:
    union: dict[tuple[str, int, str], set[int]] = {}
    for unit in units:
        for place, taken in unit.items():
            union.setdefault(place, set()).update(taken)
    return union


def _entries(unit: dict[tuple[str, int, str], set[int]]) -> set[tuple[str, int, int]]:
    return {(tensor, dim, index) for (tensor, dim, _), taken in unit.items() for index in taken}


def _joined(units: _Units) -> _Units:
    """Return the unions of units that share an entry, in order."""
    joined: list[tuple[set[tuple[str, int, int]], dict[tuple[str, int, str], set[int]]]] = []
    for unit in units:
        mine, merged = _entries(unit), unit
        for other in [pair for pair in joined if pair[0] & mine]:
            joined.remove(other)
            mine, merged = mine | other[0], _union([other[1], merged])
        joined.append((mine, merged))
    return [unit for _, unit in joined]
