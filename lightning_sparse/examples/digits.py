"""scikit-learn's handwritten digits (1797 images of 8x8, shipped with scikit-learn) as tensors in memory."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lightning_sparse import _checks
from lightning_sparse.examples.batches import Batch, Batches, ShuffledBatches


class Digits(LightningDataModule):
    """Digits in three stratified parts: training, validation and test; pixels scaled to [-1, 1].

    The run's own seed (``seed_everything``) gives the order of the batches. Raises ValueError for shares that leave no
    training image.

    Args:
        batch_size: images in a batch.
        validation: the share of all images that is for validation.
        test: the share that is for testing.
        split_seed: decides which images go where.
    """

    def __init__(self, batch_size: int = 64, validation: float = 0.2, test: float = 0.2, split_seed: int = 0) -> None:
        super().__init__()
        _checks.between("validation", validation, 0, 1)
        _checks.between("test", test, 0, 1)
        _checks.between("validation + test", validation + test, 0, 1)
        _checks.positive("batch_size", batch_size)
        self.batch_size, self.shares, self.split_seed = batch_size, (validation, test), split_seed
        self.parts: dict[str, Batch] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        images, labels = load_digits(return_X_y=True)
        for name, rows in self._rows(labels).items():
            x = torch.from_numpy(images[rows]).float() / 8 - 1
            self.parts[name] = (x, torch.from_numpy(labels[rows]).long())

    def _rows(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        validation, test = self.shares
        rows = np.arange(len(labels))
        rest, tested = train_test_split(rows, test_size=test, stratify=labels, random_state=self.split_seed)
        share = validation / (1 - test)
        trained, validated = train_test_split(rest, test_size=share, stratify=labels[rest], random_state=self.split_seed)
        return {"training": trained, "validation": validated, "test": tested}

    def train_dataloader(self) -> ShuffledBatches:
        x, y = self.parts["training"]
        return ShuffledBatches(x, y, self.batch_size, torch.initial_seed() % 2**31)

    def val_dataloader(self) -> Batches:
        return self._whole("validation")

    def test_dataloader(self) -> Batches:
        return self._whole("test")

    def predict_dataloader(self) -> Batches:
        return self._whole("test")

    def _whole(self, part: str) -> Batches:
        x, y = self.parts[part]
        return Batches(x, y, len(x))
