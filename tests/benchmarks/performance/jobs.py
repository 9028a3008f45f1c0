"""A job is a network, its batches and an epoch's length; an arm is what a run of it does beyond the plain one.

A run is one ``Trainer.fit`` of two epochs: the first warms up, the second is timed.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from performance import networks

Batch = tuple[Tensor, Tensor]
Prepare = Callable[[LightningModule], list[Callback]]  # changes a fresh module where an arm must, and says its callbacks
ClockName = Literal["wall", "cpu"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: of all threads together
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
    steps: int  # timed in a round, unless told otherwise

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
    "lenet": Job("LeNet-300-100", networks.lenet, lambda batch: torch.randn(batch, 1, 28, 28), 128, 60_000, 470),
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


class Clock(Callback):
    """Seconds of the second epoch's steps, and of its end up to the third's start, where it stops the run.

    From the start of the epoch to its last batch's end, hooks of the other callbacks and logging included; the end holds what
    is logged once an epoch.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.steps = self.end = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.end = self.read() - self.last
            trainer.should_stop = True
        self.began = self.read()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.current_epoch == 1 and trainer.is_last_batch:
            self.last = self.read()
            self.steps = self.last - self.began


def seconds_per_step(job: Job, batches: list[Batch], prepare: Prepare, steps: int, clock: ClockName = "wall") -> float:
    """Of one fresh run, its epoch's end included in proportion."""
    torch.manual_seed(0)
    module = job.build()
    stop = Clock(CLOCKS[clock])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(callbacks=[*prepare(module), stop], logger=CSVLogger(folder), **SETTINGS)
        trainer.fit(module, Rounds(batches, steps))
    return stop.steps / steps + stop.end / job.epoch


SETTINGS: dict[str, Any] = {
    "max_epochs": 3,  # of which the last does not begin
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
