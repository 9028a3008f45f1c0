"""The three timed networks, as Classifiers with fused Adam."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sparse.examples.classifier import Classifier
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.examples.vit import Block, Mean

CLASSES = 10
WORDS = 1000  # in the transformer's vocabulary
TOKENS, WIDTH, DEPTH, HEADS, RATIO = 128, 256, 6, 4, 4


class ResNet18(Classifier):
    """torchvision's ResNet-18 for images of 32x32: a 3x3 stem of stride 1 and no pooling after it; x is (batch, 3, 32, 32)."""

    def __init__(self) -> None:
        from torchvision.models import resnet18  # takes seconds to import

        super().__init__(lr=1e-3, fused=True)
        self.layers = resnet18(num_classes=CLASSES)
        self.layers.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.layers.maxpool = nn.Identity()


class Words(nn.Module):
    """Embed word numbers (batch, tokens) as (batch, tokens, width): word vector plus position vector."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.words(x)
        return embedded + self.positions


class Transformer(Classifier):
    """Six pre-norm blocks of width 256 with 4 heads, a mean over the 128 tokens and a Linear head; x is (batch, 128), int64.

    Every matrix of the blocks is a plain Linear layer: ``nn.MultiheadAttention`` keeps three in one parameter and bypasses
    its output layer's forward, so that noise on outputs would not reach it and the timed job would be a smaller one.
    """

    def __init__(self) -> None:
        super().__init__(lr=1e-3, fused=True)
        blocks = [Block(WIDTH, HEADS, RATIO) for _ in range(DEPTH)]
        self.layers = nn.Sequential(Words(), *blocks, Mean(WIDTH), nn.Linear(WIDTH, CLASSES))


def lenet() -> MLP:
    """Build LeNet-300-100; x is (batch, 1, 28, 28)."""
    return MLP([784, 300, 100, CLASSES], fused=True)
