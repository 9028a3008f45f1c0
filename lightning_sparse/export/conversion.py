"""Replace matrices by sparse ones where that is measured to be faster: ``plan``, ``to_sparse`` and back, ``to_dense``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse.export.gains import Gain, Table, cache_folder, filled_blocks
from lightning_sparse.export.layers import SparseAttention, SparseLinear

LAYOUTS = ("auto", "csr", "bsr")
BLOCKS = (32, 16)
LEAST_ZEROS = 0.5  # with fewer zeros a sparse product has not been faster on any machine tried, and CSR takes more memory than dense
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torchao", "bitsandbytes")

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Choice:
    """What becomes of one matrix.

    Args:
        name: the parameter's name; an attention's ``in_proj_weight`` is three matrices, with ``[query]`` and so on behind the name.
        shape: (outputs, inputs).
        zeros: share of zeros, in [0, 1].
        layout: "csr", "bsr" or "dense".
        block: side of a block; 1 except for "bsr".
        gain: the measured gain of the layout, or of the best one if none pays; None if nothing was measured.
        why: the reason, in words.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    layout: str
    block: int
    gain: Gain | None
    why: str


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a layer of torch: ``weight`` and ``bias`` are views of the layer's parameters; ``why`` says why it stays dense."""

    name: str
    weight: Tensor
    bias: Tensor | None
    why: str = ""


def plan(module: nn.Module, layout: str = "auto", batch_size: int = 1, table: Table | None = None) -> list[Choice]:
    """Return for each matrix of the module's Linear layers and attentions what :func:`to_sparse` would do with it, and why.

    Arguments and errors are those of :func:`to_sparse`. Layers that are quantised or of a class of your own are not listed.
    """
    _checks.module(module, "to_sparse(module)")
    _checks.one_of("layout", layout, LAYOUTS)
    _checks.whole("batch_size", batch_size, 1)
    if table is None and layout == "auto":
        table = Table(cache_folder())
    found = [_choice(matrix, layout, batch_size, table) for _, layer in _layers(module) for matrix in layer]
    _refuse_dense(module, found)
    return found


def to_sparse(module: Module, layout: str = "auto", batch_size: int = 1, table: Table | None = None) -> Module:
    """Return a copy of the module for inference whose Linear and attention matrices are sparse where that pays.

    The copy has the same class and the same keys in its ``state_dict``, with dense values. It is in eval mode. The given module is
    not changed. Warns, in one line with the reasons, if weights that are at least half zero stay dense.

    Raises ValueError if no matrix is at least half zero, if none can have the layout that is asked for, and if the module is quantised.

    Args:
        module: a trained module with zeros in its weights.
        layout: "auto" takes for each matrix the layout that a table of gains, measured on this machine, says is faster than dense by
            more than the noise, and leaves the others; "csr" and "bsr" take every matrix that is at least half zero and where torch
            can, measured or not.
        batch_size: rows of the input that the gain is measured at: samples, or samples x length for a transformer.
        table: the table of gains; None takes the one in the user's cache folder and adds what it lacks. Used by "auto" only.
    """
    found = plan(module, layout, batch_size, table)
    result = replaced(module, found, layout)
    if any(zeros >= LEAST_ZEROS for zeros, _ in staying_dense(module, found).values()):
        warnings.warn(f"to_sparse leaves dense: {describe_dense(module, found)}", stacklevel=2)
    return result


def replaced(module: Module, found: Sequence[Choice], layout: str) -> Module:
    """Return the copy of the module with the choices of a plan in force; raises ValueError as :func:`to_sparse`."""
    choices = {choice.name: choice for choice in found}
    if layout != "auto" and all(choice.layout == "dense" for choice in choices.values()):
        reasons = "; ".join(f"{choice.name}: {choice.why}" for choice in list(choices.values())[:3])
        raise ValueError(f"no matrix of this {type(module).__name__} can be {layout}: {reasons}")
    result = copied(module).eval()
    for path, layer in _layers(result):
        taken = [choices[matrix.name] for matrix in layer]
        if all(choice.layout == "dense" for choice in taken):
            continue
        old = result.get_submodule(path) if path else result
        plain = layer[0]
        new = _attention(old, taken) if isinstance(old, nn.MultiheadAttention) else _linear(plain.weight, plain.bias, taken[0])
        new.train(old.training)
        if not path:
            return new  # type: ignore[return-value]
        _replace(result, old, new)
    leave_fused_paths(result, sparse_layers)
    return result


def staying_dense(module: nn.Module, found: Sequence[Choice]) -> dict[str, tuple[float, str]]:
    """Return (share of zeros, reason) of each matrix of a plan that stays dense, and of other layers' weights if at least half is zero."""
    left = {choice.name: (choice.zeros, choice.why) for choice in found if choice.layout == "dense"}
    listed = {choice.name.partition("[")[0] for choice in found}
    for path, layer in module.named_modules():
        for attribute, weight in layer.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if type(weight) is not nn.Parameter or weight.dim() < 2 or name in listed:
                continue
            if (zeros := _zeros(weight)) >= LEAST_ZEROS:
                left[name] = zeros, f"there is no sparse {type(layer).__name__}"
    return left


def describe_dense(module: nn.Module, found: Sequence[Choice]) -> str:
    """Say in one line which weights stay dense, and why; empty if none does."""
    reasons: dict[str, list[str]] = {}
    for name, (_, why) in staying_dense(module, found).items():
        reasons.setdefault(why, []).append(name)
    said = [f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} ({why})" for why, names in reasons.items()]
    return "; ".join(said[:4]) + f"; more reasons ({len(said) - 4}): export.plan" * (len(said) > 4)


def to_dense(module: Module) -> Module:
    """Return a copy with nn.Linear and nn.MultiheadAttention in the place of sparse layers: the inverse of :func:`to_sparse`."""
    _checks.module(module, "to_dense(module)")
    result = copied(module)
    if isinstance(result, (SparseLinear, SparseAttention)):
        return _dense(result)  # type: ignore[return-value]
    for layer in list(result.modules()):
        if isinstance(layer, SparseAttention):
            _replace(result, layer, _dense(layer))
    for layer in list(result.modules()):
        if isinstance(layer, SparseLinear):
            _replace(result, layer, _dense(layer))
    for layer in result.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            kinds = {1: (nn.functional.relu, nn.ReLU), 2: (nn.functional.gelu, nn.GELU)}
            fits = [number for number, (f, kind) in kinds.items() if layer.activation is f or isinstance(layer.activation, kind)]
            layer.activation_relu_or_gelu = fits[0] if fits else 0
    return result


def sparse_layers(module: nn.Module) -> dict[str, SparseLinear]:
    """Return the sparse layers of a module by their names."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, SparseLinear)}


def refuse_quantised(module: nn.Module, verb: str) -> None:
    """Raise ValueError naming the first quantised layer."""
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        kinds = [type(layer).__module__, type(weight).__module__ if isinstance(weight, Tensor) else ""]
        if any(kind.startswith(_QUANTISED) for kind in kinds):
            kind = type(layer).__name__
            raise ValueError(
                f"{name or 'the module'} is a quantised layer ({kind}); {verb} takes float weights: give the module before quantisation"
            )


def _choice(matrix: _Matrix, layout: str, batch_size: int, table: Table | None) -> Choice:
    weight = matrix.weight.detach()
    zeros, (rows, columns) = _zeros(weight), weight.shape

    def stays(why: str, gain: Gain | None = None) -> Choice:
        return Choice(matrix.name, (rows, columns), zeros, "dense", 1, gain, why)

    if matrix.why:
        return stays(matrix.why)
    if zeros < LEAST_ZEROS:
        return stays(f"only {100 * zeros:.1f} % zeros")
    blocks = [block for block in BLOCKS if filled_blocks(weight, block) < LEAST_ZEROS]
    if table is None:
        if layout == "bsr" and not blocks:
            return stays(f"less than half of its blocks of {' or '.join(map(str, BLOCKS))} are all zero")
        return Choice(matrix.name, (rows, columns), zeros, layout, blocks[0] if layout == "bsr" else 1, None, "asked for")
    candidates = [("csr", 1)] if layout in ("auto", "csr") else []
    candidates += [("bsr", block) for block in blocks] if layout in ("auto", "bsr") else []
    if not candidates:
        return stays(f"less than half of its blocks of {' or '.join(map(str, BLOCKS))} are all zero")
    measured = {one: table.gain(weight, _detached(matrix.bias), *one, batch_size) for one in candidates}
    kind, block = max(measured, key=lambda one: measured[one].times_faster)
    gain = measured[kind, block]
    if layout == "auto" and not gain.pays:
        return stays(
            f"{kind} is {gain.times_faster:.2f} times as fast for {batch_size} row{'s' * (batch_size > 1)} (noise {gain.noise:.2f})", gain
        )
    return Choice(
        matrix.name,
        (rows, columns),
        zeros,
        kind,
        block,
        gain,
        f"{gain.times_faster:.1f} times faster for {batch_size} row{'s' * (batch_size > 1)}",
    )


def _zeros(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def _refuse_dense(module: nn.Module, found: list[Choice]) -> None:
    """Raise ValueError if no matrix is at least half zero, and say where the zeros are."""
    elsewhere = _zeros_elsewhere(module, found)
    if not found:
        refuse_quantised(module, "to_sparse")
        none = f"{type(module).__name__} has no nn.Linear and no nn.MultiheadAttention, so there is no matrix to make sparse"
        raise ValueError(none + (f"; {elsewhere}" if elsewhere else ""))
    if max(choice.zeros for choice in found) >= LEAST_ZEROS:
        return
    most = max(found, key=lambda choice: choice.zeros)
    figure = f"the most zeros: {100 * most.zeros:.1f} % in {most.name}"
    if elsewhere:
        raise ValueError(f"no Linear matrix of this {type(module).__name__} is half zero ({figure}); {elsewhere}")
    raise ValueError(
        f"no matrix of this {type(module).__name__} is at least half zero ({figure}); a network with few zeros gains nothing from sparse "
        "products: train it with a callback of lightning_sparse, to more zeros"
    )


def _zeros_elsewhere(module: nn.Module, found: Sequence[Choice]) -> str:
    """Say which layers without a sparse kernel are at least half zero, and what to do; empty if there are none."""
    listed = {choice.name for choice in found}
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in staying_dense(module, found) if name not in listed))
    convolutions = [path for path in paths if isinstance(module.get_submodule(path), nn.modules.conv._ConvNd)]
    named = convolutions or paths
    if not named:
        return ""
    kind = "convolutions" if convolutions else f"{type(module.get_submodule(named[0])).__name__} layers"
    shown = ", ".join(path or "the module" for path in named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
    remedy = "For speed train with structure=Channels(), then shrink" if convolutions else "Train the Linear layers to more zeros"
    return f"the zeros of {shown} are in {kind}, which have no sparse kernel here. {remedy}"


def _layers(module: nn.Module) -> Iterator[tuple[str, list[_Matrix]]]:
    """Yield (path, matrices) for each Linear layer and attention of torch. Layers that are used twice are yielded once."""
    uses: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    inside: set[int] = set()
    for path, layer in module.named_modules():
        dot = f"{path}." if path else ""
        if type(layer) is nn.MultiheadAttention:
            inside.add(id(layer.out_proj))
            yield path, _attention_matrices(layer, dot)
        elif type(layer) is nn.Linear and id(layer) not in inside:
            shared = uses.get(id(layer.weight), 1) > 1  # torch.nn.utils.prune makes it a plain tensor
            yield path, [_Matrix(f"{dot}weight", layer.weight, layer.bias, _unfit(layer, layer.weight, shared))]


def _attention_matrices(layer: nn.MultiheadAttention, dot: str) -> list[_Matrix]:
    out = layer.out_proj
    why = _unfit(layer, out.weight, False)
    if not layer._qkv_same_embed_dim or layer.bias_k is not None or layer.add_zero_attn:
        why = why or "an attention with kdim, vdim, add_bias_kv or add_zero_attn"
    if not layer._qkv_same_embed_dim:
        return [_Matrix(f"{dot}out_proj.weight", out.weight, out.bias, why)]
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    parts = zip(("query", "key", "value"), layer.in_proj_weight.chunk(3), biases, strict=True)
    own = [_Matrix(f"{dot}in_proj_weight[{part}]", weight, bias, why) for part, weight, bias in parts]
    return [*own, _Matrix(f"{dot}out_proj.weight", out.weight, out.bias, why)]


def _unfit(layer: nn.Module, weight: Tensor, shared: bool) -> str:
    """Return why a layer stays as it is, or an empty string."""
    if shared:
        return "its weight is tied to another layer's"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"sparse products are in float32 and float64, not in {str(weight.dtype).removeprefix('torch.')}"
    return "" if type(weight) in (nn.Parameter, Tensor) else f"its weight is a {type(weight).__name__}"


def _linear(weight: Tensor, bias: Tensor | None, choice: Choice) -> nn.Module:
    if choice.layout != "dense":
        return SparseLinear(weight, bias, choice.layout, choice.block)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _attention(old: nn.MultiheadAttention, choices: list[Choice]) -> SparseAttention:
    pairs = zip(_attention_matrices(old, ""), choices, strict=True)
    query, key, value, out = (_linear(matrix.weight, matrix.bias, choice) for matrix, choice in pairs)
    return SparseAttention(query, key, value, out, old.num_heads, old.batch_first)


def _dense(layer: SparseLinear | SparseAttention) -> nn.Module:
    if isinstance(layer, SparseLinear):
        return _linear(layer.to_dense(), layer.bias, Choice("", (0, 0), 0.0, "dense", 1, None, ""))
    state = layer.state_dict()
    weight = state["out_proj.weight"]
    options = {"bias": "in_proj_bias" in state, "batch_first": layer.batch_first, "device": weight.device, "dtype": weight.dtype}
    attention = nn.MultiheadAttention(len(weight), layer.num_heads, **options)
    attention.load_state_dict(state)
    return attention.train(layer.training)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place where ``old`` is, also where a layer is used twice."""
    for owner in list(root.modules()):
        for name, child in list(owner._modules.items()):
            if child is old:
                owner._modules[name] = new


def leave_fused_paths(root: nn.Module, applies: Callable[[nn.Module], object]) -> None:
    """Keep torch's encoder layers that ``applies`` is true of from their fused path, because that path reads dense weights."""
    for layer in root.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and applies(layer):
            layer.activation_relu_or_gelu = 0
        elif isinstance(layer, nn.TransformerEncoder) and applies(layer):
            layer.use_nested_tensor = False


def copied(module: Module) -> Module:
    """Return a deep copy without the Trainer that a LightningModule may be attached to."""
    outer = (getattr(part, name, None) for part in module.modules() for name in ("_trainer", "_fabric"))
    return copy.deepcopy(module, {id(one): None for one in outer if one is not None})


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
