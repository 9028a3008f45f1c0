"""Jobs (a network, its batches and an epoch's length) and arms (changes to a plain run)."""

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
    """``build`` makes the network, ``inputs`` the x of a batch; ``samples`` is the size of the original data's epoch."""

    name: str
    build: Callable[[], LightningModule]
    inputs: Callable[[int], Tensor]
    batch: int
    samples: int
    steps: int  # of a turn, unless told otherwise

    @property
    def epoch(self) -> int:
        """Optimiser steps per epoch; the work at the end of an epoch is divided by this number."""
        return -(-self.samples // self.batch)

    def batches(self) -> list[Batch]:
        """Make batches of random inputs and labels, the same for every arm."""
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
    """A loader of ``steps`` stored batches in turn, without workers and copies."""

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
    """Return the settings of every run, for a benchmark's JSON file."""
    return {"trainer": SETTINGS, "logger": "CSVLogger", "optimizer": "Adam(fused=True)", "flush_denormal": True}


def plain(module: LightningModule) -> list[Callback]:
    """Return no callbacks."""
    return []


def be_quiet(threads: int) -> None:
    """Set threads, flush denormals (moments of pruned weights decay to them) and silence messages."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
