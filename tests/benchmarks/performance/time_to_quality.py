"""Compare minutes of training to 98 % zeros at 2 % error or less, LeNet-300-100 on MNIST, ours and other packages:

    python tests/benchmarks/performance time_to_quality --root data [--methods NAME ...] [--epochs 5 10 15 20 30 40] [--seeds 1] [--shift 1]

Each method is tuned over the settings in performance/recipes.py and over --lrs, at each length of the run from the shortest on.
A method's time is that of its fastest recipe whose final network has 98 % zeros and at most 2 % error on the 12,000 validation
images, with every seed; lengths beyond the first that one recipe reaches with are not tried. Fit alone is timed, without
validation; the test images are looked at once a run and decide nothing. Of the packages in peers.py bayesian-torch is left out,
whose Gaussian prior leaves no zeros, and torch's own pruning is what ModelPruning and the loss term's threshold call. Runs
follow one another and are kept in time_to_quality.jsonl in the folder --out, where a command that was stopped goes on; the
table is written beside it. --shift moves the training images by up to so many pixels, anew in each epoch, for every method; that
table has a file of its own.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_sparse.examples.mnist import MNIST
from performance import arguments, jobs, quality, record
from performance.recipes import METHODS, RECIPES, SHARE, Recipe

Runs = list[dict[str, Any]]  # of one recipe, learning rate and length, one a seed


def search(method: str, given: argparse.Namespace, data: MNIST, kept: quality.Kept) -> tuple[list[Runs], str]:
    """Run every recipe of a method with increasing length until one reaches the goals; or return why it cannot be run."""
    tried: list[Runs] = []
    for epochs in sorted(given.epochs):
        for recipe in (one for one in RECIPES if one.method == method):
            if find_spec(recipe.package) is None:
                return [], f"not installed: pip install {recipe.package}"
            tried += [run_seeds(recipe, lr, epochs, given, data, kept) for lr in given.lrs]
        if any(has_reached(runs, given.seeds) for runs in tried):
            break
    return tried, ""


def run_seeds(recipe: Recipe, lr: float, epochs: int, given: argparse.Namespace, data: MNIST, kept: quality.Kept) -> Runs:
    """Run each seed, known ones from the file; stop after a seed that missed."""
    runs: Runs = []
    for seed in range(given.seeds):
        found = kept.find(quality.key(recipe, lr, epochs, seed, data.shift))
        if found is None:
            found = quality.train(recipe, lr, epochs, seed, data)
            kept.add(found)
            print(told(found), flush=True)
        runs.append(found)
        if not quality.is_reached(found):
            break
    return runs


def has_reached(runs: Runs, seeds: int) -> bool:
    """Return True if all seeds reach the goals."""
    return len(runs) == seeds and all(quality.is_reached(run) for run in runs)


def told(run: dict[str, Any]) -> str:
    recipe = f"{run['method']}, {run['variant']}, lr {run['lr']:g}, {run['epochs']} epochs, seed {run['seed']}"
    return f"{recipe}: {run['minutes']:.2f} min, {run['zeros']:.2%} zeros, validation error {run['val_error']:.2%}"


def row(method: str, tried: list[Runs], why: str, seeds: int) -> dict[str, Any]:
    """Make a method's row: the fastest recipe that reaches the goals, otherwise the closest one."""
    if not tried:
        return {"method": method, "recipe": None, "reached": why}
    reached = [runs for runs in tried if has_reached(runs, seeds)]
    best = min(reached, key=minutes) if reached else min(tried, key=_miss)
    recipe = {"recipe": f"{best[0]['variant']}, lr {best[0]['lr']:g}", "epochs": best[0]["epochs"]}
    means = {name: quality.spread(run[name] for run in best) for name in ("minutes", "cpu_minutes", "zeros", "val_error", "test_error")}
    return {"method": method} | recipe | means | {"reached": "yes" if reached else "no", "recipes_tried": len(tried)}


def minutes(runs: Runs) -> float:
    return quality.spread(run["minutes"] for run in runs)


def _miss(runs: Runs) -> tuple[float, float]:
    """Return the distances of the last seed from the goals of zeros and error."""
    return max(0.0, SHARE - round(runs[-1]["zeros"], 4)), runs[-1]["val_error"]


def line(found: dict[str, Any]) -> str:
    if found["recipe"] is None:
        return f"{found['method']:24} {found['reached']}"
    head = f"{found['method']:24} {found['recipe']:28} {found['epochs']:6} {found['minutes']:8.2f} {found['cpu_minutes']:8.2f}"
    return f"{head} {found['zeros']:8.2%} {found['val_error']:8.2%} {found['test_error']:8.2%}  {found['reached']}"


HEAD = f"{'':24} {'recipe':28} {'epochs':>6} {'minutes':>8} {'cpu min':>8} {'zeros':>8} {'val err':>8} {'test err':>8}  reached"


def main() -> None:
    given = options().parse_args()
    jobs.be_quiet(given.threads)
    data, kept = MNIST(given.root, shift=given.shift), quality.Kept(given.out / "time_to_quality.jsonl")
    data.setup("fit")
    found = [row(method, *search(method, given, data, kept), given.seeds) for method in given.methods]
    print("\n".join([HEAD, *map(line, found)]))
    goals = {"zeros": SHARE, "val_error": quality.ERROR}
    tried = {name: getattr(given, name) for name in ("seeds", "epochs", "lrs", "shift")}
    kinds = {name: value for name, value in jobs.settings().items() if name != "trainer"}
    others = ["torchvision", *(name for name in ("torchao",) if find_spec(name))]
    file = given.out / f"time_to_quality{'_moved' if given.shift else ''}.json"
    print(f"written: {record.write(file, command(), goals | tried | kinds, found, others)}")


def command() -> str:
    """Return the command line without the data folder."""
    script, *rest = sys.argv
    pairs = zip([script, *rest], rest, strict=False)
    words = ["data" if before == "--root" else "--root=data" if word.startswith("--root=") else word for before, word in pairs]
    return arguments.command([script, *words])


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="the folder that holds MNIST/raw (default: data)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--epochs", nargs="+", type=arguments.whole(), default=[5, 10, 15, 20, 30, 40], help="lengths of the runs")
    parser.add_argument("--lrs", nargs="+", type=rate, default=[1e-3, 3e-3], help="learning rates, each for every method")
    parser.add_argument("--seeds", type=arguments.whole(), default=1, help="how many, from 0 on (default: 1)")
    parser.add_argument("--shift", type=arguments.whole(0), default=0, help="pixels that training images are moved by (default: 0)")
    parser.add_argument("--threads", type=arguments.whole(), default=2, help="of torch (default: 2)")
    parser.add_argument("--out", type=Path, default=record.FOLDER, help="the folder of the two files")
    return parser


def rate(text: str) -> float:
    """Parse a number > 0 for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


if __name__ == "__main__":
    main()
