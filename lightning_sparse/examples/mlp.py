"""A multi-layer perceptron for classification."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from lightning_sparse import _checks
from lightning_sparse.examples.classifier import Classifier


class MLP(Classifier):
    """Linear layers of widths ``sizes`` with ReLU between them. LeNet-300-100 is ``sizes=[784, 300, 100, 10]``.

    x is flattened to (batch, sizes[0]). Raises ValueError for fewer than two sizes.

    Args:
        sizes: the widths, from inputs to classes.
        init_std: initialise weights from N(0, init_std^2); None uses torch's initialisation.
    """

    def __init__(
        self,
        sizes: list[int],
        lr: float = 1e-3,
        decay: str = "cosine",
        fused: bool = False,
        init_std: float | None = None,
        restart: float | None = None,
    ) -> None:
        super().__init__(lr, decay, fused, restart)
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least the inputs and the classes, got {sizes!r}")
        for size in sizes:
            _checks.positive("each of sizes", size)
        self.save_hyperparameters()
        pairs = itertools.pairwise(sizes)
        layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *layers[:-1])
        if init_std is not None:
            self._initialise(_checks.positive("init_std", init_std))

    @torch.no_grad()
    def _initialise(self, std: float) -> None:
        for weight in (parameter for parameter in self.parameters() if parameter.dim() > 1):
            weight.normal_(0.0, std)
