"""Table of recipes for a given compression: goals and the runs in docs/records/."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exchange.frontier import Runs
from exchange.tables import MISSING, table
from lightning_sparse.reproduction.table import spread
from lightning_sparse.reproduction.written import RUNS, read_lines, read_runs


@dataclass(frozen=True)
class Goal:
    """A goal: a compression of at least ``times`` with a mean test error of at most ``error`` %; ``epochs`` of its recipes."""

    net: str
    times: float
    error: float
    epochs: int

    @property
    def recipe(self) -> str:
        """Name of our recipe; magnitude pruning's has the suffix ``_pruning``."""
        return f"mnist/{self.net}_{self.times:g}x"

    @property
    def folder(self) -> str:
        """Folder of its runs; runs of one folder have the same length."""
        return self.net if self.epochs == USUAL[self.net] else f"{self.net}_{self.epochs}_epochs"


USUAL = {"lenet_300_100": 80, "lenet_5": 30}  # epochs
GOALS = (
    Goal("lenet_300_100", 19, 1.35, 80),
    Goal("lenet_300_100", 68, 1.6, 80),
    Goal("lenet_300_100", 100, 1.75, 160),
    Goal("lenet_5", 150, 0.75, 30),
    Goal("lenet_5", 280, 0.9, 60),
)
SEEDS = {"lenet_300_100": "0 1 2 3 4", "lenet_5": "0 1"}
TITLES = {"lenet_300_100": "LeNet-300-100", "lenet_5": "LeNet-5 (20-50-500)"}
CHOICE, UNMOVED = "choice.csv", "unmoved.csv"
_TRIED = ("recipe", "overrides", "epochs", "non-zero %", "validation error %", "minutes")
_HEAD = ("network", "goal", "recipe", "compression", "non-zero %", "test error %", "goal met", "minutes a run", "seeds")


def recorded(folder: Path) -> Runs:
    """Read the runs of all CSVs in ``folder``; an empty list if it is missing."""
    files = [folder / name / RUNS for name in dict.fromkeys(goal.folder for goal in GOALS)]
    return [run for file in files if file.is_file() for run in read_runs(file)]


def tried(folder: Path) -> str:
    """Format the trials on held-out images, best first per recipe, from each network's ``choice.csv`` (without test errors)."""
    files = [folder / net / CHOICE for net in TITLES]
    runs = [run for file in files if file.is_file() for run in read_lines(file)]
    runs.sort(key=lambda run: (run["recipe"], run["val_error"]))
    return table(_TRIED, (_trial(run) for run in runs)) if runs else f"{MISSING.capitalize()}."


def _trial(run: dict[str, Any]) -> Sequence[str]:
    words = str(run["overrides"]).replace("--sparsify.", "").replace("--model.", "").replace("--data.", "")
    figures = (f"{run[name]:.2f}" for name in ("nonzero_file", "val_error"))
    return f"`{run['recipe']}`", f"`{words}`", f"{run['epochs']}", *figures, f"{run['seconds'] / 60:.1f}"


def unmoved(folder: Path) -> str:
    """Format the table of recipes trained without shifts, and their overrides."""
    file = folder / "lenet_300_100" / UNMOVED
    if not file.is_file():
        return f"{MISSING.capitalize()}."
    runs = read_runs(file)
    words = "\n".join(f"- `{recipe}`: `{given}`" for recipe, given in sorted({(run["recipe"], run["overrides"]) for run in runs}))
    return f"{reached(runs)}\n\n{words}"


def markdown(runs: Runs) -> str:
    """Format the table and the commands of its runs."""
    commands = "\n".join(command(folder) for folder in dict.fromkeys(goal.folder for goal in GOALS))
    return f"{table(_HEAD, _rows(runs))}\n\n```sh\n{commands}\n```"


def command(folder: str) -> str:
    """Return the command that trains the recipes of a folder on all 60,000 images."""
    goals = [goal for goal in GOALS if goal.folder == folder]
    rows = " ".join([*(goal.recipe for goal in goals), *(f"{goal.recipe}_pruning" for goal in goals)])
    given = f"--epochs {goals[0].epochs} --seeds {SEEDS[goals[0].net]} --data.validation 0"
    return f"lightning-sparse reproduce --root data --out docs/records/{folder} --rows {rows} {given}"


def reached(runs: Runs) -> str:
    """Format the rows that have runs."""
    return table(_HEAD, (row for row in _rows(runs) if row[3] != MISSING))


def _rows(runs: Runs) -> Iterator[Sequence[str]]:
    for goal in GOALS:
        for recipe in (goal.recipe, f"{goal.recipe}_pruning"):
            found = [run for run in runs if run["recipe"] == recipe]
            shown = f"{goal.error:g} % at {goal.times:g}x"
            yield TITLES[goal.net], shown, f"`{recipe}`", *(_figures(goal, found) if found else (MISSING, *[""] * 5))


def _figures(goal: Goal, found: Sequence[dict[str, Any]]) -> Sequence[str]:
    share, mean = (statistics.mean(run[name] for run in found) for name in ("nonzero_file", "test_error"))
    met = round(mean, 4) <= goal.error  # of 10,000 images and a few seeds: what lies beyond is float32's
    verdict = "no, too dense" if 100 / share < goal.times else "yes" if met else f"no, {mean - goal.error:+.2f} points"
    seeds = ", ".join(str(run["seed"]) for run in found)
    columns = [spread([run[name] for run in found]) for name in ("nonzero_file", "test_error")]
    minutes = spread([run["seconds"] / 60 for run in found], 1)
    return f"{100 / share:.1f}x", *columns, verdict, minutes, seeds
