"""Measure, on the networks of exchange_networks.py, what a mask's noise costs beside what its estimate of H says.

    python tests/benchmarks/noise_cost.py [--only GRU]

"measured" is the mean of noise times gradient over the batches that update H, divided by what the estimate says, without any
correction. "by the loss" repeats the forward of those batches with 8 draws and without noise. The last columns train with an H
that is 1000 times too large where a sample has one label (labels=1000), without the correction and with it. One seed, validation figures.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import warnings
from typing import Any
from unittest import mock

import torch
from exchange_networks import LAM, PENALTY
from networks.problems import PROBLEMS, Problem
from networks.training import run

from lightning_sparse import callbacks
from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.methods import noise_cost

DRAWS = 8


class Probe(callbacks.AdaptiveMask):
    """Also measures the rise of the loss directly, in the batches whose cost is measured."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        cost = self.method.cost
        if cost.active:
            cost.active = False
            self.rises = [*getattr(self, "rises", []), self._rise(pl_module, batch, batch_idx)]
            self.estimates = [*getattr(self, "estimates", []), float(cost._expected) / 2]
            cost.active = True

    def _rise(self, module: Any, batch: Any, index: int) -> float:
        forwards = self.method.forwards
        kept = forwards.draws, dict(forwards._calls), set(forwards._called), torch.get_rng_state()
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        losses = []
        for draw in range(DRAWS + 1):
            forwards.noise_active, forwards._calls, forwards.draws = draw > 0, {}, 10**6 + len(losses)
            value = module.training_step(batch, index)
            losses.append(float(value["loss"] if isinstance(value, dict) else value))
        for name, value in module.named_buffers():
            value.copy_(buffers[name])
        forwards.noise_active = True
        forwards.draws, forwards._calls, forwards._called, state = kept
        torch.set_rng_state(state)
        return sum(losses[1:]) / DRAWS - losses[0]


def measured(problem: Problem) -> tuple[str, str, dict[str, Any]]:
    """Train without corrections; return both measured ratios as text, and the run's figures."""
    probe = Probe(PENALTY, lam=LAM)
    with mock.patch.object(noise_cost.NoiseCost, "_judge", return_value=""):
        row = run(problem, [probe], 0)
    ratio, error = probe.method.cost.ratio()
    direct = sum(probe.rises) / sum(probe.estimates) if getattr(probe, "estimates", []) else math.nan
    return f"{ratio:.2f} +- {error:.2f}", f"{direct:.2f}", row


def figures(row: dict[str, Any]) -> str:
    return f"{row['loss']:.3f} at {row['zeros']:.1%}"


def wrong(problem: Problem, labels: int, corrected: bool) -> dict[str, Any]:
    """Train with a wrong number of labels a sample."""
    mask_form = callbacks.AdaptiveMask(PENALTY, lam=LAM, curvature=EmpiricalFisher(labels=labels))
    with contextlib.nullcontext() if corrected else mock.patch.object(noise_cost.NoiseCost, "_judge", return_value=""):
        return run(problem, [mask_form], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains it")
    only = parser.parse_args().only
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| network | measured | by the loss | penalty | mask, not corrected | mask | H x 1000, not corrected | H x 1000 |")
    print("|---" * 8 + "|")
    for problem in PROBLEMS:
        if only in problem.name:
            by_gradient, by_loss, row = measured(problem)
            rows = [run(problem, [callbacks.ReweightedPenalty(PENALTY, lam=LAM)], 0), row]
            rows += [run(problem, [callbacks.AdaptiveMask(PENALTY, lam=LAM)], 0)]
            rows += [wrong(problem, 1000, corrected) for corrected in (False, True)]
            print(f"| {problem.name} | {by_gradient} | {by_loss} | " + " | ".join(map(figures, rows)) + " |", flush=True)


if __name__ == "__main__":
    main()
