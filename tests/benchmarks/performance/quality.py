"""One training run of LeNet-300-100 on MNIST: time and results, recorded as a line of a file."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse import counts
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.examples.mnist import MNIST
from lightning_sparse.select import countable
from performance import jobs
from performance.recipes import SHARE, Recipe

ERROR = 0.02  # at most, on the validation images
KEY = ("method", "variant", "lr", "epochs", "seed", "threads", "shift")


def key(recipe: Recipe, lr: float, epochs: int, seed: int, shift: int) -> dict[str, Any]:
    """Return the key of a run; ``shift`` is that of MNIST."""
    return dict(zip(KEY, (recipe.method, recipe.variant, lr, epochs, seed, torch.get_num_threads(), shift), strict=True))


def train(recipe: Recipe, lr: float, epochs: int, seed: int, data: MNIST) -> dict[str, Any]:
    """Train; return minutes of ``fit`` (wall clock and processor time), and the final network's zeros and errors in [0, 1].

    A run that stops itself, since its target is out of reach in so few steps, has no zeros, errs always, and says why.
    """
    seed_everything(seed, verbose=False)
    module = MLP([784, 300, 100, 10], lr=lr, fused=True)
    wall, processor, failed = time.perf_counter(), time.process_time(), ""
    try:
        fit(module, recipe.prepare(module, epochs), epochs, data)
    except (RuntimeError, FloatingPointError) as failure:
        failed = str(failure)
    spent = {"minutes": (time.perf_counter() - wall) / 60, "cpu_minutes": (time.process_time() - processor) / 60}
    reached = {"zeros": 0.0, "val_error": 1.0, "test_error": 1.0, "failed": failed} if failed else measured(module, data)
    return key(recipe, lr, epochs, seed, data.shift) | spent | reached


def measured(module: LightningModule, data: MNIST) -> dict[str, Any]:
    """Measure a trained network."""
    return {"zeros": zeros(module), "val_error": error(module, data, "validation"), "test_error": error(module, data, "test")}


def fit(module: LightningModule, callbacks: list[Callback], epochs: int, data: MNIST) -> None:
    """Fit with a logger and without validation."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(callbacks=callbacks, logger=CSVLogger(folder), max_epochs=epochs, **jobs.SETTINGS)
        trainer.fit(module, data.train_dataloader())


def zeros(module: LightningModule) -> float:
    """Return the share of zeros among the weights used in the forward."""
    weights = dict(counts.weight_in_use(module, name) for name in countable(module))
    return counts.share(counts.count_zeros(weights))


@torch.no_grad()
def error(module: LightningModule, data: MNIST, part: str) -> float:
    """Return the share of misclassified images of a part."""
    x, y = data.parts[part]
    return float((module.eval()(x).argmax(1) != y).float().mean())


def is_reached(run: dict[str, Any]) -> bool:
    """Return True if both goals are met, with zeros to 0.01 % (27 of 266,200 weights)."""
    return round(run["zeros"], 4) >= SHARE and run["val_error"] <= ERROR


class Kept:
    """Runs in a file, one JSON line each, so that an interrupted command can continue."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.runs: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Return the run with this key, or None."""
        return next((run for run in self.runs if run.items() >= wanted.items()), None)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


def spread(values: Iterable[float]) -> float:
    """Average over seeds."""
    found = [*values]
    return sum(found) / len(found)
