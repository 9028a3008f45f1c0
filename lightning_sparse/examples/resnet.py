"""The residual networks of He et al. for 32x32 colour images, from scratch or from given weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_sparse import _checks
from lightning_sparse.examples.classifier import OPTIMIZERS, Classifier, sgd_or_adamw

TEMPERATURE = 4.0  # of the class probabilities that are compared with a teacher's


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
        teacher: a file as ``weights``, with the weights of a trained network of the same depth and width, from which ``distill`` learns.
        distill: share of the loss, in [0, 1], that is the distance to the teacher: T^2 KL(teacher || own) of the class probabilities at
            the temperature T = 4; the rest is the cross-entropy with the labels. Source: Hinton et al., arXiv 1503.02531, section 2.

    Raises ValueError for a depth that is not 6 n + 2, for an unknown optimiser, for weights that do not fit and for a ``teacher`` without
    ``distill``, and FileNotFoundError for a missing file; a fit with ``distill`` and no teacher raises ValueError.
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
        teacher: str | None = None,
        distill: float = 0.0,
    ) -> None:
        super().__init__(lr, decay, fused, restart)
        self.save_hyperparameters(
            ignore=["weights", "teacher"]
        )  # because a checkpoint brings its own weights, and is used without a teacher
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
        self.distill = _checks.between("distill", distill, 0, 1, closed="lr")
        self._teacher: list[nn.Module] = []  # a list, because its weights are no part of this module
        if teacher is not None:
            if not self.distill:
                raise ValueError("a teacher changes nothing with distill=0: give distill a share of the loss, such as 0.9, or no teacher")
            self._teacher = [copy.deepcopy(self.layers).eval().requires_grad_(False)]
            load_weights(self._teacher[0], teacher, option="teacher")

    def on_fit_start(self) -> None:
        if self.distill and not self._teacher:
            raise ValueError(f"distill={self.distill:g} needs a teacher: give --model.teacher the file of a trained network, or distill=0")
        self._teacher = [network.to(self.device) for network in self._teacher]

    def _loss(self, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
        loss = super()._loss(scores, x, y)
        if not self._teacher:
            return loss
        with torch.no_grad():
            taught = functional.log_softmax(self._teacher[0](x).float() / TEMPERATURE, 1)
        own = functional.log_softmax(scores.float() / TEMPERATURE, 1)
        distance = TEMPERATURE**2 * functional.kl_div(own, taught, reduction="batchmean", log_target=True)
        return (1 - self.distill) * loss + self.distill * distance

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


def load_weights(module: nn.Module, path: str | Path, option: str = "weights") -> None:
    """Load a state_dict into ``module``, without the prefixes "module." and "layers."; a Lightning checkpoint serves too.

    Reads tensors only (``weights_only=True``). Raises FileNotFoundError for a missing file and ValueError, naming the first keys,
    for one that does not fit.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no weights in {file.resolve()}; give --model.{option} the path of a state_dict, or null for none")
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
