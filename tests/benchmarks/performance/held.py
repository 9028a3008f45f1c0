"""Memory of a training run between steps and at the peak of a step: of all tensors, or of the process.

Tensors are counted exactly: every storage that an operation takes or gives, from then until it is freed, numpy's memory
behind a tensor included. What a kernel allocates and frees by itself is not seen; the process's resident set shows it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sparse.conformance import toys
from performance.cases import Case, Network

STEPS = 12  # in an epoch: one of them updates a curvature estimate
BATCH = 8
SMALL = 10_000  # weights
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter(Protocol):
    """Interface: ``take()`` returns the current bytes and the peak since the last call."""

    def take(self) -> tuple[int, int]: ...

    def watching(self) -> AbstractContextManager[Any]: ...


class Storages(TorchDispatchMode):
    """Count tensors' storages inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._free, key)
        self.now += storage.nbytes() - self.sizes.get(key, 0)  # one that is known may have been resized
        self.sizes[key] = storage.nbytes()
        self.most = max(self.most, self.now)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def take(self) -> tuple[int, int]:
        found = self.now, self.most
        self.most = self.now
        return found

    def watching(self) -> AbstractContextManager[Any]:
        return self


class Resident:
    """Read the process's resident set and its high-water mark, which Linux can reset.

    Exact where malloc gives back at once what is freed: see ``ENVIRONMENT``.
    """

    def take(self) -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        CLEAR.write_text("5")
        return now, most

    def watching(self) -> AbstractContextManager[Any]:
        return nullcontext()


METERS: dict[str, type[Storages] | type[Resident]] = {"tensors": Storages, "resident": Resident}


# what glibc must be told so that each large block is a mapping of its own, gone as soon as it is freed
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Watched:
    """A loader that reads a meter before each batch, without gradients, which every run has."""

    def __init__(self, network: Network, meter: Meter) -> None:
        self.network, self.meter, self.batch = network, meter, torch.randn(BATCH, network.width)
        self.epochs: list[list[tuple[int, int]]] = []

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Tensor]:
        self.epochs.append([])
        for _ in range(STEPS):
            now, most = self.meter.take()
            self.epochs[-1].append((now - self._gradients(), most))
            yield self.batch

    def _gradients(self) -> int:
        grads = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        return sum(grad.untyped_storage().nbytes() for grad in grads)


def held(case: Case, weights: int, by: str) -> dict[str, int]:
    """Measure bytes ``persistent`` between steps and at the ``peak`` (largest of the second epoch), and ``weights``.

    A small network goes first: what is imported and cached on the way is no memory of the large one's.
    """
    meter = METERS[by]()
    with meter.watching():
        _fit(case, SMALL, meter)
        gc.collect()
        before, _ = meter.take()
        loader = _fit(case, weights, meter)
    _, *taken = loader.epochs[-1]  # the first has the epoch's start in it
    most = {"persistent": max(now for now, _ in taken), "peak": max(most for _, most in taken)}
    return {name: value - before for name, value in most.items()} | {"weights": loader.network.width**2}


def _fit(case: Case, weights: int, meter: Meter) -> Watched:
    loader = Watched(Network(case, weights), meter)
    toys.trainer(*case.callbacks(), epochs=2).fit(loader.network, loader)
    return loader
