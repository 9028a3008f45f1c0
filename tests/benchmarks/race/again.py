"""Fine-tune networks that were trained before, with ramps of several lengths: python tests/benchmarks/race again --data FOLDER [options].

A network of the race is trained by its own optimiser for the short budget, without zeros; ``finetune`` starts from given weights. Then it
is trained again for ``--steps``, at ``--rate`` times its rate, to a target share of zeros, once for each ``--freeze``: the last share of
the run that is trained with a frozen support. Only validation images are used. Rows that the records hold are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_sparse import scores
from lightning_sparse.callbacks import AdaptiveMask, MagnitudePruning, ReweightedPenalty, Sparsify, VariationalDropout
from lightning_sparse.examples.batches import ShuffledBatches
from race.one import Net, measured
from race.problems import BUDGETS, PROBLEMS, Part
from race.ways import LOG_SUM

FILE = Path(__file__).with_name("results") / "again.jsonl"
OFFSET = 10  # added to the seed of the second run
FORMS: dict[str, Callable[[float, float], Callback]] = {
    "Sparsify": lambda target, freeze: Sparsify(target, freeze=freeze),
    "ReweightedPenalty": lambda target, freeze: ReweightedPenalty(LOG_SUM, target_sparsity=target, freeze=freeze),
    "AdaptiveMask": lambda target, freeze: AdaptiveMask(LOG_SUM, target_sparsity=target, freeze=freeze),
    "VariationalDropout": lambda target, freeze: VariationalDropout(target_sparsity=target, freeze=freeze),
    "pruning, LAMP": lambda target, freeze: MagnitudePruning(target, every=20, score=scores.LAMP(), end=1 - freeze),
}


def read(path: Path = FILE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each problem, steps, rate, target and form: the mean validation error in % for each ``freeze``."""
    freezes = sorted({row["freeze"] for row in rows})
    found: dict[tuple[Any, ...], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[tuple(row[key] for key in ("problem", "steps", "rate", "target", "form"))][row["freeze"]].append(row["validation_error"])
    lines = ["| network | steps | rate | zeros | form | " + " | ".join(f"freeze={freeze:g}" for freeze in freezes) + " | seeds |"]
    lines.append("|---|--:|--:|--:|---|" + "--:|" * (len(freezes) + 1))
    for (problem, steps, rate, target, form), own in found.items():
        shown = " | ".join(f"{mean(own[freeze]):.2f}" if own[freeze] else "" for freeze in freezes)
        lines.append(f"| {problem} | {steps} | {rate:g} | {target:.0%} | {form} | {shown} | {max(map(len, own.values()))} |")
    return "\n".join(lines)


def fit(net: Net, part: Part, steps: int, seed: int, *callbacks: Callback) -> None:
    seed_everything(seed, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=-1, max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit(net.train(), ShuffledBatches(*part, net.problem.batch, seed))


def run(given: argparse.Namespace, name: str, seed: int, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each form and each ``freeze`` that is not done."""
    problem = PROBLEMS[name]
    how = {"problem": name, "steps": given.steps, "rate": given.rate, "target": given.target, "seed": seed}
    every = [how | {"form": form, "freeze": freeze} for form in given.forms for freeze in given.freeze]
    left = [row for row in every if not any(all(old[key] == value for key, value in row.items()) for old in done)]
    if not left:
        return
    training, validation, _ = problem.load(given.data)
    seed_everything(seed, verbose=False)
    trained = Net(problem, given.weights)
    if not problem.pretrained:
        fit(trained, training, BUDGETS["short"], seed)
    for row in left:
        net = copy.deepcopy(trained)
        net.problem = replace(problem, rate=problem.rate * given.rate)
        fit(net, training, given.steps, seed + OFFSET, FORMS[row["form"]](given.target, row["freeze"]))
        error, loss = measured(net, validation)
        yield row | {"validation_error": error, "validation_loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(prog="race again", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with MNIST/raw and CIFAR10/train.npz; without it the table is printed")
    parser.add_argument("--weights", type=Path, help="a state_dict of ResNet-20 trained on CIFAR-10, from which finetune starts")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["transformer"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["Sparsify"])
    parser.add_argument("--freeze", nargs="+", type=float, default=[0.25, 0.5, 0.7])
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.5, help="factor on the problem's rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--records", type=Path, default=FILE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for seed in given.seeds if given.data else ():
        for name in given.problems:
            for row in run(given, name, seed, read(given.records)):
                print(json.dumps(row), flush=True)
                with given.records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(read(given.records)))


if __name__ == "__main__":
    main()
