"""Write a module as a program of torch.export, and find out by running it which batch sizes it takes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_sparse import surgery

CAUSE = "forward, or what it calls, makes the batch size a constant (len(x), int(x.shape[0]), a number): write x.shape[0]"
_TOLERANCE = 1e-4  # of the largest output


@dataclass(frozen=True)
class Program:
    """A program of torch.export that was run beside its module.

    Args:
        exported: the ``torch.export.ExportedProgram``.
        limit: which batch sizes it does not take, and why; empty if it takes any.
    """

    exported: Any
    limit: str = ""


def traced(module: nn.Module, inputs: tuple[Any, ...], fixed_batch: bool = False) -> Program:
    """Trace a module, for any batch size if that can be, and compare the program with it at batch 1, 2, 3 and that of the inputs.

    torch has two tracers. The first turns ``len(x)`` into a constant; the second reads the source code and does not, but knows less of
    Python. The first program that takes all of these batch sizes is returned, else one for the batch size of the inputs alone. Raises
    the tracer's error where there is none, and ValueError where the outputs differ from the module's.

    Args:
        module: the module, in eval mode.
        inputs: the positional arguments of its forward.
        fixed_batch: trace for the batch size of the inputs alone.
    """
    own = batch_size(inputs)
    sizes = [size for size in dict.fromkeys((own, 1, 2, 3)) if _runs(module, sized(inputs, size))]
    errors: list[Exception] = []
    without_one: Program | None = None
    for strict in () if fixed_batch else (False, True):
        try:
            exported = exported_program(module, sized(inputs, 2), dynamic_batch=True, strict=strict)  # 1 would become a constant
        except Exception as error:  # torch.export has many classes of errors
            errors.append(error)
            continue
        fails = {size: why for size in sizes if (why := _failure(exported, module, sized(inputs, size)))}
        if not fails:
            return Program(exported)
        if [*fails] == [1] and without_one is None and own > 1:
            without_one = Program(exported, f"does not take batches of 1 ({fails[1]})")
    if without_one is not None:
        return without_one
    for strict in (False, True):
        try:
            exported = exported_program(module, inputs, dynamic_batch=False, strict=strict)
        except Exception as error:
            errors.append(error)
            continue
        if why := _failure(exported, module, inputs):
            errors.append(ValueError(f"the program is not the module: {why}"))
            continue
        reason = ", as asked for" if fixed_batch else ", as forward does" if sizes in ([own], []) else f", because {CAUSE}"
        return Program(exported, f"takes batches of {own} only{reason}")
    raise errors[0]


def save(module: nn.Module, inputs: tuple[Any, ...], path: Path, fixed_batch: bool = False) -> Program:
    """Write the program of :func:`traced`, without the inputs; return it."""
    program = traced(module, inputs, fixed_batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.exported.example_inputs = None  # because they may be samples of the user's data
    with quiet():
        torch.export.save(program.exported, path)
    return program


def exported_program(module: nn.Module, inputs: tuple[Any, ...], dynamic_batch: bool, strict: bool) -> Any:
    """Return torch's program of a module; with ``dynamic_batch`` the first axis of every tensor varies."""
    axes = pytree.tree_map(lambda leaf: {0: torch.export.Dim.AUTO} if has_batch(leaf) else None, inputs)
    with quiet(), torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=axes if dynamic_batch else None, strict=strict)


def sized(inputs: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """Return inputs of another batch size: the first axis of each tensor is repeated or cut."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        repeats = -(-batch // len(leaf))
        return leaf.repeat(repeats, *[1] * (leaf.dim() - 1))[:batch].clone()

    return tuple(pytree.tree_map(one, inputs))


def has_batch(leaf: Any) -> bool:
    """Return True for a tensor with a first axis."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def batch_size(inputs: tuple[Any, ...]) -> int:
    """Return the length of the first axis of the first tensor; 0 without one."""
    return next((len(leaf) for leaf in pytree.tree_leaves(inputs) if has_batch(leaf)), 0)


def relative_difference(found: Any, expected: Any) -> float:
    """Return the largest difference of the tensors in two outputs, relative to the largest expected value; inf if they do not match."""
    ours, theirs = ([leaf for leaf in pytree.tree_leaves(one) if isinstance(leaf, Tensor)] for one in (found, expected))
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    if any(bool((a.isnan() != b.isnan()).any()) for a, b in pairs):
        return float("inf")
    worst = max((float((a - b).abs().nan_to_num().max()) for a, b in pairs), default=0.0)
    largest = max((float(b.abs().nan_to_num().max()) for _, b in pairs), default=0.0)
    return worst / largest if largest else worst


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's progress and warnings about its own deprecated parts."""
    names: Sequence[str] = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._dynamo")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _runs(module: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        _outputs(module, inputs)
    except Exception:  # the user's forward may raise any error
        return False
    return True


def _failure(exported: Any, module: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Return how a program fails or differs from its module on these inputs; empty if it does neither."""
    try:
        found = _outputs(exported.module(), inputs)
    except Exception as error:
        return " ".join(str(error).split())[:120] or type(error).__name__
    gap = relative_difference(found, _outputs(module, inputs))
    return "" if gap <= _TOLERANCE else f"its outputs differ by {gap:.1e} of the largest one"


def _outputs(module: Any, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad(), surgery.seeded():  # because a forward may draw random numbers
        return module(*inputs)
