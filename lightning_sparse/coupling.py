"""Coupled groups: all slices of parameters that belong to one channel, neuron or head, each proved to be removable.

A channel is more than a row: what produces it, what normalises it and what consumes it go together. ``groups`` finds these sets on a
trace of the module (package torch-pruning, extra ``shrink``) and proves them: on example inputs, the network with the groups set to
zero must equal the network without them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sparse import _checks, surgery
from lightning_sparse._groups import Entry, ForwardBranches, ForwardFails, Group, Role
from lightning_sparse._naming import by_name

__all__ = ["Entry", "ForwardBranches", "ForwardFails", "Group", "Role", "Source", "groups", "indices", "kept", "left_out", "prepare"]

TOLERANCE = 1e-5
FAILS = "the network without it fails"
_DATA_DEPENDENT = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select")
_Pick = Callable[[list[Group]], list[Group]]
_BY_HAND = "try groups(..., source='names') for transformers, or name groups by hand with named=[Group(...)], source=None"


Source = Callable[[nn.Module, Any, Mapping[str, int]], list[list[list[Group]]]]
"""A source of groups: (module, example inputs, number of heads by module name) to axes. An axis is a list of alternatives, each a list of
groups; the first alternative that is proved counts."""


def groups(
    module: nn.Module,
    example_inputs: Any,
    *,
    named: Sequence[Group] = (),
    heads: Mapping[str, int] | None = None,
    source: Source | Literal["trace", "names"] | None = "trace",
    allow_branches: bool = False,
) -> list[Group]:
    """Find the coupled groups of a module and prove each on example inputs.

    Proof: on a copy in evaluation mode and in float64, with perturbed weights, max |zeroed - removed| / max |zeroed| <= 1e-5, for
    one group of each axis, a random half of the axis and the other half, and for halves of all axes together. What fails is
    returned with its reason and ``exact`` False. The module is left as it was: mode, ``requires_grad`` and parameter objects.

    Args:
        module: any module; a LightningModule is called by its ``forward``.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        named: groups of one's own, proved like the others. They replace the found groups that they overlap with.
        heads: number of heads of attention modules by name, where no attribute such as ``num_heads`` tells it.
        source: "trace" (torch-pruning); "names" (attention and MLP blocks whose Linear layers have the usual names, such as q_proj or
            up_proj, for models that cannot be traced; needs no package); None (only the ``named``); or another source of groups.
        allow_branches: accept a forward that branches on values of tensors; the proof holds for the path taken.

    Raises ImportError without torch-pruning, ValueError for a module that cannot be called or traced, and for quantised or
    parametrised weights.
    """
    _checks.module(module, "groups(module, example_inputs)")
    surgery.refuse_uncuttable(module)
    model, inputs = prepare(module, example_inputs, allow_branches)
    _check_named(named, model)
    axes = [[members] for members in _by_axis(named).values()]
    own = {key for group in named for key in _keys(group)}
    if source is not None:
        found = _found(source, model, inputs, heads or {})
        axes += [axis for axis in found if not any(key in own for members in axis for group in members for key in _keys(group))]
    return _proved(_Proof(model, inputs), axes)


def _found(source: Any, model: nn.Module, inputs: Any, heads: Mapping[str, int]) -> list[list[list[Group]]]:
    if source == "trace":
        from lightning_sparse._tracing import traced as source
    elif source == "names":
        source = by_name
    try:
        axes: list[list[list[Group]]] = source(model, inputs, heads)
    except (ImportError, NameError):
        raise
    except Exception as error:  # a tracer of any source may fail in any way
        raise ValueError(f"{type(model).__name__} cannot be traced ({_words(error)}); {_recurrent(model)}{_BY_HAND}") from error
    return axes


def _recurrent(model: nn.Module) -> str:
    """Name the recurrent layers of a model that cannot be traced, and what works with them; empty without such layers."""
    names = [name or type(layer).__name__ for name, layer in model.named_modules() if isinstance(layer, nn.RNNBase)]
    if not names:
        return ""
    return (
        f"probably because of its recurrent layers ({', '.join(names[:4])}), which are never cut. Single zeros (without structure=) and "
        "export (compact, onnx) work with them; otherwise "
    )


def kept(module: nn.Module, removed: Iterable[Group]) -> tuple[dict[str, dict[int, list[int]]], dict[str, int]]:
    """Return what stays when groups are removed: indices {tensor: {dim: kept}}, and attributes {dotted name: value}."""
    known = surgery.tensors(module)
    stays = {
        name: {dim: [i for i in range(known[name].shape[dim]) if i not in taken] for dim, taken in dims.items()}
        for name, dims in indices(removed).items()
    }
    sizes: dict[str, int] = {}
    for group in removed:
        for name, amount in group.counts:
            path, _, attribute = name.rpartition(".")
            sizes[name] = sizes.get(name, getattr(module.get_submodule(path), attribute)) - amount
    return stays, sizes


def indices(chosen: Iterable[Group]) -> dict[str, dict[int, set[int]]]:
    """Return the union of the entries of groups, {tensor: {dim: indices}}."""
    union: dict[str, dict[int, set[int]]] = {}
    for group in chosen:
        for entry in group.entries:
            union.setdefault(entry.name, {}).setdefault(entry.dim, set()).update(entry.indices)
    return union


def _by_axis(chosen: Iterable[Group]) -> dict[str, list[Group]]:
    axes: dict[str, list[Group]] = {}
    for group in chosen:
        axes.setdefault(group.axis, []).append(group)
    return axes


def _keys(group: Group) -> Iterator[tuple[str, int, int]]:
    return ((entry.name, entry.dim, index) for entry in group.entries for index in entry.indices)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Watch(TorchDispatchMode):
    """Record operations whose result depends on values and leaves the tensors' world."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in _DATA_DEPENDENT:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def prepare(module: nn.Module, inputs: Any, allow_branches: bool = False) -> tuple[nn.Module, Any]:
    """Return a trainable copy in evaluation mode, and the inputs, both in float64 if the module runs in it.

    Raises ValueError for missing inputs and those on which outputs cannot be compared, a forward that fails on them, and one that
    branches on values unless that is allowed.
    """
    if inputs is None:
        raise ValueError("example_inputs are missing: give a tensor, a tuple of arguments or a dict of keyword arguments")
    surgery.refuse_void_inputs(inputs)
    model: nn.Module = surgery.duplicate(module).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    watch = _Watch()
    try:
        with watch:
            tensors = surgery.outputs(model, inputs)
    except Exception as error:  # the user's forward may raise any error
        raise ForwardFails(type(module).__name__, _words(error)) from error
    if not tensors:
        raise ValueError(f"{type(module).__name__} returns no tensor on the example inputs")
    surgery.refuse_void_outputs(model, inputs, tensors)
    if watch.seen and not allow_branches:
        raise ForwardBranches(
            f"the forward of {type(module).__name__} takes values out of tensors ({', '.join(sorted(watch.seen))}), as control flow that "
            "depends on data does: groups would be proved for one path only"
        )
    wide = surgery.duplicate(model).double()
    widened = torch.utils._pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    try:
        surgery.outputs(wide, widened)
    except Exception:  # a forward with a fixed dtype; the proof then works in that dtype
        return model, inputs
    return wide, widened


def _check_named(named: Sequence[Group], module: nn.Module) -> None:
    known = surgery.tensors(module)
    for group in named:
        for entry in group.entries:
            if entry.name not in known:
                raise ValueError(f"group {group.name!r}: no tensor {entry.name!r}{_checks.closest(entry.name, known)}")
            shape = tuple(known[entry.name].shape)
            if not 0 <= entry.dim < len(shape) or not all(0 <= i < shape[entry.dim] for i in entry.indices):
                raise ValueError(
                    f"group {group.name!r}: {entry.name} has shape {shape}, got indices {entry.indices[:5]} of dim {entry.dim}"
                )


class _Proof:
    """Compare zeroed with removed groups on a copy with perturbed weights."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = surgery.duplicate(model).requires_grad_(False), inputs
        self.shapes = {name: tensor.shape for name, tensor in surgery.tensors(self.model).items()}
        plain = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        _perturb_(self.model)
        # because zeros in a trained network would hide wrong indices; a network that overflows is tested as it is
        if not all(bool(tensor.isfinite().all()) for tensor in surgery.outputs(self.model, inputs) if tensor.is_floating_point()):
            self.model.load_state_dict(plain)

    def reasons(self, axes: Sequence[list[Group]]) -> list[str]:
        """Return for each axis why its groups cannot be removed; an empty string if they can."""
        found = {i: why for i, members in enumerate(axes) if (why := self._misread(members) or _known_reason(members))}
        # those that will probably fail are compared alone, because one of them among the others costs a search
        alone = [i for i, members in enumerate(axes) if not members[0].parameters("consumer") or self._hint(members)]
        for pick in (_first, _half, _other_half):
            for among in [*([i] for i in alone), [i for i in range(len(axes)) if i not in alone]]:
                self._search([i for i in among if i not in found], axes, pick, found)
        return [found.get(i, "") for i in range(len(axes))]

    def _search(self, among: list[int], axes: Sequence[list[Group]], pick: _Pick, found: dict[int, str]) -> None:
        """Find the axes that fail by halving: axes that pass together need one comparison."""
        why = self.compare([group for i in among for group in pick(axes[i])]) if among else ""
        if why and len(among) == 1:
            found[among[0]] = self._hint(axes[among[0]]) or why + _cure(axes[among[0]], why)
        elif why:
            middle = len(among) // 2
            self._search(among[:middle], axes, pick, found)
            self._search(among[middle:], axes, pick, found)

    def _misread(self, members: list[Group]) -> str:
        """Return which tensor a source of groups misread: one without the indices."""
        for entry in (entry for group in members for entry in group.entries):
            shape = self.shapes.get(entry.name, ())
            if entry.dim >= len(shape) or max(entry.indices, default=0) >= shape[entry.dim]:
                return f"the trace misreads it: {entry.name} has the shape {tuple(shape)} (does a step pad, slice or reorder the channels?)"
        return ""

    def _hint(self, members: list[Group]) -> str:
        """Name a norm that averages over the channels of an axis."""
        for entry in members[0].parameters("normaliser"):
            layer = self.model.get_submodule(entry.name.rpartition(".")[0])
            if isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
                return f"{type(layer).__name__} averages over its channels"
        return ""

    def compare(self, removed: list[Group]) -> str:
        """Return how the network without the groups differs from the one with the groups at zero; empty if it does not."""
        zeroed = surgery.duplicate(self.model, share=True)
        surgery.zero_(zeroed, indices(removed))
        smaller = surgery.duplicate(self.model, share=True)
        try:
            surgery.cut_(smaller, *kept(self.model, removed))
            after = surgery.outputs(smaller, self.inputs)
        except Exception as error:  # a network of other shapes may fail anywhere
            return f"{FAILS}: {_words(error)}"
        before = surgery.outputs(zeroed, self.inputs)
        if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
            return "it is part of the output"
        gap = surgery.difference(before, after)
        return "" if gap <= TOLERANCE else f"the output changes by {100 * gap:.2g} % when it is removed instead of zero"


def _proved(proof: _Proof, axes: list[list[list[Group]]]) -> list[Group]:
    """Return the groups of each axis's first alternative that is proved, or else those of the first, with the reason."""
    done: dict[int, list[Group]] = {}
    for choice in range(max(map(len, axes), default=0)):
        left = [i for i, axis in enumerate(axes) if len(axis) > choice and not (i in done and done[i][0].exact)]
        for i, why in zip(left, proof.reasons([axes[i][choice] for i in left]), strict=True):
            if i not in done or not why:
                done[i] = [replace(group, reason=why) for group in axes[i][choice]]
    exact = [i for i in done if done[i][0].exact]
    good: list[Group] = []
    fails = proof.compare([group for i in exact for group in _half(done[i])])
    for i in exact if fails else ():  # axes that are exact alone and not together: keep the first ones
        if why := proof.compare([*good, *_half(done[i])]):
            done[i] = [replace(group, reason=f"together with other axes {why}") for group in done[i]]
        else:
            good += _half(done[i])
    return [group for members in done.values() for group in members]


def _cure(members: list[Group], why: str) -> str:
    """Return how to write an attention whose forward fails without a head; empty for other reasons."""
    if members[0].kind != "head" or not why.startswith(FAILS):
        return ""
    count = next((name.rpartition(".")[2] for name, by in members[0].counts if by == 1), "heads")
    return (
        f": after one head was removed, forward still computes the head size from the input's width; compute it once in __init__ "
        f"(self.head_size = d // {count}), use view(b, t, self.{count}, self.head_size) and end with "
        f"reshape(b, t, self.{count} * self.head_size)"
    )


def _known_reason(members: list[Group]) -> str:
    given = next((group.reason for group in members if group.reason), "")
    return given or (f"it is the only group of {members[0].axis}" if len(members) < 2 else "")


def _first(members: list[Group]) -> list[Group]:
    return members[:1]


def _half(members: list[Group]) -> list[Group]:
    """Return a random half of an axis, the same at each call."""
    drawn = set(random.Random(0).sample(range(len(members)), len(members) // 2))
    return [group for i, group in enumerate(members) if i in drawn]


def _other_half(members: list[Group]) -> list[Group]:
    half = set(map(id, _half(members)))
    return [group for group in members if id(group) not in half]


@torch.no_grad()
def _perturb_(model: nn.Module) -> None:
    """Add noise of half of each parameter's root mean square (1 / sqrt(inputs) for zeros); perturb running statistics."""
    with surgery.seeded():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                rms = float(parameter.square().mean().sqrt()) or max(parameter[0].numel() if parameter.dim() else 1, 1) ** -0.5
                parameter.add_(torch.randn_like(parameter), alpha=rms / 2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
            elif name.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)


def listed(reasons: Mapping[str, str], most: int = 5) -> str:
    """Return the reasons by axis as text, ``most`` of them: each once, with the first axes that it holds for."""
    axes: dict[str, list[str]] = {}
    for axis, reason in reasons.items():
        axes.setdefault(reason, []).append(axis)
    parts = [f"{', '.join(names[:3])}{_checks.more(names, 3)}: {reason}" for reason, names in list(axes.items())[:most]]
    return "; ".join(parts) + ("" if len(axes) <= most else f";{_checks.more(axes, most)} reasons")


def left_out(found: Iterable[Group]) -> Iterator[tuple[str, int, str]]:
    """Yield (axis, number of groups, reason) of the axes with groups that are not exact."""
    for axis, members in _by_axis(group for group in found if not group.exact).items():
        yield axis, len(members), members[0].reason
