"""Copy a module, remove slices of its tensors, and adapt the sizes that its layers store."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lightning_sparse import _checks

Indices = Mapping[str, Mapping[int, Collection[int]]]  # {tensor name: {dim: indices}}

_HOST = ("_trainer", "_fabric", "_jit_module")  # what a LightningModule refers to and a copy must not take along


def duplicate(module: nn.Module, share: bool = False) -> Any:
    """Return a deep copy of a module without the Trainer that it is attached to. The module is left as it was.

    With ``share`` the copy refers to the same tensors: replace them there, do not write into them.
    """
    held = [(part, name, vars(part)[name]) for part in module.modules() for name in _HOST if vars(part).get(name) is not None]
    for part, name, _ in held:
        vars(part)[name] = None
    try:
        return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors(module).values()} if share else {})
    finally:
        for part, name, value in held:
            vars(part)[name] = value


def refuse_uncuttable(module: nn.Module) -> None:
    """Raise ValueError for weights that cannot be cut: quantised, parametrised, lazy or under torch.nn.utils.prune."""
    for name, part in module.named_modules():
        where = f"{name or 'the module'} ({type(part).__module__}.{type(part).__name__})"
        if ".quantized" in type(part).__module__ or ".quantization" in type(part).__module__:
            raise ValueError(f"{where} is quantised and cannot be cut: shrink the network first, then quantise it")
        if hasattr(part, "parametrizations"):
            raise ValueError(f"{where} computes its weight: call torch.nn.utils.parametrize.remove_parametrizations first")
        if masked := [leaf for leaf in vars(part).get("_buffers", {}) if leaf.endswith("_mask") and hasattr(part, f"{leaf[:-5]}_orig")]:
            raise ValueError(f"{where} is under torch.nn.utils.prune: call torch.nn.utils.prune.remove(module, {masked[0][:-5]!r}) first")
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet: call the module once on the example inputs")
        if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.is_quantized:
            raise ValueError(f"{name} is {parameter.dtype} (quantised weights cannot be cut): shrink the network before it is quantised")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


def call(module: nn.Module, inputs: Any) -> Any:
    """Call a module with example inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


def outputs(module: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors in a module's output, in evaluation mode, without gradients and from one fixed seed."""
    with evaluating(module), torch.no_grad(), seeded():
        return flat(call(module, inputs))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in evaluation mode, and restore the mode of each of their parts afterwards.

    In training mode a call would change running statistics, and a batch norm refuses a batch of one sample.
    """
    training = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextmanager
def seeded() -> Iterator[None]:
    """Draw random numbers from one fixed seed, and restore the generators' states afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def flat(output: Any) -> list[Tensor]:
    """Return the tensors in nested containers and data classes, in order."""
    if isinstance(output, Mapping):
        output = list(output.values())
    leaves = _pytree.tree_leaves(output)
    opened = [flat(vars(leaf)) if hasattr(leaf, "__dataclass_fields__") and not isinstance(leaf, type) else [leaf] for leaf in leaves]
    return [tensor for part in opened for tensor in part if isinstance(tensor, Tensor)]


def refuse_void_inputs(inputs: Any) -> None:
    """Raise ValueError for example inputs on which a comparison of outputs says nothing: empty ones, and those of NaN or no numbers."""
    found = flat(inputs)
    if (meta := next((tensor for tensor in found if tensor.is_meta), None)) is not None:
        raise ValueError(f"example_inputs must hold numbers, got {_checks.described(meta)} on the meta device: give samples of your data")
    if found and not any(tensor.numel() for tensor in found):
        raise ValueError(
            f"example_inputs must hold at least one sample, got {_checks.described(found[0])}: outputs are compared on them, so give a "
            "batch, such as x[:8]"
        )
    for tensor in found:
        if tensor.numel() and bool(_isnan(tensor).all()):
            raise _nan_inputs(tensor, "that is NaN throughout")


def refuse_void_outputs(module: nn.Module, inputs: Any, outputs: list[Tensor]) -> None:
    """Raise ValueError where a comparison of outputs says nothing: without a finite number in them, or with NaN from the inputs."""
    cannot = f"the outputs of {type(module).__name__} on the example inputs %s, so they cannot be compared: "
    held = [tensor for tensor in outputs if tensor.numel()]
    if not held:
        raise ValueError(f"{cannot % 'are empty'}give more samples")
    missing = next((tensor for tensor in flat(inputs) if bool(_isnan(tensor).any())), None)
    if missing is not None and any(bool(_isnan(tensor).any()) for tensor in held):
        raise _nan_inputs(missing, "with NaN that reach the outputs")
    if not any(bool(tensor.isfinite().any()) for tensor in held):
        weights = (name for name, tensor in module.named_parameters() if not bool(tensor.isfinite().all()))
        cure = next((f"{name} is NaN or infinite" for name in weights), "give other example_inputs")
        raise ValueError(f"{cannot % 'hold no finite number'}{cure}")


def _isnan(tensor: Tensor) -> Tensor:
    plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested
    return tensor.isnan() if plain else torch.zeros((), dtype=torch.bool)


def _nan_inputs(tensor: Tensor, which: str) -> ValueError:
    given = _checks.described(tensor)
    return ValueError(f"example_inputs must hold numbers, got {given} {which}: outputs are compared on them, so give samples without NaN")


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Return max |a - b| / max |a|, the largest over pairs of outputs; inf where shapes, kinds or infinities differ."""
    if [a.shape for a in first] != [b.shape for b in second]:
        return math.inf
    return max((_apart(a, b) for a, b in zip(first, second, strict=True) if a.numel()), default=0.0)


def _apart(a: Tensor, b: Tensor) -> float:
    if not (a.is_floating_point() and b.is_floating_point()):
        return 0.0 if torch.equal(a, b) else math.inf
    wide, other = a.double(), b.double()
    if not torch.equal(wide.isfinite(), other.isfinite()):
        return math.inf
    gap = float((wide - other).nan_to_num(0.0, 0.0, 0.0).abs().max())
    return gap / (float(wide.nan_to_num(0.0, 0.0, 0.0).abs().max()) or 1.0)


def zero_(module: nn.Module, where: Indices) -> None:
    """Replace parameters by copies in which the slices are zero. Buffers (running statistics) keep their values."""
    owners = _owners(module)
    for name, dims in where.items():
        tensor = _get(module, name)
        if not isinstance(tensor, nn.Parameter):
            continue
        zeroed = tensor.detach().clone()
        for dim, indices in dims.items():
            zeroed.index_fill_(dim, torch.tensor(sorted(indices), dtype=torch.long, device=tensor.device), 0.0)
        replaced = nn.Parameter(zeroed, tensor.requires_grad)
        for twin in owners.get(id(tensor), [name]):
            _set(module, twin, replaced)
        owners[id(replaced)] = owners.get(id(tensor), [name])


def cut_(module: nn.Module, kept: Indices, sizes: Mapping[str, int] | None = None) -> None:
    """Keep only the ``kept`` indices of tensors, in place, and adapt what the layers store about sizes.

    Parameters become new objects with the same ``requires_grad``; tied parameters stay tied. ``sizes`` sets further integer
    attributes by dotted name ("encoder.attention.num_heads"). Raises ValueError if two names of one tensor keep different
    indices, or if a convolution's groups no longer divide its channels.
    """
    owners = _owners(module)
    done: dict[int, tuple[Any, Tensor]] = {}
    for name, dims in kept.items():
        tensor = _get(module, name)
        record = {dim: tuple(sorted(indices)) for dim, indices in dims.items()}
        if id(tensor) in done:
            continue
        for twin in owners[id(tensor)]:
            if twin in kept and {dim: tuple(sorted(indices)) for dim, indices in kept[twin].items()} != record:
                raise ValueError(f"{name} is tied to {twin}, and the two keep different indices")
        smaller = _select(tensor, record)
        done[id(smaller)] = (record, smaller)  # a reference, so that no other tensor gets its id
        for twin in owners[id(tensor)]:
            _set(module, twin, smaller)
    touched = {name.rpartition(".")[0] for name in kept}
    for path in sorted(touched | {twin.rpartition(".")[0] for names in owners.values() for twin in names if touched & set(_paths(names))}):
        fit(module.get_submodule(path))
    for name, size in (sizes or {}).items():
        path, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(path), attribute, size)


def _paths(names: list[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in names]


def _owners(module: nn.Module) -> dict[int, list[str]]:
    """Return the names of each tensor by its id."""
    owners: dict[int, list[str]] = {}
    for name, tensor in tensors(module).items():
        owners.setdefault(id(tensor), []).append(name)
    return owners


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), leaf)
    return found


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, tensor)


def _select(tensor: Tensor, record: Mapping[int, tuple[int, ...]]) -> Tensor:
    smaller = tensor.detach()
    for dim, indices in record.items():
        smaller = smaller.index_select(dim, torch.tensor(indices, dtype=torch.long, device=tensor.device))
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    smaller = smaller.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def fit(layer: nn.Module) -> None:
    """Set a layer's stored sizes from the shapes of its tensors. Layers without such sizes are left as they are."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.conv._ConvNd):
        _fit_convolution(layer)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        known = weight if weight is not None else layer.running_mean
        layer.num_features = layer.num_features if known is None else known.shape[0]
    elif isinstance(layer, nn.GroupNorm) and isinstance(weight, Tensor):
        layer.num_channels = weight.shape[0]
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and isinstance(weight, Tensor):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.shape[0]
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def _fit_convolution(layer: nn.modules.conv._ConvNd) -> None:
    first, second = layer.weight.shape[:2]
    if is_depthwise(layer):
        layer.in_channels = layer.out_channels = layer.groups = first
        return
    inputs, outputs = (first, second * layer.groups) if layer.transposed else (second * layer.groups, first)
    if inputs % layer.groups or outputs % layer.groups:
        raise ValueError(f"{inputs} and {outputs} channels are not multiples of the convolution's {layer.groups} groups")
    layer.in_channels, layer.out_channels = inputs, outputs


def is_depthwise(layer: nn.Module) -> bool:
    """Return True for a convolution that maps each channel to one channel of its own."""
    return isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels
