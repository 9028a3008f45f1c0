"""Networks with coupled channels, for the tests of groups and of shrinking."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with batch norm around a skip connection, a depthwise convolution, and a Linear head after pooling."""

    def __init__(self, width: int = 12, inner: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.first, self.norm1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.second, self.norm2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.head = nn.Linear(width * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()
        scores: Tensor = self.head(nn.functional.adaptive_avg_pool2d(self.depth(x), 2).flatten(1))
        return scores


class Encoder(nn.Module):
    """One pre-norm attention block with separate q, k, v and o, and a gated MLP."""

    def __init__(self, width: int = 12, heads: int = 3, inner: int = 10) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))
        return mixed


class Decoder(nn.Module):
    """Causal grouped-query attention without a skip connection to the input, and a gated MLP; two heads of keys serve four of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_heads = 4, 2
        self.q_proj, self.o_proj = nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)
        self.k_proj, self.v_proj = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        x = x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return mixed


class Tied(nn.Module):
    """Two layers that share one matrix; the neurons between them are rows and columns of it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return scores


class Branching(nn.Module):
    """A forward whose path depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head((self.a(x) if x.sum() > 0 else self.b(x)).relu())
        return scores


def seeded(network: type[nn.Module], *sizes: int) -> nn.Module:
    """Build a network with seed 0; batch norms get random scales and statistics."""
    torch.manual_seed(0)
    built = network(*sizes)
    for part in built.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return built
