"""Time an epoch of LeNet-300-100 on MNIST in the Trainer and a plain loop: python tests/benchmarks/performance mnist_epoch --root data

Both cut the same batches of 128 from the same tensors and take the same fused Adam steps on one thread; the Trainer logs its
loss. Rounds alternate, the bare loop runs twice (A/A), medians are printed. The goal is a ratio of at most 1.3.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from torch.nn.functional import cross_entropy

from lightning_sparse.examples.mlp import MLP
from lightning_sparse.examples.mnist import MNIST


class Clock(Callback):
    """Record the seconds of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def network() -> MLP:
    torch.manual_seed(0)
    return MLP([784, 300, 100, 10], fused=True)


def bare(data: MNIST) -> float:
    """Train one epoch in a plain loop."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    began = time.perf_counter()
    for x, y in data.train_dataloader():
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - began


def in_trainer(data: MNIST) -> float:
    """Train the same epoch in a Trainer."""
    clock, quiet = Clock(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[clock], limit_val_batches=0, **quiet)
    trainer.fit(network(), train_dataloaders=data.train_dataloader())
    return clock.seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = MNIST(given.root)
    data.setup("fit")
    rounds = [(bare(data), in_trainer(data), bare(data)) for _ in range(given.rounds + 1)][1:]
    ratios, control = [trainer / first for first, trainer, _ in rounds], [second / first for first, _, second in rounds]
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}, 1 thread, {given.rounds} rounds"
    )
    steps = len(data.train_dataloader())
    print(f"bare loop             {statistics.median(first for first, *_ in rounds):.2f} s an epoch of {steps} steps")
    for name, values in (("Trainer / bare", ratios), ("bare / bare (A/A)", control)):
        print(f"{name:21} {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
