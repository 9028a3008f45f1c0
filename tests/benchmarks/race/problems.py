"""The problems of the race: data as tensors in memory, networks, optimisers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_sparse.examples.char_gpt import CharGPT
from lightning_sparse.examples.resnet import ResNet
from lightning_sparse.examples.text import Text

Part = tuple[Tensor, Tensor]
TRAIN, VALIDATION = 10_000, 5_000  # the first images train; the next ones of the training set validate
WINDOW = 32  # bytes of text


@dataclass(frozen=True)
class Problem:
    """A problem; ``load`` reads (train, validation, test) below a folder of data sets.

    Args:
        title: its name in tables.
        load: reads the data.
        network: makes the network; it is given the file of trained weights, or None.
        optimizer: "adamw", with one cycle of the rate, or "sgd", with momentum .9 and a cosine.
        rate: the highest learning rate.
        batch: images or windows of text a batch.
        share: share of the budget's steps.
        pretrained: start from trained weights.
    """

    title: str
    load: Callable[[Path], tuple[Part, Part, Part]]
    network: Callable[[Path | None], nn.Module]
    optimizer: str
    rate: float
    batch: int = 64
    share: float = 1.0
    pretrained: bool = False

    def steps(self, budget: str) -> int:
        """Return the number of optimiser steps within a budget."""
        return round(BUDGETS[budget] * self.share)


def mnist(folder: Path) -> tuple[Part, Part, Part]:
    """Read MNIST: the first 10,000 training images, the next 5,000 for validation, and the test set."""
    from torchvision.datasets import MNIST  # type: ignore[import-untyped]

    parts = []
    for train in (True, False):
        data = MNIST(str(folder), train=train)
        parts.append((((data.data.float() / 255 - 0.1307) / 0.3081)[:, None], data.targets))
    return _split(*parts)


def cifar(folder: Path) -> tuple[Part, Part, Part]:
    """Read CIFAR-10 from ``CIFAR10/{train,test}.npz`` (``jpeg``: all files' bytes, ``offsets``, ``labels``), normalised."""
    parts = []
    for name, count in (("train", TRAIN + VALIDATION), ("test", None)):
        cached = Path.home() / ".cache" / "lightning_sparse_race" / f"cifar10_{name}.pt"
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.save(_decoded(folder / "CIFAR10" / f"{name}.npz", count), cached)
        parts.append(torch.load(cached))
    return _split(*parts)


def _decoded(file: Path, count: int | None) -> Part:
    import numpy
    from PIL import Image

    stored = numpy.load(file)
    raw, at, labels = stored["jpeg"].tobytes(), stored["offsets"], stored["labels"][:count]
    pictures = [numpy.asarray(Image.open(io.BytesIO(raw[at[i] : at[i + 1]])).convert("RGB")) for i in range(len(labels))]
    x = torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean) / deviation, torch.from_numpy(labels).long()


def text(folder: Path) -> tuple[Part, Part, Part]:
    """Read Python's language reference, which comes with Python, as windows of bytes and the byte after each; no file of the folder."""
    data = Text(block=WINDOW)
    data.setup("fit")
    parts = []
    for name in ("training", "validation", "test"):
        part = data.parts[name].long()
        end = (len(part) - 1) // WINDOW * WINDOW
        parts.append((part[:end].view(-1, WINDOW), part[1 : end + 1].view(-1, WINDOW)))
    return parts[0], parts[1], parts[2]


def _split(training: Part, test: Part) -> tuple[Part, Part, Part]:
    (x, y), end = training, TRAIN + VALIDATION
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:end], y[TRAIN:end]), test


def lenet(weights: Path | None = None) -> nn.Module:
    """LeNet-300-100."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def convolutions(weights: Path | None = None) -> nn.Module:
    """Four convolutions, each with batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(y)) + self.shortcut(x))


def resnet(weights: Path | None = None) -> nn.Module:
    """A stem with stride 2 and three blocks of 16, 32 and 64 channels."""
    stem = (nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def transformer(weights: Path | None = None) -> nn.Module:
    """A causal transformer with two blocks of width 64."""
    return CharGPT(block=WINDOW, width=64, depth=2)


def resnet20(weights: Path | None = None) -> nn.Module:
    """ResNet-20, from the given weights."""
    if weights is None:
        raise ValueError("fine-tuning starts from trained weights: give --weights FILE, a state_dict of ResNet-20 for CIFAR-10")
    return ResNet(20, weights=str(weights)).layers


PROBLEMS = {
    "lenet": Problem("LeNet-300-100, AdamW, 10,000 images of MNIST", mnist, lenet, "adamw", 2e-3),
    "convolutions": Problem("4 convolutions with batch norm, AdamW, 10,000 images of MNIST", mnist, convolutions, "adamw", 5e-3),
    "convolutions_sgd": Problem("4 convolutions with batch norm, SGD, 10,000 images of MNIST", mnist, convolutions, "sgd", 0.1),
    "resnet": Problem("small ResNet, AdamW, 10,000 images of CIFAR-10", cifar, resnet, "adamw", 5e-3),
    "resnet_sgd": Problem("small ResNet, SGD, 10,000 images of CIFAR-10", cifar, resnet, "sgd", 0.1),
    "transformer": Problem("causal transformer, AdamW, bytes of text", text, transformer, "adamw", 3e-3, 32),
    "finetune": Problem(
        "ResNet-20 from trained weights, SGD, 10,000 images of CIFAR-10", cifar, resnet20, "sgd", 0.01, share=0.2, pretrained=True
    ),
}
BUDGETS = {"short": 1_500, "long": 15_000}  # optimiser steps; a problem may take a share of them
