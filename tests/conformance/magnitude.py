"""A simple pruning callback, the base of broken callbacks in several tests."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn


class Magnitude(Callback):
    """Set half of every weight matrix (a quarter of small ones) to zero after each step."""

    def matrices(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters() if p.dim() > 1}

    @torch.no_grad()
    def prune(self, module: nn.Module) -> None:
        for parameter in self.matrices(module).values():
            share = 0.5 if parameter.numel() >= 48 else 0.25
            parameter[parameter.abs() <= parameter.abs().flatten().quantile(share)] = 0.0

    def figures(self, module: nn.Module) -> dict[str, float]:
        counts = {name: (int((p == 0).sum()), p.numel()) for name, p in self.matrices(module).items()}
        total = sum(zeros for zeros, _ in counts.values()) / sum(size for _, size in counts.values())
        return {"sparsity/total": total} | {f"sparsity/{name}": zeros / size for name, (zeros, size) in counts.items()}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.prune(module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        module.log_dict(self.figures(module))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.prune(module)
