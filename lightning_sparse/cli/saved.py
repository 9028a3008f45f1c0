"""A trained module with the data of its run: test metrics and example inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_sparse.cli.errors import UsageError
from lightning_sparse.export.conversion import copied

_NO_TEST_DATA = LightningDataModule.test_dataloader  # which raises an error


@dataclass(frozen=True)
class Saved:
    """A checkpoint's module in eval mode on the CPU, the data of its run, or None, and the names of the weights selected in training."""

    file: Path
    module: LightningModule
    data: Any
    selected: tuple[str, ...] = ()

    def test(self, module: LightningModule | None = None) -> dict[str, float]:
        """Return the metrics of the test set, of another module of this class if one is given.

        Empty without a test set or test step, and for a module that was moved to a GPU.
        """
        if any(p.is_cuda for p in self.module.parameters()):
            return {}
        return test_metrics(self.module if module is None else module, self.data)

    def on_gpu(self) -> Saved:
        """Return it with a copy of the module on the GPU in bfloat16; as it is where there is none."""
        if not torch.cuda.is_available():
            return self
        return Saved(self.file, copied(self.module).cuda().bfloat16(), self.data, self.selected)

    def inputs(self) -> tuple[Any, ...]:
        """Return the forward's arguments: the module's ``example_input_array``, else the first entry of a batch of the data."""
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.zeros(0))
        found = example_inputs(self.module, self.data)
        return tuple(x.to(like) if isinstance(x, Tensor) and x.is_floating_point() else _moved(x, like.device) for x in found)


def test_metrics(model: LightningModule, data: Any) -> dict[str, float]:
    """Return the metrics of ``test_step``, without a logger; an empty dict if the model has no test step or there is no data."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    if data is None or type(model).test_step is LightningModule.test_step or type(data).test_dataloader is _NO_TEST_DATA:
        return {}
    with silence_device_messages():
        found = Trainer(accelerator="cpu", devices=1, **quiet).test(model, datamodule=data, verbose=False)
    return {name: float(value) for metrics in found for name, value in metrics.items()}


@contextmanager
def silence_device_messages() -> Iterator[None]:
    """Silence the Trainer's messages about devices, because the first Trainer has printed them already."""
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = notes.level
    notes.setLevel(logging.WARNING)
    try:
        yield
    finally:
        notes.setLevel(level)


def example_inputs(module: LightningModule, data: Any) -> tuple[Any, ...]:
    """Return the forward's arguments: the module's ``example_input_array``, else the first entry of a batch. Raises UsageError without."""
    own = getattr(module, "example_input_array", None)
    if own is not None:
        return tuple(own) if isinstance(own, (tuple, list)) else (own,)
    for batch in _batches(data):
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if isinstance(first, Tensor):
            return (first,)
    name = type(module).__name__
    raise UsageError(f"no example inputs: {name} has no example_input_array, and no batch of the data is a tensor or begins with one")


def _moved(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _batches(data: Any) -> Iterator[Any]:
    """Yield the first batch of the test data, of the validation data and of the training data."""
    if data is None:
        return
    data.prepare_data()
    for stage, name in (("test", "test_dataloader"), ("validate", "val_dataloader"), ("fit", "train_dataloader")):
        try:
            data.setup(stage)
            found = getattr(data, name)()
        except Exception:  # a data module may lack any of them
            continue
        loader = found[0] if isinstance(found, (list, tuple)) and found else found
        for batch in () if loader is None else loader:
            yield batch
            break
