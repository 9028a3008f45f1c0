"""A job is a network, its batches and an epoch's length; an arm is what a run of it does beyond the plain one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from performance import networks

Batch = tuple[Tensor, Tensor]
Prepare = Callable[[LightningModule], list[Callback]]  # changes a fresh module where an arm must, and says its callbacks
DISTINCT = 8  # batches that are made; an epoch goes round them
ROUND = 10  # steps between two estimates of the curvature, by default: a window holds whole such rounds


@dataclass(frozen=True)
class Job:
    """``build`` makes the network; ``inputs`` makes x of a batch. ``samples`` of an epoch of the data that it stands for."""

    name: str
    build: Callable[[], LightningModule]
    inputs: Callable[[int], Tensor]
    batch: int
    samples: int
    steps: int  # of a turn, unless told otherwise

    @property
    def epoch(self) -> int:
        """Optimiser steps in an epoch: what happens at its end is charged to a step in this proportion."""
        return -(-self.samples // self.batch)

    def batches(self) -> list[Batch]:
        """The same for every arm: noise as inputs, labels at random."""
        torch.manual_seed(0)
        return [(self.inputs(self.batch), torch.randint(networks.CLASSES, (self.batch,))) for _ in range(DISTINCT)]


def _words(batch: int) -> Tensor:
    return torch.randint(networks.WORDS, (batch, networks.TOKENS))


JOBS = {
    "lenet": Job("LeNet-300-100", networks.lenet, lambda batch: torch.randn(batch, 1, 28, 28), 128, 60_000, 100),
    "resnet18": Job("ResNet-18, 32x32", networks.ResNet18, lambda batch: torch.randn(batch, 3, 32, 32), 32, 50_000, 10),
    "transformer": Job("transformer, 6 layers", networks.Transformer, _words, 16, 25_000, 10),
}


class Rounds(DataLoader[Batch]):
    """An epoch of ``steps`` ready batches, taken in turn: no worker, no copy."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        super().__init__(range(steps), batch_size=None)  # type: ignore[arg-type]
        self.batches, self.steps = batches, steps

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return (self.batches[step % len(self.batches)] for step in range(self.steps))


SETTINGS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "log_every_n_steps": 50,  # the Trainer's own default
}


def settings() -> dict[str, Any]:
    """What every run here is made with, for a benchmark's JSON file."""
    return {"trainer": SETTINGS, "logger": "CSVLogger", "optimizer": "Adam(fused=True)", "flush_denormal": True}


def plain(module: LightningModule) -> list[Callback]:
    """Nothing more than the Trainer."""
    return []


def be_quiet(threads: int) -> None:
    """Before the first run: threads, no denormals (a pruned weight's moments decay into them), and no remarks between the lines."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
