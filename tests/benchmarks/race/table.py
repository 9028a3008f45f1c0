"""Print the tables of the records: python tests/benchmarks/race table."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from race import records
from race.problems import BUDGETS, PROBLEMS
from race.records import Record
from race.ways import DENSE, OURS, WAYS

Cell = tuple[str, str, float]  # problem, budget, target


def ended(runs: Iterable[Record], cell: Cell, method: str) -> list[Record]:
    """Return the runs of a cell and a method that ended without an exception, by seed."""
    wanted = (*cell[:2], 0.0 if method == DENSE else cell[2], method)
    found = [run for run in runs if (run["problem"], run["budget"], run["target"], run["method"]) == wanted and "error" not in run]
    return sorted(found, key=lambda run: run["seed"])


def cells(runs: Iterable[Record]) -> list[Cell]:
    """Return the cells that have records, in the order of the problems."""
    found = {(run["problem"], run["budget"], run["target"]) for run in runs if run["method"] != DENSE}
    return sorted(found, key=lambda cell: ([*PROBLEMS].index(cell[0]), [*BUDGETS].index(cell[1]), cell[2]))


def entry(found: Sequence[Record]) -> str:
    """Return the mean test error of runs, with their range and number; a dash without any."""
    if not found:
        return "-"
    errors = [run["test_error"] for run in found]
    spread = f" ({min(errors):.2f} to {max(errors):.2f})" if len(errors) > 1 else ""
    off = max((abs(run["missed"]) for run in found), default=0)
    return f"{mean(errors):.2f}{spread}" + (f", {off} weights off" if off else "")


def table(runs: list[Record], problem: str, budget: str) -> str:
    """Return the test errors of a problem as a table in Markdown: a row a method, a column a target."""
    targets = [cell[2] for cell in cells(runs) if cell[:2] == (problem, budget)]
    head = ["method", *(f"{target:.0%} zeros" for target in targets), "seeds"]
    lines = [head, ["---"] * len(head)]
    for method in WAYS:
        found = [ended(runs, (problem, budget, target), method) for target in targets]
        if any(found):
            counts = sorted({len(some) for some in found if some})
            lines.append([method, *map(entry, found), " or ".join(map(str, counts))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def best_of(runs: list[Record], cell: Cell, methods: Iterable[str], seeds: set[int] | None = None) -> tuple[str, float] | None:
    """Return the method with the least mean validation error on the same seeds, and that error."""
    errors = {}
    for method in methods:
        found = [run for run in ended(runs, cell, method) if seeds is None or run["seed"] in seeds]
        if found and (seeds is None or len(found) == len(seeds)):
            errors[method] = mean(run["validation_error"] for run in found)
    return min(errors.items(), key=lambda pair: pair[1]) if errors else None


@dataclass(frozen=True)
class Compared:
    """The methods with the least mean validation error in a cell, and those errors, on the seeds that Sparsify was run with."""

    cell: Cell
    seeds: set[int]
    every: tuple[str, float]
    pruning: tuple[str, float]
    dual: tuple[str, float]

    @property
    def name(self) -> str:
        problem, budget, target = self.cell
        return f"{problem} {budget} {target:.0%}"


def compared(runs: list[Record]) -> list[Compared]:
    """Return the comparison of each cell in which Sparsify and a pruning have been run."""
    others = [method for method in WAYS if method not in OURS and method != DENSE]
    rows = []
    for cell in cells(runs):
        seeds = {run["seed"] for run in ended(runs, cell, "Sparsify")}
        every, pruning, dual = (best_of(runs, cell, methods, seeds) for methods in ((*OURS, *others), others, OURS))
        if seeds and every and pruning and dual:
            rows.append(Compared(cell, seeds, every, pruning, dual))
    return rows


def behind(runs: list[Record], cell: Cell, method: str, best: str, seeds: Iterable[int]) -> tuple[float, float]:
    """Return the mean difference of two methods' validation errors on the same seeds, and its standard error; nan for one seed."""
    errors = [{run["seed"]: run["validation_error"] for run in ended(runs, cell, name)} for name in (method, best)]
    apart = [errors[0][seed] - errors[1][seed] for seed in seeds]
    return mean(apart), stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else math.nan


def verdicts(runs: list[Record]) -> str:
    """Return, for each cell, which of our methods and which pruning validates best, and how far Sparsify is from the best."""
    head = ["problem", "budget", "zeros", "best of all", "best pruning", "best dual form", "Sparsify behind the best", "seeds"]
    lines = [head, ["---"] * len(head)]
    for row in compared(runs):
        said = [f"{name} ({error:.2f})" for name, error in (row.every, row.pruning, row.dual)]
        apart, spread = behind(runs, row.cell, "Sparsify", row.every[0], row.seeds)
        said.append(f"{apart:.2f}" + (f" ± {spread:.2f}" if spread > 0 else ""))
        lines.append([row.cell[0], row.cell[1], f"{row.cell[2]:.0%}", *said, str(len(row.seeds))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals(runs: list[Record]) -> str:
    """Return a line for each goal of the race at 90 % zeros and more: the cells that meet it, and those that do not."""
    rows = [row for row in compared(runs) if row.cell[2] >= 0.9]
    won = {row.name: behind(runs, row.cell, row.dual[0], row.pruning[0], row.seeds) for row in rows}
    gain = -mean(apart for apart, _ in won.values()) if won else math.nan
    masks = {}
    for row in rows:
        both = [{run["seed"] for run in ended(runs, row.cell, name)} for name in ("AdaptiveMask", "ReweightedPenalty")]
        if both[0] & both[1]:
            masks[row.name] = behind(runs, row.cell, "AdaptiveMask", "ReweightedPenalty", both[0] & both[1])
    own = {row.name: behind(runs, row.cell, "Sparsify", row.every[0], row.seeds) for row in rows}
    return "\n".join(
        [
            f"- {_met(won, 0)}: the best dual form is at most the best pruning; on average it is {gain:.2f} points better.",
            f"- {_met(masks, 0.3)}: AdaptiveMask is at most 0.3 points behind ReweightedPenalty.",
            f"- {_met(own, 0.1)}: Sparsify is at most 0.1 points behind the best of all.",
        ]
    )


def _met(apart: Mapping[str, tuple[float, float]], most: float) -> str:
    """Return how many cells are at most ``most`` behind, and those that are not."""
    missed = [f"{name} ({by:.2f}{f' ± {spread:.2f}' if spread > 0 else ''})" for name, (by, spread) in apart.items() if round(by, 6) > most]
    return f"{len(apart) - len(missed)} of {len(apart)} cells" + (f" (not {', '.join(missed)})" if missed else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="race table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=records.FILE)
    runs = records.read(parser.parse_args().records)
    for problem, budget in dict.fromkeys(cell[:2] for cell in cells(runs)):
        print(f"{PROBLEMS[problem].title}, {PROBLEMS[problem].steps(budget)} steps: test error, %\n\n{table(runs, problem, budget)}\n")
    print(f"{verdicts(runs)}\n\n{goals(runs)}")
