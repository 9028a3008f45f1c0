"""Measure the cost of a curvature estimate: python tests/benchmarks/performance curvature_cost [--rounds N] [--threads N]

One step is forward, backward and Adam; the arms update the empirical Fisher on every step, every 5 or every 10 steps, or
never. Each round runs 20 steps of every arm in turn; a ratio is the median over rounds against the plain arm of the same
round, with its quartiles. "never (A/A)" is the plain step once more: how far from 1 a ratio strays here by itself.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.weights import Attachment

STEPS = 20
ARMS = {"never": None, "never (A/A)": None, "every 10": 10, "every 5": 5, "every step": 1}


def lenet() -> tuple[nn.Module, torch.Tensor]:
    """Build LeNet-300-100 and a batch of 128."""
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return model, torch.rand(128, 784)


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    """Build four 3x3 convolutions, 16 to 64 channels, on 32x32, and a batch of 32."""
    pairs = [(3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)]
    layers = [part for i, o, stride in pairs for part in (nn.Conv2d(i, o, 3, stride, 1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.rand(32, 3, 32, 32)


def training(make: Callable[[], tuple[nn.Module, torch.Tensor]], every: int | None) -> Callable[[], None]:
    """Make a closure that trains its own network for STEPS steps."""
    torch.manual_seed(0)
    model, x = make()
    y = torch.randint(10, (len(x),))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    selected = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    curvature = EmpiricalFisher(every=every) if every else None
    if curvature:
        curvature.attach(model, Attachment(model, selected, lambda name: selected[name]))

    def run() -> None:
        for step in range(STEPS):
            if curvature:
                curvature.begin(step, len(x))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if curvature:
                curvature.end()
            optimizer.step()

    return run


def measure(make: Callable[[], tuple[nn.Module, torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Measure seconds per step of every arm in each round."""
    arms = {name: training(make, every) for name, every in ARMS.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start) / STEPS)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, python {platform.python_version()}, {given.threads} threads, {given.rounds} rounds")
    for title, make in (("LeNet-300-100, batch 128", lenet), ("four convolutions on 32x32, batch 32", convolutions)):
        times = measure(make, given.rounds)
        print(f"\n{title:40}{'ms a step':>10}{'ratio':>8}{'25%':>8}{'75%':>8}")
        for name, values in times.items():
            low, middle, high = statistics.quantiles([v / p for v, p in zip(values, times["never"], strict=True)], n=4)
            print(f"{name:40}{statistics.median(values) * 1e3:10.2f}{middle:8.3f}{low:8.3f}{high:8.3f}")


if __name__ == "__main__":
    main()
