"""Compare penalty and mask at one lam on six kinds of small networks: zeros and validation loss, without a test set.

    python tests/benchmarks/exchange_networks.py [--seeds 0 1] [--only GRU] [--write docs/exchange/networks.md]

Each run adds a line to ``--results``, and a command that was interrupted goes on where it stopped. ``--table`` runs nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

from lightning.pytorch import Callback
from networks.problems import PROBLEMS
from networks.training import run

from lightning_sparse import callbacks, penalties

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "docs" / "exchange" / "networks.jsonl"
LAM, PENALTY = 1e-3, penalties.LogSum(eps=2.0)
FORMS = ("dense", "penalty", "mask", "mask, all noise")
FACTOR, SHARE = 1.5, 0.1  # zeros within that factor, loss within that share of the penalty's
GUESS = 0.9  # of a constant answer's loss
VERSIONS = ("torch", "lightning", "numpy", "scikit-learn")


def form(name: str) -> list[Callback]:
    """Make new callbacks with default settings; the last is the noise of earlier versions, which replaced all of the penalty."""
    if name == "dense":
        return []
    if name == "penalty":
        return [callbacks.ReweightedPenalty(PENALTY, lam=LAM)]
    whole = {"alpha_min": 1e-3, "ceiling": 10.0, "remainder": False} if name == "mask, all noise" else {}
    return [callbacks.AdaptiveMask(PENALTY, lam=LAM, **whole)]


def read(path: Path) -> list[dict[str, Any]]:
    """Read a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def train(path: Path, seeds: Iterable[int], only: list[str] | None, forms: Iterable[str]) -> None:
    """Run what is missing in the file."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    for seed in seeds:
        for problem in PROBLEMS:
            for name in forms:
                done = {(row["problem"], row["form"], row["seed"]) for row in read(path)}
                if (problem.name, name, seed) in done or (only and not any(part in problem.name for part in only)):
                    continue
                row = {"problem": problem.name, "form": name, "seed": seed} | run(problem, form(name), seed) | {"versions": versions}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(problem.name, name, seed, f"zeros {row['zeros']:.3f} loss {row['loss']:.4f} {row['seconds']:.0f} s", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table with one line per problem."""
    lines = [
        "| network | constant | dense | penalty | mask | zeros, ratio | loss, ratio | verdict | noise for all of the penalty |",
        "|---" * 9 + "|",
    ]
    for name in dict.fromkeys(row["problem"] for row in rows):
        own = {kind: [row for row in rows if row["problem"] == name and row["form"] == kind] for kind in FORMS}
        cells = {
            kind: f"{mean(r['loss'] for r in found):.3f} at {mean(r['zeros'] for r in found):.1%}" for kind, found in own.items() if found
        }
        zeros, loss = (mean(r[key] for r in own["mask"]) / mean(r[key] for r in own["penalty"]) for key in ("zeros", "loss"))
        constant = own["mask"][0]["constant"]
        lines.append(
            f"| {name} | {constant:.2f} | {cells.get('dense', '').split(' at ')[0]} | {cells['penalty']} | {cells['mask']} | {zeros:.2f} | "
            f"{loss:.2f} | {verdict(zeros, loss, max(r['loss'] for r in own['mask']), constant)} | {cells.get('mask, all noise', '')} |"
        )
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    return f"{mean(row['loss'] for row in rows):.3f} at {mean(row['zeros'] for row in rows):.1%}"


def verdict(zeros: float, loss: float, worst: float, constant: float) -> str:
    """Return the missed goals: zeros within FACTOR, loss at most SHARE above, no run at a constant prediction."""
    missed = [] if 1 / FACTOR <= zeros <= FACTOR else ["zeros"]
    missed += [] if loss <= 1 + SHARE else ["loss"]
    missed += ["a constant answer"] if worst > GUESS * constant else []
    return "missed: " + ", ".join(missed) if missed else "met"


def page(rows: list[dict[str, Any]]) -> str:
    """Format the page."""
    template = Template((HERE / "networks_page.md").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items())
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return template.substitute(table=table(rows), versions=versions, seeds=seeds, lam=f"{LAM:g}", penalty=repr(PENALTY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", help="parts of the problems' names; all by default")
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--write", type=Path, help="write the page there")
    given = parser.parse_args()
    if not given.table:
        train(given.results, given.seeds, given.only, given.forms)
    rows = read(given.results)
    print(table(rows))
    if given.write:
        given.write.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
