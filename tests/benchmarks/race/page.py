"""Write docs/race.md and its pictures from the records: python tests/benchmarks/race page [--write docs/race.md]."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from statistics import mean

from race import again, records
from race.problems import BUDGETS, PROBLEMS
from race.records import Record
from race.run import TARGETS
from race.table import cells, ended, goals, table, verdicts
from race.ways import DENSE, WAYS

TEXT = Path(__file__).with_name("page.md")
DOCS = Path(__file__).resolve().parents[3] / "docs"


def page(runs: list[Record]) -> str:
    """Return the page: the text, with tables, choices, what failed and what has not been run."""
    parts = []
    for problem, budget in dict.fromkeys(cell[:2] for cell in cells(runs)):
        title = f"### {PROBLEMS[problem].title}, {PROBLEMS[problem].steps(budget):,} steps"
        parts.append(f"{title}\n\nTest error in %, mean (least to most).\n\n{table(runs, problem, budget)}")
        if len(shares(runs, problem, budget)) > 1:
            parts.append(f"![Error](race/{problem}_{budget}.png)")
    versions = sorted({", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in runs if "versions" in run})
    filled = {
        "tables": "\n\n".join(parts),
        "verdicts": verdicts(runs),
        "goals": goals(runs),
        "again": again.table(again.read()),
        "missing": missing(runs),
        "failed": failed(runs),
        "versions": "; ".join(versions),
        "count": str(len(runs)),
    }
    text = TEXT.read_text(encoding="utf-8")
    for name, value in filled.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def shares(runs: list[Record], problem: str, budget: str) -> list[float]:
    """Return the targets of a problem and a budget that have records."""
    return [cell[2] for cell in cells(runs) if cell[:2] == (problem, budget)]


def missing(runs: list[Record]) -> str:
    """Return a line for each problem and budget: how many of its cells of target and method have been run."""
    lines = []
    for problem, budget in product(PROBLEMS, BUDGETS):
        every = [(target, method) for target in TARGETS for method in WAYS if method != DENSE]
        found = [len(ended(runs, (problem, budget, target), method)) for target, method in every]
        done = sum(count > 0 for count in found)
        lines.append(
            f"- {problem}, {budget}: {done} of {len(every)} cells have a run, {sum(count >= 3 for count in found)} have three seeds."
        )
    return "\n".join(lines)


def failed(runs: list[Record]) -> str:
    """Return the runs that ended in an exception."""
    lines = [f"- {' / '.join(map(str, records.key(run)))}: {run['error']}" for run in runs if "error" in run]
    return "\n".join(lines) or "None."


def draw(runs: list[Record], folder: Path) -> list[Path]:
    """Draw test error against the share of zeros, a picture a problem and budget with more than one share; return the files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for problem, budget in dict.fromkeys(cell[:2] for cell in cells(runs)):
        targets = shares(runs, problem, budget)
        if len(targets) < 2:
            continue
        figure = Figure(figsize=(8.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for number, method in enumerate(name for name in WAYS if name != DENSE):
            points = [(target, ended(runs, (problem, budget, target), method)) for target in targets]
            known = [(100 * (1 - target), mean(run["test_error"] for run in found)) for target, found in points if found]
            if known:
                marker = "osv^D<>PX*"[(number + number // 10) % 10]  # another one where the colours begin again
                axes.plot(*zip(*known, strict=True), f"{marker}-", label=method, color=f"C{number % 10}", markersize=5)
        if dense := ended(runs, (problem, budget, 0.0), DENSE):
            axes.axhline(mean(run["test_error"] for run in dense), color="grey", linestyle=":", label=DENSE)
        axes.set(xscale="log", xlabel="weights left, %", ylabel="test error, %", title=PROBLEMS[problem].title)
        left = [100 * (1 - target) for target in targets]
        axes.set_xticks(left, [f"{share:g}" for share in left])
        axes.set_xticks([], minor=True)
        axes.invert_xaxis()
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        files.append(folder / f"{problem}_{budget}.png")
        figure.savefig(files[-1], dpi=110, metadata={"Software": None})
    return files


def main() -> None:
    parser = argparse.ArgumentParser(prog="race page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=records.FILE)
    parser.add_argument("--write", type=Path, default=DOCS / "race.md", help="the page; its pictures are in a folder of the same name")
    given = parser.parse_args()
    runs = records.read(given.records)
    given.write.write_text(page(runs), encoding="utf-8")
    files = draw(runs, given.write.with_suffix(""))
    print(f"{given.write} and {len(files)} pictures from {len(runs)} records")
