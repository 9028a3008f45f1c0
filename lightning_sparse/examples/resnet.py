"""The residual networks of He et al. for 32x32 colour images, from scratch or from given weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_sparse import _checks
from lightning_sparse.examples.classifier import OPTIMIZERS, Classifier, sgd_or_adamw


class ResNet(Classifier):
    """A ResNet of ``depth`` 6 n + 2: a 3x3 convolution, three stages of n blocks, the mean over pixels, a Linear layer.

    x has shape (batch, 3, 32, 32). The stages have ``width``, 2 ``width`` and 4 ``width`` channels; the second and third halve
    the image. Shortcuts have no parameters: they take every second pixel and pad channels with zeros. ResNet-20 has 268,336
    weights in its convolutions and the Linear layer. Trained by SGD with Nesterov's momentum, or AdamW; the learning rate
    decays to 0. Source: He et al., arXiv 1512.03385, section 4.2.

    Args:
        depth: number of layers with weights: 8, 14, 20, 32, 44, 56, 110, ...
        width: channels of the first stage.
        classes: number of classes.
        weights: a file of torch.save with this network's state_dict, alone or under "state_dict"; the prefixes "module." and
            "layers." are removed. None starts from torch's initialisation.
        optimizer: "sgd" or "adamw".
        momentum: of SGD.
        weight_decay: of either optimiser.

    Raises ValueError for a depth that is not 6 n + 2, for an unknown optimiser and for weights that do not fit, and
    FileNotFoundError for a missing file.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        classes: int = 10,
        weights: str | None = None,
        lr: float = 0.1,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay: str = "cosine",
        fused: bool = False,
        restart: float | None = None,
    ) -> None:
        super().__init__(lr, decay, fused, restart)
        self.save_hyperparameters(ignore=["weights"])  # because a checkpoint brings its own weights
        blocks, rest = divmod(_checks.whole("depth", depth, 8) - 2, 6)
        if rest:
            raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, 32, 44, 56, 110), got {depth!r}")
        _checks.whole("width", width, 2)
        _checks.whole("classes", classes, 2)
        self.optimizer_name = _checks.one_of("optimizer", optimizer, OPTIMIZERS)
        self.momentum = _checks.between("momentum", momentum, 0, 1, closed="l")
        self.weight_decay = _checks.between("weight_decay", weight_decay, 0, float("inf"), closed="l")
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv1"], parts["bn1"], parts["relu"] = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        for stage, (before, after) in enumerate([(width, width), (width, 2 * width), (2 * width, 4 * width)], start=1):
            parts[f"layer{stage}"] = nn.Sequential(*[Block(before if i == 0 else after, after) for i in range(blocks)])
        parts["pool"], parts["flatten"], parts["linear"] = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)
        self.layers = nn.Sequential(parts).to(memory_format=torch.channels_last)  # because convolutions are then faster on a CPU
        if weights is not None:
            load_weights(self.layers, weights)

    def _optimizer(self) -> torch.optim.Optimizer:
        return sgd_or_adamw(self.parameters(), self.optimizer_name, self.lr, self.momentum, self.weight_decay, self.fused)


class Block(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))); where channels double, the shortcut takes every second pixel and adds zeros."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=1 if before == after else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.added = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.added:
            front = self.added // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, front, self.added - front))
        return functional.relu(x + y)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state_dict into ``module``, without the prefixes "module." and "layers."; a Lightning checkpoint serves too.

    Reads tensors only (``weights_only=True``). Raises FileNotFoundError for a missing file and ValueError, naming the first keys,
    for one that does not fit.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no weights in {file.resolve()}; give --model.weights the path of a state_dict, or null to start anew")
    found: Any = torch.load(file, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold a state_dict, got {type(state).__name__}")
    bare = {name.removeprefix("module.").removeprefix("layers."): tensor for name, tensor in state.items()}
    own = module.state_dict()
    bare = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")} | bare  # old files have none
    wrong = [name for name in own if name not in bare or own[name].shape != bare[name].shape] + [name for name in bare if name not in own]
    if wrong:
        raise ValueError(f"{file} does not fit: {len(wrong)} entries are missing, unknown or of another shape, first {wrong[:3]}")
    module.load_state_dict(bare)
