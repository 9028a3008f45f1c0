"""Networks with zeros, and a table of gains that measures nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_sparse.export import Gain, Table


def zeroed(module: nn.Module, zeros: float = 0.9, seed: int = 0) -> nn.Module:
    """Set a random share of every matrix to zero; biases become random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < zeros, 0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


def mlp(zeros: float = 0.9) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10, bias=False))
    return zeroed(network, zeros)  # type: ignore[return-value]


def encoder(batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=norm_first)
    return zeroed(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first))  # type: ignore[return-value]


class Known(Table):
    """A table whose gains are given by layout; counts how often it is asked to measure."""

    def __init__(self, folder: Path | None = None, **gains: float) -> None:
        super().__init__(folder)
        self.gains, self.measured = gains, 0

    def _measure(self, weight: torch.Tensor, bias: torch.Tensor | None, layout: str, block: int, batch_size: int) -> Gain:
        self.measured += 1
        gain = self.gains[f"{layout}_{weight.shape[0]}"] if f"{layout}_{weight.shape[0]}" in self.gains else self.gains.get(layout, 0.5)
        return Gain(gain, gain, 1.0)
