"""Memory of a callback in bytes per selected weight, compared with the same run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import only_new, storages

GROUP = "life cycle"
WIDTH = 512  # one layer of WIDTH^2 weights, large enough that other memory is negligible


class _Meter(Callback):
    """Measure the bytes of all tensors within each batch (before backward, with autograd's saved tensors) and between batches."""

    def __init__(self) -> None:
        self.within: list[int] = []
        self.between: list[int] = []
        self.saved: dict[int, int] = {}
        self.watch: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.saved = {}
        self.watch = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        self.watch.__enter__()

    def _save(self, tensor: Tensor) -> Tensor:
        self.saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.watch.__exit__()
        self.within.append(sum((self.saved | storages()).values()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.zero_grad(set_to_none=True)
        self.between.append(sum(storages().values()))


def _rate_small(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-3)  # because plain SGD has no state


def _bytes(subject: Subject, steps: int) -> tuple[list[int], list[int]]:
    meter = _Meter()
    module = subject.model(nn.Linear(WIDTH, WIDTH, bias=False), optimizer=_rate_small)
    batch = (torch.randn(4, WIDTH, requires_grad=True), torch.zeros(4, dtype=torch.long))  # inputs need gradients, as inside a network
    with only_new():
        subject.trainer(meter, first=True, epochs=1).fit(module, toys.Repeated(batch, steps))
    return meter.within[1:], meter.between[1:]


def extra_bytes(subject: Subject, steps: int = 7) -> dict[str, list[float]]:
    """Measure the extra bytes per selected weight at each step: ``within`` a batch (before backward) and ``between`` batches."""
    bare = _bytes(Subject("nothing", tuple, subject.optimizer), steps)
    own = _bytes(subject, steps)
    pairs = zip(("within", "between"), own, bare, strict=True)
    return {name: [(a - b) / WIDTH**2 for a, b in zip(mine, without, strict=True)] for name, mine, without in pairs}


@check("the callback's memory does not grow from step to step", GROUP)
def memory_is_steady_over_steps(subject: Subject, folder: Path) -> None:
    for moment, sizes in extra_bytes(subject).items():
        late = sizes[len(sizes) // 2 :]
        growth = max(size - min(late[: number + 1]) for number, size in enumerate(late))  # it may fall, where a support is frozen
        require(growth < 0.1, f"extra bytes per weight {moment} batches: {[round(size, 2) for size in sizes]}")
