"""Measure the cost of a tabulated penalty in training: python tests/benchmarks/performance numeric_penalty [--rounds N] [--threads N]

One step is forward, backward and Adam of LeNet-300-100 at batch 128, with lam * gradient(w) of the penalty added to each
weight's gradient. The arms take turns within every round; a ratio is the median over rounds of the arm's time against
LogSum's in the same round, with its quartiles. The second LogSum arm (A/A) shows what a ratio of 1 looks like here. On a
machine that is busy with other things the fastest round says more than the median.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_sparse.duality import Penalty
from lightning_sparse.penalties import HardConcrete, LogSum, VariationalDropout

ARMS: dict[str, Penalty | None] = {
    "LogSum": LogSum(eps=2.0),
    "LogSum (A/A)": LogSum(eps=2.0),
    "no penalty": None,
    "VariationalDropout log_uniform": VariationalDropout("log_uniform"),
    "VariationalDropout molchanov": VariationalDropout("molchanov"),
    "HardConcrete": HardConcrete(),
}


def training_step(penalty: Penalty | None) -> Callable[[], None]:
    """Make a closure that trains its own LeNet-300-100 by one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.rand(128, 784), torch.randint(10, (128,))
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if penalty is not None:
            with torch.no_grad():
                for weight in weights:
                    assert weight.grad is not None
                    weight.grad.add_(penalty.gradient(weight), alpha=1e-4)
        optimizer.step()

    return step


def seconds(step: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def measure(rounds: int, repeats: int) -> dict[str, list[float]]:
    """Measure seconds per step of every arm in each round; each round starts at another arm."""
    steps = {name: training_step(penalty) for name, penalty in ARMS.items()}
    for step in steps.values():
        seconds(step, repeats)
    names, times = list(steps), {name: [] for name in steps}  # type: tuple[list[str], dict[str, list[float]]]
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(steps[name], repeats))
    return times


def table(times: dict[str, list[float]]) -> str:
    floor = min(times["LogSum"])
    lines = [f"{'arm':32}{'ms a step':>12}{'ratio':>9}{'25%':>8}{'75%':>8}{'fastest ms':>12}{'ratio':>8}"]
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["LogSum"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        fastest = min(values)
        median = statistics.median(values)
        lines.append(f"{name:32}{median * 1e3:12.3f}{middle:9.3f}{low:8.3f}{high:8.3f}{fastest * 1e3:12.3f}{fastest / floor:8.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=15, help="steps of an arm in a round")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, python {platform.python_version()}, {arguments.threads} threads, {arguments.rounds} rounds")
    print(table(measure(arguments.rounds, arguments.repeats)))


if __name__ == "__main__":
    main()
