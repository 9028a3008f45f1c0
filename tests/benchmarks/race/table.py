"""Print the tables of the records: python tests/benchmarks/race table."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

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


def verdicts(runs: list[Record]) -> str:
    """Return, for each cell, which of our methods and which pruning validates best, and how far Sparsify is from the best."""
    head = ["problem", "budget", "zeros", "best of all", "best pruning", "best dual form", "Sparsify behind the best", "seeds"]
    lines = [head, ["---"] * len(head)]
    for cell in cells(runs):
        seeds = {run["seed"] for run in ended(runs, cell, "Sparsify")}
        others = [method for method in WAYS if method not in OURS and method != DENSE]
        found = [best_of(runs, cell, methods, seeds) for methods in ((*OURS, *others), others, OURS, ("Sparsify",))]
        if seeds and all(found):
            every, pruning, dual, own = (pair for pair in found if pair is not None)
            said = [f"{name} ({error:.2f})" for name, error in (every, pruning, dual)]
            lines.append([cell[0], cell[1], f"{cell[2]:.0%}", *said, f"{own[1] - every[1]:.2f}", str(len(seeds))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="race table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=records.FILE)
    runs = records.read(parser.parse_args().records)
    for problem, budget in dict.fromkeys(cell[:2] for cell in cells(runs)):
        print(f"{PROBLEMS[problem].title}, {PROBLEMS[problem].steps(budget)} steps: test error, %\n\n{table(runs, problem, budget)}\n")
    print(verdicts(runs))
