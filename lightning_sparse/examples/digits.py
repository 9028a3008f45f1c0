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
    """Digits split into three stratified parts, training, validation and test; pixels scaled to [-1, 1].

    The run's seed (``seed_everything``) determines the order of the batches. Raises ValueError for shares that leave no
    training image.

    Args:
        batch_size: images per batch.
        validation: share of all images used for validation.
        test: share of all images used for testing.
        split_seed: seed of the split.
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
        for name, indices in self._split(labels).items():
            x = torch.from_numpy(images[indices]).float() / 8 - 1
            self.parts[name] = (x, torch.from_numpy(labels[indices]).long())

    def _split(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        validation, test = self.shares
        rest, test_indices = train_test_split(np.arange(len(labels)), test_size=test, stratify=labels, random_state=self.split_seed)
        share = validation / (1 - test)
        training_indices, validation_indices = train_test_split(rest, test_size=share, stratify=labels[rest], random_state=self.split_seed)
        return {"training": training_indices, "validation": validation_indices, "test": test_indices}

    def train_dataloader(self) -> ShuffledBatches:
        x, y = self.parts["training"]
        return ShuffledBatches(x, y, self.batch_size, torch.initial_seed() % 2**31)

    def val_dataloader(self) -> Batches:
        return self._single_batch("validation")

    def test_dataloader(self) -> Batches:
        return self._single_batch("test")

    def predict_dataloader(self) -> Batches:
        return self._single_batch("test")

    def _single_batch(self, part: str) -> Batches:
        x, y = self.parts[part]
        return Batches(x, y, len(x))
