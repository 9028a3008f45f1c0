"""One run of the race, in a process of its own."""

from __future__ import annotations

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional

from lightning_sparse import __version__
from lightning_sparse.examples.batches import ShuffledBatches
from lightning_sparse.select import default_selection
from race.problems import PROBLEMS, Part, Problem
from race.records import Record
from race.ways import DENSE, WAYS


class Net(LightningModule):
    """A problem's network under its optimiser."""

    def __init__(self, problem: Problem, weights: Path | None = None) -> None:
        super().__init__()
        self.problem, self.network = problem, problem.network(weights)

    def training_step(self, batch: Part, index: int) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        rate, total = self.problem.rate, int(self.trainer.estimated_stepping_batches)
        if self.problem.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), rate, momentum=0.9, weight_decay=5e-4)
            schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), rate, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def measured(net: Net, part: Part) -> tuple[float, float]:
    """Return error in % and loss."""
    net.eval()
    outputs = torch.cat([net.network(x) for x in part[0].split(1000)])
    return 100 * float((outputs.argmax(1) != part[1]).float().mean()), float(functional.cross_entropy(outputs, part[1]))


def train(planned: Record, data: Path, weights: Path | None = None) -> Record:
    """Train one run; return its record, of an exception too."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    problem, steps = PROBLEMS[planned["problem"]], PROBLEMS[planned["problem"]].steps(planned["budget"])
    settings = {"optimizer": problem.optimizer, "rate": problem.rate, "batch": problem.batch, "steps": steps}
    versions = {"torch": torch.__version__, "lightning": lightning.__version__, "lightning_sparse": __version__}
    started = time.perf_counter()
    try:
        training, validation, test = problem.load(data)
        seed_everything(planned["seed"], verbose=False)
        net, epochs = Net(problem, weights), math.ceil(steps * problem.batch / len(training[0]))
        callbacks = WAYS[planned["method"]](planned["target"], epochs)
        made = [repr(callback) for callback in callbacks]
        options: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        trainer = Trainer(max_epochs=-1, max_steps=steps, accelerator="cpu", callbacks=callbacks, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(net, ShuffledBatches(*training, problem.batch, planned["seed"]))
        matrices = [*default_selection(net.network, trainable=False).values()]
        zeros, size = sum(int((w == 0).sum()) for w in matrices), sum(w.numel() for w in matrices)
        by = {f"{name}_{what}": value for name, part in (("validation", validation), ("test", test))
              for what, value in zip(("error", "loss"), measured(net, part), strict=True)}  # fmt: skip
        missed = 0 if planned["method"] == DENSE else zeros - round(planned["target"] * size)
        result = {**by, "zeros": zeros, "weights": size, "missed": missed, "made": made}
    except Exception as error:  # a method that fails is a result
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return planned | result | {"seconds": round(time.perf_counter() - started, 1), "settings": settings, "versions": versions}
