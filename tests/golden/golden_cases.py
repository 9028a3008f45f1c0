"""The golden runs: every training method in every setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import curvature, mask_rules, noise, penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    PenaltyLoss,
    ReweightedPenalty,
    VariationalDropout,
)

STEPS, EPOCHS = 16, 2
LOG_SUM = penalties.LogSum(eps=2.0)

METHODS: dict[str, Callable[[], Callback]] = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.03, gap_samples=2),
    "penalty, MCP and a threshold": partial(ReweightedPenalty, penalties.MCP(c=0.3), 0.01, threshold=1e-2),
    "loss": partial(PenaltyLoss, LOG_SUM, 0.03),
    "prox": partial(AdaptiveProx, LOG_SUM, 0.01),
    "prox, exact": partial(AdaptiveProx, LOG_SUM, 0.01, exact=True),
    "mask": partial(AdaptiveMask, LOG_SUM, 0.05),
    "mask, Bernoulli": partial(AdaptiveMask, LOG_SUM, 0.01, noise=noise.ScaledBernoulli()),
    "mask, sampled": partial(AdaptiveMask, LOG_SUM, 0.02, curvature=curvature.SampledFisher(output="network", every=1)),
    "mask, top-k": partial(AdaptiveMask, mask_rules.TopK(0.5)),
    "eta-trick": partial(EtaTrick, LOG_SUM, 0.1, tol=0.3, learned_lr=0.4, keep_start=0.303),
    "VarDrop, weights": partial(VariationalDropout, 0.1, noise="weight", log_start=2.93, learned_lr=0.3),
    "VarDrop, outputs": partial(VariationalDropout, 0.1, "molchanov", noise="local", log_start=2.94, learned_lr=0.3),
    "VarDrop, additive": partial(VariationalDropout, 0.02, "empirical_bayes", log_start=-1.0, learned_lr=0.05),
    "hard concrete": partial(HardConcrete, 0.003, tol=0.5, log_start=-0.578, learned_lr=0.3),
    "pruning": partial(MagnitudePruning, 0.8, every=2),
    "penalty to a target": partial(ReweightedPenalty, LOG_SUM, target_sparsity=0.6),
}


@dataclass(frozen=True)
class Setting:
    """Differences from a plain run: arguments of the Trainer and the network, and the way to run."""

    trainer: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    resumed: bool = False
    compiled: bool = False
    scaled: bool = False


SETTINGS: dict[str, Setting] = {
    "automatic": Setting(),
    "manual": Setting(network={"manual": True}),
    "accumulation": Setting(trainer={"accumulate_grad_batches": 2}),
    "clipped by norm": Setting(trainer={"gradient_clip_val": 0.05}),
    "clipped by value": Setting(trainer={"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "bfloat16": Setting(trainer={"precision": "bf16-mixed"}),
    "float16, scaled": Setting(scaled=True),
    "averaged": Setting(averaged=True),
    "resumed": Setting(resumed=True),
    "20 small tensors": Setting(network={"small": 20}),
    "two groups": Setting(network={"groups": True}),
    "maximised": Setting(network={"maximise": True}),
    "SGD": Setting(network={"sgd": True}),
    "compiled": Setting(compiled=True),
}
_COMPILED = {"penalty": True, "mask, Bernoulli": True}  # each takes about ten seconds to compile
_WITHOUT_GAP = {"manual"}  # because the duality gap needs the loss from training_step


class Recorded(Logger):
    """A logger that records all figures in order."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[int | None, dict[str, float]]] = []

    name, version = "golden", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.figures.append((step, {key: float(value) for key, value in metrics.items()}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters."""


class SaveOnce(Callback):
    """Save a file in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == STEPS - 5:
            trainer.save_checkpoint(self.path)


class Network(LightningModule):
    """A convolution and two linear layers, or a chain of ``small`` linear layers."""

    def __init__(self, manual: bool = False, small: int = 0, groups: bool = False, maximise: bool = False, sgd: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.groups, self.sign, self.sgd = groups, -1.0 if maximise else 1.0, sgd
        if small:
            middle = [part for _ in range(small - 2) for part in (nn.Linear(6, 6), nn.Tanh())]
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), *middle, nn.Linear(6, 3))
        else:
            self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        loss = self.sign * functional.cross_entropy(self(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        parameters: Any = list(self.parameters())
        if self.groups:
            parameters = [{"params": parameters[:2], "lr": 3e-2}, {"params": parameters[2:], "weight_decay": 1e-2}]
        maximize = self.sign < 0
        if self.sgd:
            return torch.optim.SGD(parameters, lr=2e-2, momentum=0.9, maximize=maximize)
        return torch.optim.Adam(parameters, lr=1e-2, maximize=maximize)


def data(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(STEPS // EPOCHS * 8, 1, 6, 6, generator=generator)
    y = (x.flatten(1)[:, :3]).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def trainer(setting: Setting, logger: Recorded, *callbacks: Callback, **options: Any) -> Trainer:
    """Build a quiet CPU Trainer."""
    settings: dict[str, Any] = {"max_epochs": EPOCHS * setting.trainer.get("accumulate_grad_batches", 1)}
    settings |= setting.trainer | ({"plugins": [MixedPrecision("16-mixed", "cpu")]} if setting.scaled else {}) | options
    averages = [EMAWeightAveraging(decay=0.5)] if setting.averaged else []
    return Trainer(
        accelerator="cpu", devices=1, logger=logger, log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[*callbacks, *averages], **settings,
    )  # fmt: skip


def method(name: str, setting: str) -> Callback | None:
    """Make a new callback, or None if method and setting do not fit together."""
    if SETTINGS[setting].compiled and name not in _COMPILED:
        return None
    made = METHODS[name]
    changes: dict[str, Any] = {"compile": True} if SETTINGS[setting].compiled else {}
    changes |= {"gap_samples": 0} if setting in _WITHOUT_GAP and "gap_samples" in made.keywords else {}  # type: ignore[attr-defined]
    return made(**changes)


def names(only: str = "") -> Iterator[tuple[str, str]]:
    """Return (method, setting) of each run."""
    for one in METHODS:
        for setting in SETTINGS:
            if only in f"{one} / {setting}" and method_fits(one, setting):
                yield one, setting


def method_fits(name: str, setting: str) -> bool:
    return not SETTINGS[setting].compiled or name in _COMPILED


def run(name: str, setting: str, folder: Path) -> tuple[Network, Trainer, Recorded, dict[str, Any]]:
    """Train for 16 optimiser steps; return network, Trainer, logger and the file's content."""
    how, logger = SETTINGS[setting], Recorded()
    torch.manual_seed(1)
    network, callback = Network(**how.network), method(name, setting)
    assert callback is not None
    one = trainer(how, logger, callback, *([SaveOnce(folder / "middle.ckpt")] if how.resumed else []))
    one.fit(network, data(2), data(3))
    if how.resumed:
        torch.manual_seed(4)
        network, callback = Network(**how.network), method(name, setting)
        assert callback is not None
        one = trainer(how, logger, callback)
        one.fit(network, data(2), data(3), ckpt_path=folder / "middle.ckpt", weights_only=False)
    one.save_checkpoint(folder / "end.ckpt")
    return network, one, logger, torch.load(folder / "end.ckpt", weights_only=False)
