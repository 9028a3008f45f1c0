"""Small networks of many architectures, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASSES, FEATURES = 3, 8


def batches(kind: str, count: int = 2, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Draw ``count`` batches of random inputs (``kind``: vectors, tokens or images) and labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"vectors": (FEATURES,), "images": (3, 32, 32)}
    result = []
    for _ in range(count):
        x = torch.randint(10, (size, 5), generator=generator) if kind == "tokens" else torch.randn(size, *shapes[kind], generator=generator)
        result.append((x, torch.randint(CLASSES, (size,), generator=generator)))
    return result


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class Attention(nn.Module):
    """An encoder layer, which has a fused path in evaluation, followed by nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.embedding(tokens))
        out: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return out


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers, followed by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(self.lstm(self.embedding(tokens))[0])[0][:, -1])
        return out


class Tied(nn.Module):
    """Embedding and output layer share one matrix. ``seen`` records its values at both uses in each training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens))).mean(1)
        first = self.embedding.weight.detach().clone()
        out: Tensor = self.head(hidden)
        if self.training:
            self.seen.append((first, self.head.weight.detach().clone()))
        return out


class Computed(nn.Module):
    """Layers with weight_norm and spectral_norm (parametrisations, or hooks if ``old``), and a plain layer."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        kind: Any = nn.utils if old else nn.utils.parametrizations
        self.normed = kind.weight_norm(nn.Linear(FEATURES, 16))
        self.spectral = kind.spectral_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.spectral(torch.relu(self.normed(x)))))
        return out


class ComplexLayer(nn.Module):
    """A complex layer between two real layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wave, self.head = nn.Linear(FEATURES, 16), nn.Linear(16, 8, dtype=torch.complex64), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.wave(self.first(x).to(torch.complex64)).abs())
        return out


class SparseEmbedding(nn.Module):
    """An embedding with sparse gradients and a plain head; needs an optimiser that supports sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8, sparse=True), nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens).mean(1))
        return out


class Quantised(nn.Module):
    """A dynamically quantised layer without parameters, and a plain head."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = torch.ao.nn.quantized.dynamic.Linear(FEATURES, 16)  # its weights are uninitialised memory
        self.body.set_weight_bias(torch.quantize_per_tensor(0.2 * torch.randn(16, FEATURES), 0.01, 0, torch.qint8), torch.zeros(16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def generator(channels: int = 8) -> nn.Module:
    """Build DCGAN's generator, from noise (4, 1, 1) to images (3, 16, 16)."""
    return nn.Sequential(
        nn.ConvTranspose2d(4, 2 * channels, 4, 1, 0, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def discriminator(channels: int = 8) -> nn.Module:
    """Build DCGAN's discriminator of images (3, 16, 16)."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * channels, 1, 4, 1, 0, bias=False),
        nn.Flatten(),
    )


class Conv1D(nn.Module):
    """A linear layer with a custom weight of shape (in, out), as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """The sum of several linear experts; their matrices are stacked in one 3-D parameter."""

    def __init__(self, width: int, count: int = 2) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(count, width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eij->bj", x, self.gate_up)


def own_layers() -> nn.Sequential:
    """Build a network with most of its weights in custom layers."""
    return nn.Sequential(Conv1D(FEATURES, 32), nn.ReLU(), Experts(32), nn.ReLU(), nn.Linear(32, CLASSES))
