"""Work element by element as one compiled kernel, for those who ask for it: torch.export and AOTInductor, which need a compiler.

torch.compile makes the same code, but looks at its guards and wrappers for 70 us at each call; a kernel made ahead takes 2.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse._pieces import alike, flat
from lightning_sparse._values import is_plain, is_value

_EXAMPLE = 1 << 18  # elements: of much less the compiler makes a kernel for one thread
Run = Callable[[list[Tensor]], Any]
_SHARED: dict[tuple[Any, ...], dict[Any, Run]] = {}  # what was compiled, by what it is made of


class Kernel:
    """``make(*settings)`` is a function of tensors and then numbers that writes into some of the tensors, element by element.

    The tensors are of one shape, of any size, and no graph follows them; the numbers may change from call to call. It is
    compiled once for each list of types and each device, in a process once for all kernels made of equal values. Tensors that do
    not lie in memory alike are worked on without.
    """

    def __init__(self, make: Callable[..., Callable[..., None]], *settings: Any) -> None:
        self._made_of = make, *settings
        self._function = make(*settings)
        shared = all(is_plain(value) or is_value(value) for value in settings)
        self._compiled: dict[Any, Run] = _SHARED.setdefault(self._made_of, {}) if shared else {}
        self._scalars: dict[Any, list[Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
        scalars = self._scalars_of(numbers, tensors[0].dtype)
        if tensors[0].numel() < 2 or not alike(tensors):
            self._function(*tensors, *scalars)
        else:
            self._of(tensors, scalars)([*map(flat, tensors), *scalars])

    def _scalars_of(self, numbers: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
        """Tensors of no dimensions, since a Python number would be compiled in; floats in float32 or wider, ints in int32."""
        key = (dtype, *map(type, numbers))
        if key not in self._scalars:
            wide = torch.promote_types(dtype, torch.float32)
            self._scalars[key] = [torch.empty((), dtype=torch.int32 if type(number) is int else wide) for number in numbers]
        return [scalar.fill_(number) for scalar, number in zip(self._scalars[key], numbers, strict=True)]

    def _of(self, tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Run:
        key = (tensors[0].device, len(scalars), *(tensor.dtype for tensor in tensors))
        if key not in self._compiled:
            self._compiled[key] = _compile(self._function, tensors, scalars)
        return self._compiled[key]

    def check(self, like: Iterable[Tensor], tensors: Sequence[float], numbers: Sequence[float], what: str) -> None:
        """Compile it for the types and devices of ``like``; RuntimeError, naming ``what`` it is made of, where that fails.

        It runs once, on tensors filled with the values ``tensors`` and on ``numbers``.
        """
        for dtype, device in {(tensor.dtype, tensor.device): None for tensor in like}:
            try:
                self([torch.full((2,), value, dtype=dtype, device=device) for value in tensors], numbers)
            except Exception as error:
                raise RuntimeError(
                    f"compile=True, but torch could not compile {what}: {str(error).strip().splitlines()[0]:.200}. It needs a compiler "
                    "(on the CPU a C++ one), and a penalty made of torch's operations alone; leave compile=True out to go on without"
                ) from error


@torch.no_grad()
def _compile(function: Callable[..., None], tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Run:
    """For tensors like these, whatever their size."""
    given = (*(torch.ones(_EXAMPLE, dtype=tensor.dtype, device=tensor.device) for tensor in tensors), *scalars)
    function(*given)  # what a penalty computes once and keeps must not be computed of the tracer's tensors
    size = torch.export.Dim("size", min=2)
    shapes = tuple({0: size} if position < len(tensors) else None for position in range(len(given)))
    exported = torch.export.export(_Module(function), given, dynamic_shapes=(shapes,), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(Path(folder) / "kernel.pt2"))
        run: Run = torch._inductor.aoti_load_package(path).loader.run
    return run


class _Module(nn.Module):
    """What is exported has to be a module."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *given: Tensor) -> tuple[()]:
        self._function(*given)
        return ()
