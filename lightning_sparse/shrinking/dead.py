"""Find the groups of a network that do nothing: their outputs are not used, or they are constants that a bias can take over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse import coupling, surgery
from lightning_sparse.coupling import Entry, Group

_DRAWS = 16  # a ReLU that is alive is zero in all of them with a probability of about 2^-16
_NEAR = 1e-9  # relative spread of a constant in float64


class Dead:
    """Groups that can be removed from a network without a change of its function.

    A group is removable if (a) everything that reads it is zero, or (b) it is a constant c in every input, and c is 0 or each layer
    that reads it can add W c to its bias: Linear layers, and convolutions without zero padding. Constants are looked for among groups
    with a producer or normaliser at zero, and must stay constant when all other weights are drawn again, with random inputs.
    One removal may make others possible (a neuron whose only reader went), so this repeats until nothing changes.

    Args:
        model: a copy of the network in evaluation mode; removed groups are set to zero in it, and constants are added to biases.
        inputs: example inputs.
        groups: candidates; those that are not exact are passed over.
    """

    def __init__(self, model: nn.Module, inputs: Any, groups: Iterable[Group]) -> None:
        self.model, self.inputs = model.requires_grad_(False), inputs
        self.live = [group for group in groups if group.exact]
        self.axes = Counter(group.axis for group in self.live)
        self.removed: list[Group] = []
        self.count = 0
        """Number of constants that went into biases."""
        self.folded: set[str] = set()
        """Names of the biases that took over constants."""
        self.constants: dict[str, str] = {}
        """Groups that are constant and stay, with the reason."""
        while self._remove(self._unread()) or self._remove(self._constant()):
            pass

    def _remove(self, found: list[Group]) -> bool:
        """Set groups to zero, but for the last one of an axis; return True if any was removed."""
        chosen = []
        for group in found:
            if self.axes[group.axis] > 1:
                self.axes[group.axis] -= 1
                chosen.append(group)
        surgery.zero_(self.model, coupling.indices(chosen))
        gone = {group.name for group in chosen}
        self.live = [group for group in self.live if group.name not in gone]
        self.removed += chosen
        return bool(chosen)

    def _unread(self) -> list[Group]:
        """Return the groups whose readers are all zero. Checked on the inputs, because a group may be read by other means too."""
        zero = _Zeros(self.model)
        found = [g for g in self.live if g.parameters("consumer") and all(zero(entry) for entry in g.parameters("consumer"))]
        if not found or self._same_without(found):
            return found
        axes = [[group for group in found if group.axis == axis] for axis in dict.fromkeys(group.axis for group in found)]
        return [group for members in axes if self._same_without(members) for group in members]

    def _same_without(self, found: list[Group]) -> bool:
        zeroed = surgery.duplicate(self.model, share=True)
        surgery.zero_(zeroed, coupling.indices(found))
        before, after = (surgery.outputs(model, self.inputs) for model in (self.model, zeroed))
        return surgery.difference(before, after) <= coupling.TOLERANCE / 10

    def _constant(self) -> list[Group]:
        """Return groups that are constants, after adding what they contribute to the biases of their readers."""
        zero = _Zeros(self.model)
        candidates = [group for group in self.live if any(zero(e) for e in group.parameters("producer", "normaliser") if not _is_bias(e))]
        if not candidates:
            return []
        paths = dict.fromkeys(entry.name.rpartition(".")[0] for group in candidates for entry in group.parameters("consumer"))
        readers = {path: self.model.get_submodule(path) for path in paths}
        constant, values = self._watch(readers)
        left, found = Counter(self.axes), []
        for group in candidates:
            shifts = self._shifts(group, readers, constant, values)
            if shifts is None or left[group.axis] < 2:
                continue
            left[group.axis] -= 1
            found.append(group)
            self.count += bool(shifts)
            for name, shift in shifts.items():
                _add_(self.model, name, shift)
                self.folded.add(name)
        return found

    def _watch(self, readers: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return per reader which of its input channels are constant in all draws, and their values with the real weights."""
        values, spread = _observe(self.model, readers, self.inputs)
        constant = dict(spread)
        plain = {name: tensor.clone() for name, tensor in surgery.tensors(self.model).items()}
        try:
            with surgery.seeded():
                for _ in range(_DRAWS):
                    _draw_(self.model, plain)
                    for path, flat in _observe(self.model, readers, _random_like(self.inputs))[1].items():
                        constant[path] = constant[path] & flat
        finally:
            with torch.no_grad():
                for name, tensor in surgery.tensors(self.model).items():
                    tensor.copy_(plain[name])
        return constant, values

    def _shifts(
        self, group: Group, readers: dict[str, nn.Module], constant: dict[str, Tensor], values: dict[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Return what to add to biases so that the group can go, by name of the bias; None if it must stay."""
        shifts: dict[str, Tensor] = {}
        entries = group.parameters("consumer")
        if not entries:
            return None
        for entry in entries:
            path = entry.name.rpartition(".")[0]
            reader, channels = readers[path], _channels(readers[path], entry)
            if path not in constant or not bool(constant[path][channels].all()):
                return None
            c = values[path][channels]
            if not bool(c.any()):
                continue
            if why := _unfoldable(reader):
                self.constants[group.name] = f"it is the constant {float(c.abs().max()):.3g}, and {path} {why}"
                return None
            name = f"{path}.bias" if path else "bias"
            shifts[name] = shifts.get(name, 0) + _contribution(reader, entry, c)
        return shifts


class _Zeros:
    """Tell whether an entry of a tensor is zero, from one pass over each tensor and dimension."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = surgery.tensors(model)
        self.known: dict[tuple[str, int], list[bool]] = {}

    def __call__(self, entry: Entry) -> bool:
        place = entry.name, entry.dim
        if place not in self.known:
            used = self.tensors[entry.name].detach() != 0
            others = [dim for dim in range(used.dim()) if dim != entry.dim]
            self.known[place] = (used.any(dim=others) if others else used).tolist()
        return not any(self.known[place][i] for i in entry.indices)


def _is_bias(entry: Entry) -> bool:
    return entry.name.rpartition(".")[2] == "bias"


@torch.no_grad()
def _observe(model: nn.Module, readers: dict[str, nn.Module], inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the model; return per reader the value of each input channel at one place, and whether it is the same everywhere."""
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def record(path: str, x: Tensor) -> None:
        channel = _channel_dim(readers[path], x)
        rows = x.detach().movedim(channel, 0).flatten(1)
        low[path] = torch.minimum(low[path], rows.amin(1)) if path in low else rows.amin(1)
        high[path] = torch.maximum(high[path], rows.amax(1)) if path in high else rows.amax(1)

    hooks = [
        reader.register_forward_pre_hook(lambda _, args, kwargs, path=path: record(path, (*args, *kwargs.values())[0]), with_kwargs=True)
        for path, reader in readers.items()
    ]
    try:
        surgery.outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    near = _NEAR if any(p.dtype == torch.float64 for p in model.parameters()) else coupling.TOLERANCE / 10
    flat = {path: (high[path] - low[path]) <= near * high[path].abs() for path in low}  # False where NaN
    return {path: torch.where(flat[path], (low[path] + high[path]) / 2, 0) for path in low}, flat


def _channel_dim(reader: nn.Module, x: Tensor) -> int:
    return x.dim() - 1 if isinstance(reader, nn.Linear) else x.dim() - reader.weight.dim() + 1  # type: ignore[operator]


@torch.no_grad()
def _draw_(model: nn.Module, plain: dict[str, Tensor]) -> None:
    """Multiply every parameter by standard normal numbers (zeros stay zeros); draw running statistics again."""
    parameters = set(dict(model.named_parameters(remove_duplicate=False)))
    for name, tensor in surgery.tensors(model).items():
        if name in parameters and tensor.is_floating_point():
            tensor.copy_(plain[name] * torch.randn_like(tensor))
        elif name.endswith("running_mean"):
            tensor.copy_(plain[name] + torch.randn_like(tensor))
        elif name.endswith("running_var"):
            tensor.copy_(plain[name] * (torch.rand_like(tensor) + 0.5))


def _random_like(inputs: Any) -> Any:
    """Return inputs with standard normal numbers in the place of floating ones."""

    def drawn(x: Any) -> Any:
        return torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    return torch.utils._pytree.tree_map(drawn, inputs)


def _channels(reader: nn.Module, entry: Entry) -> list[int]:
    """Return the input channels of a reader that an entry stands for: with grouped convolutions one in each group."""
    if isinstance(reader, nn.modules.conv._ConvNd) and reader.groups > 1 and not reader.transposed:
        width = reader.in_channels // reader.groups
        return [g * width + i for g in range(reader.groups) for i in entry.indices]
    return list(entry.indices)


def _unfoldable(reader: nn.Module) -> str:
    """Return why a reader cannot add a constant to its bias; an empty string if it can."""
    if not isinstance(getattr(reader, "bias", None), nn.Parameter):
        return "has no bias"
    if isinstance(reader, nn.Linear):
        return ""
    if not isinstance(reader, nn.modules.conv._ConvNd) or reader.transposed:
        return f"is {type(reader).__name__}"
    padded = reader.padding_mode == "zeros" and reader.padding != "valid" and any(p != 0 for p in reader.padding)
    return "pads with zeros, so that the constant differs at the border" if padded else ""


def _contribution(reader: Any, entry: Entry, c: Tensor) -> Tensor:
    """Return W c, a value for each output of the reader."""
    weight = reader.weight.detach().index_select(1, torch.tensor(entry.indices, device=c.device))
    weight = weight if isinstance(reader, nn.Linear) else weight.flatten(2).sum(2)
    groups = getattr(reader, "groups", 1)
    summed: Tensor = (weight.unflatten(0, (groups, -1)) * c.view(groups, 1, -1)).sum(2).flatten()
    return summed


@torch.no_grad()
def _add_(model: nn.Module, name: str, shift: Tensor) -> None:
    dict(model.named_parameters(remove_duplicate=False))[name].add_(shift)
