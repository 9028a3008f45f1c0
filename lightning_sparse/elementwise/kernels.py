"""Compile an elementwise function into one kernel, ahead of time: torch.export and AOTInductor, which need a compiler.

torch.compile generates the same code, but spends 70 us at each call on guards and wrappers; a precompiled kernel takes 2.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.elementwise.pieces import flat_view, same_layout

_EXAMPLE = 1 << 18  # elements: for much fewer the compiler makes a single-threaded kernel
Run = Callable[[list[Tensor]], Any]
_COMPILED: dict[Hashable, dict[Any, Run]] = {}  # kernels of this process, by the key of their function


def is_frozen_config(value: Any) -> bool:
    """Return whether ``value`` may be a cache key: a frozen dataclass (no subclass of one) of numbers, strings, None or the like."""
    settings = vars(type(value)).get("__dataclass_params__")
    if settings is None or not (settings.frozen and settings.eq):
        return False
    values = [(field.compare, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return all(compared and (is_scalar(one) or is_frozen_config(one)) for compared, one in values)


def is_scalar(value: Any) -> bool:
    """Return whether ``value`` is a number, a string or None."""
    return type(value) in (bool, int, float, str, type(None))


class Kernel:
    """Runs ``function(*tensors, *scalars)``, which writes into some of the tensors element by element, as a compiled kernel.

    The tensors have one shape, any size, and no graph; the scalars are floats and 32-bit ints that may change from call to call.
    The kernel is compiled once for each combination of types, device and number of threads; kernels with an equal ``key`` share the
    result. Tensors of different memory layout are processed without it.
    Raises RuntimeError, naming ``what`` is compiled, if compilation fails.
    """

    def __init__(self, function: Callable[..., None], what: str, key: Hashable = None) -> None:
        self._function, self._what = function, what
        self._compiled: dict[Any, Run] = {} if key is None else _COMPILED.setdefault(key, {})
        self._scalars: dict[Any, list[Tensor]] = {}

    def __call__(self, tensors: Sequence[Tensor], scalars: Sequence[float]) -> None:
        wrapped = self._as_tensors(scalars, tensors[0].dtype)
        if tensors[0].numel() < 2 or not same_layout(tensors):
            self._function(*tensors, *wrapped)
        else:
            self._kernel(tensors, wrapped)([*map(flat_view, tensors), *wrapped])

    def _as_tensors(self, scalars: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
        """Wrap scalars as 0-d tensors, because a Python number would be compiled in; floats in float32 or wider, ints in int32."""
        key = (dtype, *map(type, scalars))
        if key not in self._scalars:
            wide = torch.promote_types(dtype, torch.float32)
            types = [torch.int32 if type(number) is int else wide for number in scalars]
            self._scalars[key] = [torch.empty((), dtype=kind, device="cpu") for kind in types]
        return [scalar.fill_(number) for scalar, number in zip(self._scalars[key], scalars, strict=True)]

    def _kernel(self, tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Run:
        types = [tensor.dtype for tensor in (*tensors, *scalars)]
        key = (tensors[0].device, torch.get_num_threads(), len(scalars), *types)
        if key not in self._compiled:
            try:
                self._compiled[key] = _compile(self._function, tensors, scalars)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RuntimeError(
                    f"compile=True, but torch could not compile {self._what}: {reason:.200}. It needs a compiler (on the CPU a C++ one), "
                    "and a penalty made of torch operations only; omit compile=True to continue without it"
                ) from error
        return self._compiled[key]

    def check(self, like: Iterable[Tensor], values: Sequence[float], scalars: Sequence[float]) -> None:
        """Compile now for the types and devices of ``like``, and run once on tensors filled with ``values``."""
        for dtype, device in {(tensor.dtype, tensor.device): None for tensor in like}:
            self([torch.full((2,), value, dtype=dtype, device=device) for value in values], scalars)


@torch.no_grad()
def _compile(function: Callable[..., None], tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Run:
    """Compile ``function`` for tensors like these, of any size."""
    few, many = ([torch.ones(size, dtype=tensor.dtype, device=tensor.device) for tensor in tensors] for size in (2, _EXAMPLE))
    function(*few, *scalars)  # what a penalty computes once and caches must not be computed from the tracer's tensors
    size = torch.export.Dim("size", min=2)
    shapes = tuple({0: size} if position < len(tensors) else None for position in range(len(tensors) + len(scalars)))
    exported = torch.export.export(_Module(function), (*many, *scalars), dynamic_shapes=(shapes,), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(Path(folder) / "kernel.pt2"))
        run: Run = torch._inductor.aoti_load_package(path).loader.run
    return run


class _Module(nn.Module):
    """Wraps a function, because torch.export takes modules only."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *given: Tensor) -> tuple[()]:
        self._function(*given)
        return ()
