"""Six problems: a network, its loss, training and validation data. None has a test set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Data = tuple[Tensor, Tensor]
WORDS, LENGTH = 32, 32


@dataclass(frozen=True)
class Problem:
    """A network, trained on the first part of ``data()`` and evaluated on the second; ``constant`` is the loss of a constant prediction."""

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[], tuple[Data, Data]]
    loss: Callable[[Tensor, Tensor], Tensor]
    constant: Callable[[Tensor], float]
    epochs: int = 15
    batch: int = 32
    rate: float = 3e-3


# -- data -----------------------------------------------------------------------------------------------------------------


@cache
def waves() -> tuple[Data, Data]:
    """Draw four smooth functions of eight numbers with standard deviation 1 and noise of 0.1."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 4, generator=generator)

    def part(count: int) -> Data:
        x = torch.randn(count, 8, generator=generator)
        y = (x @ mixing / 2).sin() + 0.5 * x[:, :4] * x[:, 4:]
        return x, (y - y.mean(0)) / y.std(0) + 0.1 * torch.randn(count, 4, generator=generator)

    return part(2048), part(1024)


@cache
def digits() -> tuple[Data, Data]:
    """scikit-learn's digits as images of 8 x 8: 1,000 to train on, 400 to validate on; 397 are left out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    return (x[order[:1000]], y[order[:1000]]), (x[order[1000:1400]], y[order[1000:1400]])


@cache
def texts() -> tuple[Data, Data]:
    """Draw texts from a Markov chain with few successors per word."""
    generator = torch.Generator().manual_seed(0)
    chances = (4 * torch.randn(WORDS, WORDS, generator=generator)).softmax(-1)

    def part(count: int) -> Data:
        words = torch.randint(0, WORDS, (count, 1), generator=generator)
        for _ in range(LENGTH):
            words = torch.cat([words, torch.multinomial(chances[words[:, -1]], 1, generator=generator)], 1)
        return words[:, :-1], words[:, 1:]

    return part(768), part(256)


# -- networks -------------------------------------------------------------------------------------------------------------


def mlp(*sizes: int) -> nn.Module:
    """Build linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for here, there in pairwise(sizes):
        layers += [nn.Linear(here, there), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    """Build three convolutions with batch norm, and a head."""
    layers: list[nn.Module] = []
    for here, there, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(here, there, 3, stride, 1, bias=False), nn.BatchNorm2d(there), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Block(nn.Module):
    """Attention by two heads and an MLP, each behind a layer norm."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.first, self.second, self.causal = nn.LayerNorm(width), nn.LayerNorm(width), causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.second(x))
        return out


class Causal(nn.Module):
    """A GPT of two blocks; predicts each next word."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.words(x) + self.places)))
        return out.movedim(-1, 1)


class Vit(nn.Module):
    """Patches of 2 x 2, two blocks, the mean over places."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, width, 2, 2), nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.places)).mean(1))
        return out


class Recurrent(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(8, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x.squeeze(1))[0][:, -1])
        return out


def _entropy(y: Tensor) -> float:
    share = y.flatten().bincount().double() / y.numel()
    return float(-(share * share.clamp(min=1e-12).log()).sum())


CROSS, VARIANCE = functional.cross_entropy, lambda y: float(y.var(0).mean())
PROBLEMS = [
    Problem("MLP, squared loss", partial(mlp, 8, 96, 96, 4), waves, functional.mse_loss, VARIANCE, epochs=20, batch=64),
    Problem("LeNet-300-100", partial(mlp, 64, 300, 100, 10), digits, CROSS, _entropy),
    Problem("convolutions with batch norm", convolutions, digits, CROSS, _entropy),
    Problem("causal transformer", Causal, texts, CROSS, _entropy, epochs=12),
    Problem("ViT", Vit, digits, CROSS, _entropy),
    Problem("GRU", Recurrent, digits, CROSS, _entropy),
]
