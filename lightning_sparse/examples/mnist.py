"""MNIST (70,000 handwritten digits of 28x28) as tensors in memory, read through torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.examples.batches import Batch, Batches, ShuffledBatches

MEAN, STD = 0.1307, 0.3081  # of the training pixels, in [0, 1]
BLACK = float(torch.zeros(()).sub_(MEAN).div_(STD))  # normalised value of a pixel of 0


class MNIST(LightningDataModule):
    """Normalised images x of shape (batch, 1, 28, 28) and labels y. The 60,000 training images are split into two parts.

    Args:
        root: the folder with ``MNIST/raw`` and its four files; if they are missing and ``download`` is on, torchvision
            downloads them into it.
        batch_size: images per batch.
        validation: number of the 60,000 images used for validation, drawn with ``split_seed``; 0 trains on all of them.
        split_seed: seed of the split.
        download: whether to download missing files.
        shift: shift training images by up to ``shift`` pixels in each direction, randomly in each epoch, with the run's seed.

    The run's seed (``seed_everything``) determines the order of the batches. Raises ValueError for a ``validation`` that leaves
    no training image and for a ``shift`` that is not a whole number >= 0. Raises FileNotFoundError, naming the folder and the
    files it needs, if the files are missing and cannot be downloaded.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        validation: int = 12_000,
        split_seed: int = 0,
        download: bool = True,
        shift: int = 0,
    ) -> None:
        super().__init__()
        _checks.between("validation", validation, 0, 60_000, closed="l")
        _checks.positive("batch_size", batch_size)
        self.root, self.batch_size, self.validation = Path(root).expanduser(), batch_size, int(validation)
        self.shift = _checks.whole("shift", shift, 0)
        self.split_seed, self.download = split_seed, _checks.truth("download", download)
        self.parts: dict[str, Batch] = {}

    def prepare_data(self) -> None:
        read(self.root, train=True, download=self.download)

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        x, y = read(self.root, train=True, download=self.download)
        if self.validation >= len(x):
            raise ValueError(f"validation={self.validation} of {len(x)} images in {self.root} leaves no training images")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.split_seed))
        validation, training = order[: self.validation].sort().values, order[self.validation :].sort().values
        self.parts = {"training": (x[training], y[training]), "validation": (x[validation], y[validation])}
        self.parts["test"] = read(self.root, train=False, download=self.download)

    def train_dataloader(self) -> ShuffledBatches:
        return ShuffledBatches(*self.parts["training"], self.batch_size, torch.initial_seed() % 2**31, self.shift, BLACK)

    def val_dataloader(self) -> Batches | list[Batches]:
        return self._large("validation") if self.validation else []

    def test_dataloader(self) -> Batches:
        return self._large("test")

    def predict_dataloader(self) -> Batches:
        return self._large("test")

    def _large(self, part: str) -> Batches:
        return Batches(*self.parts[part], 2000)


def read(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Read normalised images (count, 1, 28, 28) in float32 and labels. Raises FileNotFoundError if the files are missing."""
    from torchvision import datasets  # here, because the import takes seconds

    try:
        dataset = datasets.MNIST(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:  # files not found, no network, or a folder without write permission
        tried = f"downloading failed ({' '.join(str(error).split())})" if download else "download is off"
        raise FileNotFoundError(
            f"no MNIST in {root.resolve() / 'MNIST' / 'raw'}, and {tried}. Give root (--data.root in a recipe) the folder above "
            "MNIST/raw, and put train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            "t10k-labels-idx1-ubyte (not gzipped) there"
        ) from error
    return dataset.data[:, None].float().div_(255).sub_(MEAN).div_(STD), dataset.targets.long()
