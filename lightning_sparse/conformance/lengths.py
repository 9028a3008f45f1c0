"""Runs of unknown or changing length: schedules end with the run, not earlier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import zeros
from lightning_sparse.conformance.steps import GROUP, some_zeros


class Stream(IterableDataset[Any]):
    """An iterable dataset of the toy data, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter([*toys.data()])


def stream() -> DataLoader[Any]:
    """Build a loader of the toy data without a length."""
    return DataLoader(Stream(), batch_size=None)


class _First(Callback):
    """Count the zeros after the first batch."""

    zeros: int | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.zeros = zeros(pl_module) if self.zeros is None else self.zeros


@check("a loader without length: refused before training with a message that names max_steps, or the schedule does not end at once", GROUP)
def unknown_length_is_refused_or_works(subject: Subject, folder: Path) -> None:
    module = subject.model()
    before, first = toys.weights(module), _First()
    try:
        subject.fit(module, first, loader=stream(), epochs=4)
    except Exception as error:
        touched = [name for name, w in toys.weights(module).items() if not torch.equal(w, before[name])]
        require(first.zeros is None and not touched, f"it failed during the run, with {touched} changed: {error}")
        require("max_steps" in str(error), f"the refusal does not name max_steps: {error}")
        limited = subject.model()
        subject.fit(limited, loader=stream(), epochs=-1, max_steps=16)
        some_zeros(limited, "with max_steps")
    else:
        end = zeros(module)
        require(first.zeros is not None and 2 * first.zeros <= end, f"{first.zeros} of the final {end} zeros appeared in the first batch")


class Shrinking(toys.Toy):
    """A toy with six batches in the first epoch and two in each later epoch, always the same batch."""

    lengths = (6, 2, 2, 2)

    def train_dataloader(self) -> Any:
        batch = next(iter(toys.data()))
        return toys.Repeated(batch, self.lengths[self.trainer.current_epoch])


class Even(Shrinking):
    """A toy with the same total number of batches, three in each epoch."""

    lengths = (3, 3, 3, 3)


@check("epochs of changing length end with as many zeros as equal epochs with the same number of batches", GROUP)
def changing_lengths_keep_the_zeros(subject: Subject, folder: Path) -> None:
    counts = []
    for kind in (Shrinking, Even):
        options: Any = {"optimizer": subject.optimizer} if subject.optimizer else {}
        module = kind(**options)
        torch.manual_seed(0)
        subject.trainer(epochs=4, reload_dataloaders_every_n_epochs=1).fit(module)
        counts.append(zeros(module))
    require(abs(counts[0] - counts[1]) <= 2, f"{counts[0]} weights are zero, {counts[1]} with equal epochs")
