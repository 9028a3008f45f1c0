"""Shown: what the module holds outside a training step: true zeros in validation, and at last its own weights again."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse.callbacks import _faults, _swaps
from lightning_sparse.callbacks._saved import Saved


class Shown(Saved):
    """A form whose zeros are true wherever the network is evaluated, and undone before it trains on."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            _faults.check_weights(self)
            self.attachment.restore()
            self._swaps.begin(self, trainer)
            self.attachment.show_in_forwards(pl_module)  # others are about to exchange the weights

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.attachment is not None and not self.attachment.shown:
            self.attachment.end_forwards()
            self._swaps.look(self)
            self.attachment.show()

    def evaluated(self, name: str) -> Tensor:
        swapped = self.attachment is not None and self.attachment.shown  # then the module holds the average, which holds the weights
        average = None if self._averages is None or swapped else self._averages.saved.get(name)
        return self._live(name) if average is None else average.detach().to(self.parameters[name].device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            _swaps.check_undone(self, trainer, pl_module)
            self.attachment.restore()  # what was exchanged goes back as it came
            self.attachment.show_in_forwards(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.end_forwards()
            self.attachment.restore()

    def _release(self) -> None:
        """Live weights back; optimisers no longer listened to."""
        if self.attachment is not None:
            self.attachment.end_forwards()
            self.attachment.restore()
        for handle in self._handles:
            handle.remove()
        self._handles, self._batch = [], None
        self.engine.clear()

    def _close(self) -> None:
        """Live weights back, hooks removed."""
        self._release()
        if self.attachment is not None:
            self.attachment.detach()
        self.attachment = None

    def _let_averages_go(self) -> None:
        """Not after an exception: a file that is written then holds the average."""
        if self._averages is not None:
            self._averages.detach()
