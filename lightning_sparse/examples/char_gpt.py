"""A small causal transformer that predicts the next byte of a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse.examples.classifier import Classifier
from lightning_sparse.examples.vit import Block


class CharGPT(Classifier):
    """A pre-norm transformer whose attention sees only earlier bytes: learned positions, a final norm, a Linear layer of scores.

    x has shape (batch, length) with values in 0 to ``vocabulary`` - 1 and length at most ``block``; the scores have shape (batch,
    vocabulary, length). Logs also ``{val,test}/bits``, the cross-entropy in bits a byte: log2 of the perplexity.

    Args:
        vocabulary: number of symbols; 256 for bytes.
        block: most bytes in a window.
        width: features per byte, a multiple of ``heads``.
        depth: number of blocks of attention and a two-layer perceptron with GELU.
        heads: attention heads per block.
        ratio: hidden width of the perceptrons, as a multiple of ``width``.

    Raises ValueError for a size that is not a whole number >= 1, for a ``width`` that is not a multiple of ``heads`` and for
    windows longer than ``block``.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        block: int = 128,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 4,
        lr: float = 3e-3,
        decay: str = "cosine",
        fused: bool = False,
        restart: float | None = None,
    ) -> None:
        super().__init__(lr, decay, fused, restart)
        sizes = {"vocabulary": vocabulary, "block": block, "width": width, "depth": depth, "heads": heads, "ratio": ratio}
        for name, size in sizes.items():
            _checks.whole(name, size, 1)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")
        self.save_hyperparameters()
        blocks = [Block(width, heads, ratio, causal=True) for _ in range(depth)]
        self.layers = nn.Sequential(Symbols(vocabulary, block, width), *blocks, nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores.transpose(1, 2)

    def _evaluate(self, stage: str, x: Tensor, y: Tensor) -> None:
        scores = self(x)
        loss = nn.functional.cross_entropy(scores, y)
        values = {"loss": loss, "bits": loss / math.log(2), "accuracy": (scores.argmax(1) == y).float().mean()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, batch_size=len(y))


class Symbols(nn.Module):
    """(batch, length) of symbols to (batch, length, width): an embedding of each, plus learned positions."""

    def __init__(self, vocabulary: int, block: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, block, width))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.positions.shape[1]:
            raise ValueError(
                f"windows must have at most block={self.positions.shape[1]} symbols, got {length}; give the model a larger block"
            )
        embedded: Tensor = self.embed(x)
        return embedded + self.positions[:, :length]
