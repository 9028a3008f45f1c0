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

    The tensors are of one shape, of any size, and no graph follows them; the numbers, floats and 32-bit ints, may change from
    call to call. It is compiled once for each list of types, device and number of threads, in a process once for all kernels made
    of equal values. Tensors that do not lie in memory alike are worked on without.
    Raises RuntimeError, naming ``what`` it is made of, where it cannot be compiled.
    """

    def __init__(self, make: Callable[..., Callable[..., None]], *settings: Any, what: str = "it") -> None:
        self._made_of, self._what = (make, *settings), what
        self._function = make(*settings)
        shared = all(is_plain(value) or is_value(value) for value in settings)
        self._compiled: dict[Any, Run] = _SHARED.setdefault(self._made_of, {}) if shared else {}
        self._scalars: dict[Any, list[Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self._what, *self._made_of)

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
            types = [torch.int32 if type(number) is int else wide for number in numbers]
            self._scalars[key] = [torch.empty((), dtype=kind, device="cpu") for kind in types]
        return [scalar.fill_(number) for scalar, number in zip(self._scalars[key], numbers, strict=True)]

    def _of(self, tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Run:
        types = [tensor.dtype for tensor in (*tensors, *scalars)]
        key = (tensors[0].device, torch.get_num_threads(), len(scalars), *types)
        if key not in self._compiled:
            self._compiled[key] = self._compile(tensors, scalars)
        return self._compiled[key]

    def _compile(self, tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Run:
        try:
            return _compile(self._function, tensors, scalars)
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"compile=True, but torch could not compile {self._what}: {said:.200}. It needs a compiler (on the CPU a C++ one), and "
                "a penalty made of torch's operations alone; leave compile=True out to go on without"
            ) from error

    def check(self, like: Iterable[Tensor], tensors: Sequence[float], numbers: Sequence[float]) -> None:
        """Compile it now, for the types and devices of ``like``; run on tensors filled with the values ``tensors``, and ``numbers``."""
        for dtype, device in {(tensor.dtype, tensor.device): None for tensor in like}:
            self([torch.full((2,), value, dtype=dtype, device=device) for value in tensors], numbers)


def _made(what: str, *made_of: Any) -> Kernel:
    return Kernel(*made_of, what=what)


@torch.no_grad()
def _compile(function: Callable[..., None], tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Run:
    """For tensors like these, whatever their size."""
    few, many = ([torch.ones(size, dtype=tensor.dtype, device=tensor.device) for tensor in tensors] for size in (2, _EXAMPLE))
    function(*few, *scalars)  # what a penalty computes once and keeps must not be computed of the tracer's tensors
    size = torch.export.Dim("size", min=2)
    shapes = tuple({0: size} if position < len(tensors) else None for position in range(len(tensors) + len(scalars)))
    exported = torch.export.export(_Module(function), (*many, *scalars), dynamic_shapes=(shapes,), strict=False)
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
