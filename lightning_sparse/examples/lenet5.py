"""LeNet-5 in Caffe's variant, for 28x28 images with one channel and ten classes."""

from __future__ import annotations

import torch
from torch import nn

from lightning_sparse.examples.classifier import Classifier


class LeNet5(Classifier):
    """Two 5x5 convolutions (20 and 50 channels), each followed by 2x2 max pooling, then Linear layers of 500 and 10.

    x has shape (batch, 1, 28, 28). As in Caffe's example the only ReLU is between the Linear layers. Without biases there are
    500 + 25,000 + 400,000 + 5,000 = 430,500 weights.
    """

    def __init__(self, lr: float = 1e-3, decay: str = "cosine", fused: bool = False, restart: float | None = None) -> None:
        super().__init__(lr, decay, fused, restart)
        self.save_hyperparameters()
        features = (nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten())
        layers = nn.Sequential(*features, nn.Linear(50 * 4 * 4, 500), nn.ReLU(), nn.Linear(500, 10))
        self.layers = layers.to(memory_format=torch.channels_last)  # because convolutions and pooling are then much faster on a CPU
