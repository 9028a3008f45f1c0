"""The two ways of ``shrink --search`` on the digits CNN: scores alone, or training with groups towards each width first.

Every arm trains for the same number of epochs a stage. The validation part (400 images) decides which stages count; the test part (397)
takes no part in it.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from groups import Module, convolutions, digits, fit
from lightning.pytorch import Callback, seed_everything
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import coupling, penalties
from lightning_sparse.callbacks import ReweightedPenalty, Sparsify
from lightning_sparse.shrinking import Budget, GroupScores, Stages, choose, remove, share_of
from lightning_sparse.structure import Channels

ARMS = ("scores", "Sparsify", "ReweightedPenalty")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=20, help="a stage, half of them with groups where an arm has them")
    parser.add_argument("--dense", type=int, default=40, help="epochs of the dense network (default: %(default)s)")
    parser.add_argument("--step", type=float, default=0.3, help="share of the multiply-adds that a stage cuts (default: %(default)s)")
    parser.add_argument("--drop", type=float, help="points of validation accuracy; without it every stage counts")
    parser.add_argument("--stages", type=int, default=6, help="at most (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-2)


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield one row for each stage of each arm."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    yield "| search | seed | stage | multiply-adds | parameters | validation error | | test error |"
    yield "|---|--:|--:|--:|--:|--:|---|--:|"
    seconds = {}
    for seed in args.seeds:
        for arm in args.arms:
            began = time.perf_counter()
            yield from _rows(args, arm, seed)
            seconds[arm, seed] = time.perf_counter() - began
    yield ""
    yield "seconds: " + ", ".join(f"{arm} (seed {seed}) {took:.0f}" for (arm, seed), took in seconds.items())


def _rows(args: argparse.Namespace, arm: str, seed: int) -> Iterator[str]:
    training, validation, test = digits(None)  # type: ignore[arg-type]
    loader = DataLoader(TensorDataset(*training), 64, shuffle=True, drop_last=True)

    def train(module: Module, epochs: int, *callbacks: Callback) -> None:
        seed_everything(seed, verbose=False)
        fit(module, loader, epochs, list(callbacks))

    def scored(module: Module, groups: list[coupling.Group]) -> dict[str, float]:
        scores = GroupScores(groups)
        module.eval()  # because batch norms keep their statistics
        for x, y in loader:
            module.zero_grad()
            functional.cross_entropy(module(x), y).backward()
            scores.update(module)
        return scores.values()

    def cut(module: Module, target: int) -> Any:
        seed_everything(seed, verbose=False)
        x, groups = training[0], coupling.groups(module, training[0][:16])
        chosen = choose(module, x[:1], groups, scored(module, groups), target, 4)
        if arm != "scores" and chosen:
            share = share_of(module, groups, chosen)
            made: Any = Sparsify(share, structure=Channels())
            if arm == "ReweightedPenalty":
                made = ReweightedPenalty(penalties.LogSum(eps=2.0), target_sparsity=share, structure=Channels())
            train(module, args.epochs // 2, made)
            groups = coupling.groups(module, x[:16])
            chosen = choose(module, x[:1], groups, scored(module, groups), target, 4)
        return remove(module, x[:16], groups, chosen, 4) if chosen else None

    def tune(module: Module) -> None:
        train(module, args.epochs if arm == "scores" else args.epochs - args.epochs // 2)

    @torch.no_grad()
    def accuracy(module: Module, part: Any = validation) -> float:
        return float((module.eval()(part[0]).argmax(1) == part[1]).float().mean())

    seed_everything(seed, verbose=False)
    dense = Module(convolutions(), args.rate)
    dense.example_input_array = training[0][:2]
    train(dense, args.dense)
    count = sum(p.numel() for p in dense.parameters())
    yield f"| dense | {seed} | | 1 | {count} | {_error(accuracy(dense))} | | {_error(accuracy(dense, test))} |"
    errors: list[float] = []

    def tuned(module: Module) -> None:
        tune(module)
        errors.append(accuracy(module, test))

    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(max_drop=float("inf") if args.drop is None else args.drop)
        stages = Stages(folder, dense, training[0][:1], budget, cut=cut, tune=tuned, validate=accuracy, step=args.step, most=args.stages)
        for stage in stages:
            if not stage.get("smallest"):
                share = stage["multiply_adds"] / stages.state.dense["multiply_adds"]
                verdict = "counts" if stage["counts"] else "too much"
                figures = f"{share:.3f} | {stage['parameters']} | {_error(stage['metric'])} | {verdict} | {_error(errors[-1])}"
                yield f"| {arm} | {seed} | {stage['number']} | {figures} |"


def _error(accuracy: float) -> str:
    return f"{100 * (1 - accuracy):.2f} %"
