"""Write an ONNX file through torch's exporter, and compare it with the module in ONNX Runtime before it appears."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_sparse import _checks, surgery
from lightning_sparse.export import _extra
from lightning_sparse.export.conversion import copied, refuse_quantised, to_dense
from lightning_sparse.export.program import CAUSE, batch_size, exported_program, has_batch, quiet, relative_difference

_FIXED = f"Probably {CAUSE}; or write a file for one batch size with dynamic_batch=False"
_TOLERANCE = 1e-4  # of the largest output; float32 sums in another order differ by about 1e-6


def to_onnx(
    module: nn.Module, path: str | Path, example_inputs: Any = None, dynamic_batch: bool = True, tolerance: float = _TOLERANCE
) -> float:
    """Write the module's forward as an ONNX file; return the largest difference in ONNX Runtime, relative to the largest output.

    Sparse layers of this package become dense first, because ONNX has no sparse product. ONNX Runtime is not faster for zeros in a
    dense matrix: remove rows and columns (shrink) or use :func:`to_sparse` for that. The given module is not changed.

    Raises ImportError without the extra ``export``, ValueError for a folder as path, without example inputs, for inputs on which outputs
    cannot be compared (empty, or NaN), for quantised layers, for a forward that torch cannot export (the message says where),
    and if ONNX Runtime's outputs differ by more than ``tolerance``; no file is written then.

    Args:
        module: the module; exported in eval mode.
        path: the file to write.
        example_inputs: a tensor, or the tuple of the forward's positional arguments; None takes the module's ``example_input_array``.
        dynamic_batch: let the first axis of every input tensor vary; the file is then checked at a second batch size too.
        tolerance: largest accepted difference, relative to the largest output.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _extra.load(package, "to_onnx")
    call = "to_onnx(module, path, example_inputs)"
    _checks.file(path, "path", call, "model.onnx")
    _checks.module(module, call)
    refuse_quantised(module, "to_onnx")
    inputs = as_inputs(module, example_inputs)
    surgery.refuse_void_inputs(inputs)
    model = to_dense(copied(module)).eval().cpu().requires_grad_(False)
    batches = [inputs, _twice(inputs)] if dynamic_batch else [inputs]
    for batch in batches:
        _try(model, batch)
    fresh = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    fresh.parent.mkdir(parents=True, exist_ok=True)
    try:
        worst = _written(model, batches, fresh, tolerance)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return worst


def as_inputs(module: nn.Module, given: Any = None) -> tuple[Any, ...]:
    """Return the positional arguments of the forward, on the CPU. Raises ValueError if neither ``given`` nor the module has them."""
    found = getattr(module, "example_input_array", None) if given is None else given
    if found is None:
        raise ValueError(
            f"no example inputs: give example_inputs (a tensor or a tuple of the arguments of {type(module).__name__}.forward), "
            "or set the module's example_input_array"
        )
    if isinstance(found, Mapping):
        names = [name for name in inspect.signature(module.forward).parameters if name in found]
        found = tuple(found[name] for name in names)
    inputs = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    return tuple(pytree.tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, inputs))


def session(path: str | Path, threads: int | None = None) -> Any:
    """Return a callable that runs an ONNX file in ONNX Runtime on the CPU: tensors in, a tensor or a list of tensors out."""
    runtime = _extra.load("onnxruntime", "to_onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4  # because an error is raised too
    running = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in running.get_inputs()]

    def call(*inputs: Any) -> Any:
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        found = running.run(None, {name: leaf.detach().numpy() for name, leaf in zip(names, leaves, strict=False)})
        tensors = [torch.from_numpy(array) for array in found]
        return tensors[0] if len(tensors) == 1 else tensors

    return call


def _try(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad():
            outputs = surgery.flat(model(*inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        raise ValueError(
            f"{type(model).__name__}.forward fails for inputs of the shapes {shapes}: {' '.join(str(error).split())[:300]}. Give "
            "example_inputs that it accepts; if it takes one batch size only, give dynamic_batch=False too"
        ) from error
    surgery.refuse_void_outputs(model, inputs, outputs)


def _written(model: nn.Module, batches: list[tuple[Any, ...]], path: Path, tolerance: float) -> float:
    """Write the file and return its largest difference; of several batch sizes the first example's and others must run.

    A second try takes the tracer that keeps ``len(x)`` variable. If it fails too, the first error is raised.
    """
    first: ValueError | None = None
    for strict in (False, True) if len(batches) > 1 else (False,):
        try:
            _export(model, batches[-1], path, len(batches) > 1, strict)
            gaps = [_difference(model, path, batch) for batch in batches]
            if max(gaps) <= tolerance:
                return max(gaps)
            constant = f". {_FIXED}" if gaps[0] == float("inf") > gaps[-1] else ""
            raise ValueError(
                f"ONNX Runtime's outputs differ from the module's by {max(gaps):.1e} of the largest output, more than {tolerance:g}"
                f"{constant}"
            )
        except ValueError as error:
            first = first or error
    raise first or ValueError("no batch to export")


def _export(model: nn.Module, inputs: tuple[Any, ...], path: Path, dynamic_batch: bool, strict: bool) -> None:
    axes = pytree.tree_map(lambda leaf: {0: torch.export.Dim.AUTO} if has_batch(leaf) else None, inputs) if dynamic_batch else None
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with quiet():
            torch.backends.mha.set_fastpath_enabled(False)  # because its fused operator has no ONNX form
            source = exported_program(model, inputs, dynamic_batch, True) if strict else model
            torch.onnx.export(
                source, inputs, str(path), dynamo=True, dynamic_shapes=None if strict else axes, external_data=False, verbose=False
            )
    except Exception as error:
        raise ValueError(_in_words(model, error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _in_words(model: nn.Module, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = " ".join(lines)
    hint = "an operation in it has no ONNX form"
    if any(
        word in text for word in ("data-dependent", "Data-dependent", "control flow", "GuardOnDataDependent", "Could not guard", "unbacked")
    ):
        hint = "its control flow depends on values of the input: use torch.where or torch.cond instead"
    return f"torch cannot export {type(model).__name__}.forward: {hint}. torch says: {text[:300]}"


def _difference(model: nn.Module, path: Path, inputs: tuple[Any, ...]) -> float:
    with torch.inference_mode():
        expected = model(*inputs)
    try:
        found = session(path)(*inputs)
    except Exception as error:
        raise ValueError(
            f"ONNX Runtime cannot run the file at batch {batch_size(inputs)}: {' '.join(str(error).split())[:300]}. {_FIXED}"
        ) from error
    return relative_difference(found, expected)


def _twice(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs with their batch repeated once."""
    doubled = pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if has_batch(leaf) else leaf, inputs)
    return tuple(doubled)
