"""A small vision transformer in which every matrix is a Linear layer, so that noise and curvature apply to all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_sparse import _checks
from lightning_sparse.examples.classifier import Classifier


class ViT(Classifier):
    """A pre-norm transformer on patches of square images with one channel: learned positions, mean over tokens, a Linear head.

    x has shape (batch, 1, image, image) and is split into (image / patch)^2 tokens. With the defaults the Linear layers have
    134,848 weights (49 * 64 + 4 * (4 * 64^2 + 2 * 64 * 128) + 64 * 10), without positions, norms and biases.

    Args:
        image: side length of an image in pixels, a multiple of ``patch``.
        patch: side length of a patch in pixels.
        width: features per token, a multiple of ``heads``.
        depth: number of blocks of attention and a two-layer perceptron with GELU.
        heads: attention heads per block.
        ratio: hidden width of the perceptrons, as a multiple of ``width``.
        classes: number of classes.

    Raises ValueError for a size that is not a whole number >= 1 and for one that is not the required multiple.
    """

    def __init__(
        self,
        image: int = 28,
        patch: int = 7,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 2,
        classes: int = 10,
        lr: float = 1e-3,
        decay: str = "cosine",
        fused: bool = False,
        restart: float | None = None,
    ) -> None:
        super().__init__(lr, decay, fused, restart)
        sizes = {"image": image, "patch": patch, "width": width, "depth": depth, "heads": heads, "ratio": ratio, "classes": classes}
        for name, size in sizes.items():
            _checks.whole(name, size, 1)
        _check_multiple("image", image, "patch", patch)
        _check_multiple("width", width, "heads", heads)
        self.save_hyperparameters()
        blocks = [Block(width, heads, ratio) for _ in range(depth)]
        self.layers = nn.Sequential(Tokens(image // patch, patch, width), *blocks, Mean(width), nn.Linear(width, classes))


def _check_multiple(name: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        raise ValueError(f"{name} must be a multiple of {of}, got {name}={value} and {of}={unit}")


class Tokens(nn.Module):
    """(batch, 1, rows * patch, rows * patch) to (batch, rows^2, width): a Linear layer of each patch, plus learned positions."""

    def __init__(self, rows: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, rows * rows, width))

    def forward(self, x: Tensor) -> Tensor:
        patches = functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        embedded: Tensor = self.embed(patches)
        return embedded + self.positions


class Attention(nn.Module):
    """softmax(q k^T / sqrt(width / heads)) v in each head, then a Linear layer; shapes (batch, tokens, width).

    A ``causal`` one gives each token only those up to itself.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed: Tensor = self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int, ratio: int, causal: bool = False) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, causal))
        inner = ratio * width
        self.perceptron = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        mixed: Tensor = x + self.perceptron(x)
        return mixed


class Mean(nn.Module):
    """The mean of the normalised tokens, (batch, tokens, width) to (batch, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.norm(x).mean(1)
        return mean
