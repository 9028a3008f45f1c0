"""CIFAR-10 (60,000 colour images of 32x32) as tensors in memory, read from npz files or through torchvision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.examples.batches import Batch, Batches, ShuffledBatches, moved

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], as many pretrained networks use


class CIFAR10(LightningDataModule):
    """Normalised images x of shape (batch, 3, 32, 32) and labels y. The 50,000 training images are split by a seed.

    Reads ``train.npz`` and ``test.npz`` in ``root`` or in ``root/CIFAR10`` if they are there: ``labels``, and either ``images``,
    uint8 of shape (count, 32, 32, 3), or ``jpeg``, the bytes of all JPEG files one after the other, with ``offsets`` (count + 1).
    Else reads torchvision's ``root/cifar-10-batches-py``. Images are decoded once and kept as bytes; flips, shifts and the
    normalisation are tensor operations on each batch.

    Args:
        root: the folder of the files; if they are missing and ``download`` is on, torchvision downloads them into it.
        batch_size: images per training batch.
        validation: number of the training images used for validation, drawn with ``split_seed``; 0 trains on all of them.
        images: number of the other training images to train on, drawn with ``split_seed``; None trains on all of them.
        split_seed: seed of the split.
        download: whether to download missing files.
        flip: flip each training image left to right with probability 1/2 in each epoch, with the run's seed.
        shift: shift training images by up to ``shift`` pixels in each direction, randomly in each epoch, with the run's seed.
        mean: mean of each channel, in [0, 1], that is subtracted.
        std: the value that each channel is then divided by.

    The run's seed (``seed_everything``) determines the order of the batches. Raises ValueError for numbers of images that leave
    none to train on or that the files do not hold, and for a ``mean`` or ``std`` that has not three numbers. Raises
    FileNotFoundError, naming the folder and the files it needs, if the files are missing and cannot be downloaded.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        validation: int = 5000,
        images: int | None = None,
        split_seed: int = 0,
        download: bool = True,
        flip: bool = True,
        shift: int = 4,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        self.root, self.download, self.flip = Path(root).expanduser(), _checks.truth("download", download), _checks.truth("flip", flip)
        self.batch_size, self.validation = _checks.whole("batch_size", batch_size, 1), _checks.whole("validation", validation, 0)
        self.images = None if images is None else _checks.whole("images", images, 1)
        self.split_seed, self.shift = split_seed, _checks.whole("shift", shift, 0)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"{name} must have one number for each of 3 channels, got {values!r}")
        self.mean = torch.tensor(list(mean)).view(3, 1, 1)
        self.std = torch.tensor([_checks.positive("each of std", value) for value in std]).view(3, 1, 1)
        self.parts: dict[str, Batch] = {}

    def prepare_data(self) -> None:
        if archive(self.root, train=True) is None:
            _from_torchvision(self.root, train=True, download=self.download)

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        x, y = read(self.root, train=True, download=self.download)
        most = len(x) - self.validation
        if most < (self.images or 1):
            raise ValueError(f"validation={self.validation} of {len(x)} images in {self.root} leaves {max(most, 0)} to train on, too few")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.split_seed))
        end = len(x) if self.images is None else self.validation + self.images
        validation, training = order[: self.validation].sort().values, order[self.validation : end].sort().values
        self.parts = {"training": (x[training], y[training]), "validation": (x[validation], y[validation])}
        self.parts["test"] = read(self.root, train=False, download=self.download)

    def train_dataloader(self) -> Augmented:
        x, y = self.parts["training"]
        return Augmented(x, y, self.batch_size, torch.initial_seed() % 2**31, self.mean, self.std, self.flip, self.shift)

    def val_dataloader(self) -> Batches | list[Batches]:
        return self._large("validation") if self.validation else []

    def test_dataloader(self) -> Batches:
        return self._large("test")

    def predict_dataloader(self) -> Batches:
        return self._large("test")

    def _large(self, part: str) -> Batches:
        return Normalised(*self.parts[part], 500, self.mean, self.std)


class Normalised(Batches):
    """Batches of bytes (count, 3, height, width), in order, as ``(x / 255 - mean) / std`` in float32."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, mean: Tensor, std: Tensor) -> None:
        super().__init__(x, y, batch_size)
        self.mean, self.std = mean, std

    def __iter__(self) -> Iterator[Batch]:
        for part in self.order().split(self.batch_size):
            yield normalised(self.x[part], self.mean, self.std), self.y[part]


class Augmented(ShuffledBatches):
    """Shuffled batches of bytes, flipped and shifted (black outside the image), then normalised.

    All draws depend only on seed and epoch, so a resumed run repeats them.
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, seed: int, mean: Tensor, std: Tensor, flip: bool = True, shift: int = 0
    ) -> None:
        super().__init__(x, y, batch_size, seed, shift)
        self.mean, self.std, self.flip = mean, std, flip

    def __iter__(self) -> Iterator[Batch]:
        draws = self._generator(2**40)
        offsets = torch.randint(2 * self.shift + 1, (len(self.x), 2), generator=draws)
        flips = torch.randint(2, (len(self.x),), generator=draws, dtype=torch.bool) if self.flip else torch.zeros(len(self.x)).bool()
        for part in self.order().split(self.batch_size):
            x = moved(self.x[part], offsets[part], self.shift, 0) if self.shift else self.x[part]
            x = torch.where(flips[part][:, None, None, None], x.flip(-1), x)
            yield normalised(x, self.mean, self.std), self.y[part]


def normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(x / 255 - mean) / std`` in float32 of bytes x (count, 3, height, width); mean and std have shape (3, 1, 1)."""
    return x.float().div_(255).sub_(mean).div_(std)


def archive(root: Path, train: bool) -> Path | None:
    """Return ``train.npz`` or ``test.npz`` in ``root`` or ``root/CIFAR10``, or None if neither is there."""
    name = "train.npz" if train else "test.npz"
    return next((path for path in (root / name, root / "CIFAR10" / name) if path.is_file()), None)


def read(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Read images as bytes (count, 3, 32, 32) and labels. Raises FileNotFoundError if the files are missing."""
    path = archive(root, train)
    images, labels = _from_torchvision(root, train, download) if path is None else _from_npz(path)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels).long()


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as file:
        if "labels" not in file or not ("images" in file or {"jpeg", "offsets"} <= set(file.files)):
            raise ValueError(f"{path} must hold labels, and images or jpeg and offsets; it holds {', '.join(file.files) or 'nothing'}")
        labels = file["labels"]
        images = file["images"] if "images" in file else decoded(file["jpeg"], file["offsets"])
    return images, labels


def decoded(jpeg: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Decode JPEG files to bytes (count, height, width, 3); file i is ``jpeg[offsets[i]:offsets[i + 1]]``."""
    import io

    from PIL.Image import open as read_image

    data = jpeg.tobytes()
    files = (io.BytesIO(data[begin:end]) for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    return np.stack([np.asarray(read_image(file).convert("RGB")) for file in files])


def _from_torchvision(root: Path, train: bool, download: bool) -> tuple[np.ndarray, list[int]]:
    from torchvision import datasets  # here, because the import takes seconds

    try:
        dataset = datasets.CIFAR10(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:  # files not found, no network, or a folder without write permission
        tried = f"downloading failed ({' '.join(str(error).split())})" if download else "download is off"
        raise FileNotFoundError(
            f"no CIFAR-10 in {root.resolve()}, and {tried}. Give root (--data.root in a recipe) the folder above "
            "cifar-10-batches-py, or one with train.npz and test.npz"
        ) from error
    return dataset.data, dataset.targets
