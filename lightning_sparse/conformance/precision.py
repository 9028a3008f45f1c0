"""Mixed precision, steps skipped by a GradScaler, and the for-loop, foreach and fused implementations of an optimiser."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, MixedPrecision
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.steps import GROUP, Make, close, own_steps, some_zeros


@check("bf16-mixed ends with exact zeros in float32 weights", GROUP)
def bf16_ends_sparse(subject: Subject, folder: Path) -> None:
    module = subject.model()
    subject.fit(module, epochs=4, precision="bf16-mixed")
    some_zeros(module, "after bf16-mixed")
    require(all(p.dtype == torch.float32 for p in module.parameters()), "the weights are no longer float32")


class Overflowing(toys.Toy):
    """A toy whose gradients overflow fp16 at batch 2 of every epoch, with a finite loss."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return super().training_step(batch, index) * (1e30 if index == 2 else 1.0)


class _Skips(Callback):
    """Record the weights and the GradScaler's scale at the end of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Tensor], float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append((toys.weights(pl_module), trainer.precision_plugin.scaler.get_scale()))


def fp16(device: str = "cpu") -> MixedPrecision:
    """Make the plugin for fp16 with a GradScaler, because ``precision="16-mixed"`` means bf16 on a CPU."""
    return MixedPrecision("16-mixed", device)


def _fp16_run(subject: Subject, make: Make | None) -> list[tuple[dict[str, Tensor], float]]:
    module = Overflowing(optimizer=make) if make else Overflowing()
    skips = _Skips()
    subject.fit(module, skips, epochs=3, plugins=[fp16()])
    some_zeros(module, "after 16-mixed")
    return skips.seen


FUSED: dict[str, Make] = {
    "Adam": partial(torch.optim.Adam, lr=1e-2, foreach=False),
    "fused Adam": partial(torch.optim.Adam, lr=1e-2, fused=True),
    "fused SGD": partial(torch.optim.SGD, lr=0.1, fused=True),  # has no momentum buffer after a skipped first step
}


@check("16-mixed: a step skipped because of overflow does not change the weights, also with fused optimisers", GROUP)
def skipped_steps_touch_nothing(subject: Subject, folder: Path) -> None:
    for name, make in {"its own": subject.optimizer}.items() if subject.optimizer else FUSED.items():
        seen = _fp16_run(subject, make)
        skipped = [i for i in range(1, len(seen)) if seen[i][1] < seen[i - 1][1]]
        require(2 in skipped, f"the GradScaler skipped no step under {name}")
        for i in skipped:
            changed = [key for key, w in seen[i][0].items() if not torch.equal(w, seen[i - 1][0][key])]
            require(not changed, f"{name}: the skipped step {i} changed {changed}")


@check("16-mixed: a fused optimiser ends like the plain one, up to rounding", GROUP)
def fused_fp16_equals_plain(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    plain, fused = (_fp16_run(subject, FUSED[name])[-1][0] for name in ("Adam", "fused Adam"))
    close(plain, fused, "of the fused optimiser")


@check("for-loop, foreach and fused optimisers end with the same weights up to rounding", GROUP)
def kinds_of_steps_agree(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    ends = {}
    for kind in ("plain", "foreach", "fused"):
        how: dict[str, Any] = {"foreach": False} if kind == "plain" else {kind: True}
        module = toys.Toy(optimizer=partial(torch.optim.AdamW, lr=1e-2, **how))
        subject.fit(module)
        some_zeros(module, f"under {kind} AdamW")
        ends[kind] = toys.weights(module)
    for kind in ("foreach", "fused"):
        close(ends["plain"], ends[kind], f"of {kind} AdamW")
