"""Any classifier of torchvision by its name, and folders of images of any size, for runs on large data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sparse import _checks
from lightning_sparse.examples.cifar10 import MEAN, STD
from lightning_sparse.examples.classifier import OPTIMIZERS, Classifier, sgd_or_adamw
from lightning_sparse.examples.resnet import load_weights

_PARTS = ("train", "val")


class Vision(Classifier):
    """A classifier of torchvision, trained by SGD with Nesterov's momentum or AdamW; the learning rate decays to 0.

    Args:
        name: torchvision's name of the network: "resnet50", "vit_b_16", ...
        weights: a name of torchvision's weights ("IMAGENET1K_V1", "DEFAULT"), which are downloaded, or a file of torch.save with a
            state_dict; None starts from torchvision's initialisation.
        classes: number of classes; the weights have to have as many.
        optimizer: "sgd" or "adamw".
        momentum: of SGD.
        weight_decay: of either optimiser.

    Raises ValueError, with the closest names, for an unknown network and an unknown optimiser, and for weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        classes: int = 1000,
        lr: float = 0.1,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay: str = "cosine",
        fused: bool = False,
        restart: float | None = None,
    ) -> None:
        super().__init__(lr, decay, fused, restart)
        from torchvision import models  # here, because the import takes seconds

        self.save_hyperparameters(ignore=["weights"])  # because a checkpoint brings its own weights
        _checks.one_of("name", name, models.list_models(module=models))
        _checks.whole("classes", classes, 2)
        self.optimizer_name = _checks.one_of("optimizer", optimizer, OPTIMIZERS)
        self.momentum = _checks.between("momentum", momentum, 0, 1, closed="l")
        self.weight_decay = _checks.between("weight_decay", weight_decay, 0, float("inf"), closed="l")
        known = [one.name for one in models.get_model_weights(name)]
        named = weights if weights == "DEFAULT" or weights in known else None
        self.layers = models.get_model(name, weights=named, num_classes=classes)
        if weights is not None and named is None:
            if not Path(weights).expanduser().is_file():
                hint = _checks.closest(weights, known)
                raise ValueError(f"weights must be a file or one of {', '.join([*known, 'DEFAULT'])}, got {weights!r}{hint}")
            load_weights(self.layers, weights)

    def _optimizer(self) -> torch.optim.Optimizer:
        return sgd_or_adamw(self.parameters(), self.optimizer_name, self.lr, self.momentum, self.weight_decay, self.fused)


class ImageFolders(LightningDataModule):
    """Images of ``root/train/CLASS/`` and ``root/val/CLASS/`` as normalised x of shape (batch, 3, image, image), and labels y.

    Training images are cropped and resized at random and flipped left to right half of the time, validation images are resized and
    cropped at their centre. ``test`` and ``predict`` read ``val`` too, because ImageNet's test labels are not public: choose
    settings on a part of ``train``.

    Args:
        root: the folder of ``train`` and ``val``.
        batch_size: images per batch and process.
        image: side length of an image in pixels.
        workers: processes that read images; 0 reads in the training process.
        mean: mean of each channel, in [0, 1], that is subtracted.
        std: the value that each channel is then divided by.

    Raises FileNotFoundError, naming the folder, where ``train`` or ``val`` is missing.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        batch_size: int = 256,
        image: int = 224,
        workers: int = 8,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        self.root, self.mean, self.std = Path(root).expanduser(), list(mean), list(std)
        self.batch_size, self.image = _checks.whole("batch_size", batch_size, 1), _checks.whole("image", image, 1)
        self.workers = _checks.whole("workers", workers, 0)
        self.parts: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        from torchvision import datasets  # here, because the import takes seconds
        from torchvision.transforms import v2

        if self.parts:
            return
        missing = [name for name in _PARTS if not (self.root / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"no folder {' and '.join(missing)} in {self.root.resolve()}; give root (--data.root in a recipe) the folder of train and "
                "val, each with one folder of images for each class"
            )
        last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        varied = v2.Compose([v2.RandomResizedCrop(self.image, antialias=True), v2.RandomHorizontalFlip(), *last])
        plain = v2.Compose([v2.Resize(round(self.image * 256 / 224), antialias=True), v2.CenterCrop(self.image), *last])
        self.parts = {
            name: datasets.ImageFolder(str(self.root / name), transform)
            for name, transform in zip(_PARTS, (varied, plain), strict=True)
        }  # fmt: skip
        if self.parts["train"].classes != self.parts["val"].classes:
            raise ValueError(f"train and val of {self.root} must have the same folders of classes")

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("val")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("val")

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            self.parts[part], self.batch_size, shuffle, num_workers=self.workers, pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0, drop_last=shuffle and len(self.parts[part]) > self.batch_size,
        )  # fmt: skip
