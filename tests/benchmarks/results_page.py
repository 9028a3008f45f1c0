"""Write a page of docs/results from the record of ``lightning-sparse compare``: ``python tests/benchmarks/results_page.py cifar10``.

The text is in tests/benchmarks/results_NAME.md, with ``{table}`` where the runs go; the record is docs/results/records/NAME.csv, the
``runs.csv`` of the comparison without its failed runs. ``{table FOLDER}`` shows docs/results/records/FOLDER/NAME.csv.
``--write`` writes docs/results/NAME.md, else the page is printed.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "docs" / "results"
METRICS = {"accuracy": "accuracy, %", "bits": "bits a byte", "cosine": "cosine"}


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / "records" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return one line for each run: method, target, seed, zeros in %, the metrics of validation and test split."""
    names = [f"{stage}/{key}" for key in METRICS for stage in ("val", "test") if any(row.get(f"{stage}/{key}") for row in rows)]
    titles = [
        "method",
        "target, %",
        "seed",
        "zeros, %",
        "steps",
        *(f"{name.partition('/')[0]} {METRICS[name.partition('/')[2]]}" for name in names),
    ]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        target = f"{100 * float(row['target']):g}" if row["target"] else ""
        figures = [_shown(name, row.get(name, "")) for name in names]
        lines.append([f"`{row['method']}`", target, row["seed"], f"{100 * float(row['zeros']):.2f}", row["steps"], *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(name: str, value: str) -> str:
    if not value:
        return ""
    return f"{100 * float(value):.2f}" if name.endswith("accuracy") else f"{float(value):.4f}"


def page(name: str) -> str:
    text = (HERE / f"results_{name}.md").read_text(encoding="utf-8")
    return re.sub(r"\{table ?(\w*)\}", lambda found: table(read(f"{found[1]}/{name}" if found[1] else name)), text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(path.stem for path in (RESULTS / "records").glob("*.csv")))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.write:
        (RESULTS / f"{given.name}.md").write_text(page(given.name), encoding="utf-8")
    else:
        print(page(given.name), end="")
