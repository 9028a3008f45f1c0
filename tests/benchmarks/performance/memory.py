"""Measure bytes per selected weight of each callback and of other packages: python tests/benchmarks/performance memory

One Linear layer of --weights float32 weights is trained with a fused Adam, in a process of its own for each line. "persistent"
is what is held between steps, gradients aside, and "peak" the most within a step, each beyond the same run without any of it,
which is run twice (A/A). Both are taken from the tensors, exactly, and once more in a second process from its resident set.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from performance import arguments, cases, held, record, tables
from performance.jobs import be_quiet

AGAIN = "nothing (A/A)"
PACKAGES = ("numpy", "torchao", "bayesian-torch")


def measured(name: str, weights: int, by: str) -> dict[str, int]:
    """Measure one case in a new process."""
    command = [sys.executable, str(Path(__file__).resolve().parent), "memory", "--one", name, "--by", by, "--weights", str(weights)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | held.ENVIRONMENT, check=False)
    if done.returncode:
        raise SystemExit(f"measuring {name!r} by {by} failed with exit code {done.returncode}; its error is above")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, case: str, weights: int, plain: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Return bytes per weight in addition to the plain run, by each way of measuring."""
    found: dict[str, Any] = {"case": name}
    for by, base in plain.items():
        own = measured(case, weights, by)
        found |= {f"{what}_by_{by}": (own[what] - base[what]) / base["weights"] for what in ("persistent", "peak")}
    return found


def rows(names: list[str], weights: int) -> list[dict[str, Any]]:
    """Return the A/A row, the chosen cases, and rows without figures for missing packages."""
    plain = {by: measured(cases.PLAIN, weights, by) for by in held.METERS}
    found = [row(AGAIN, cases.PLAIN, weights, plain)]
    for name in names:
        installed = cases.CASES[name].installed
        found.append(row(name, name, weights, plain) if installed else {"case": f"{name}: not installed"})
        print(", ".join(f"{key} {tables.cell(value)}" for key, value in found[-1].items()), flush=True)
    return found


def say(name: str, weights: int, by: str) -> None:
    """Measure one case in this (child) process."""
    be_quiet(1)
    print(json.dumps(held.held(cases.CASES[name], weights, by)))


def main() -> None:
    names = [name for name in cases.CASES if name != cases.PLAIN]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=arguments.whole(10**4), default=10**7)
    parser.add_argument("--on", nargs="+", choices=names, default=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=record.FOLDER / "memory.json", help="the JSON file to write")
    parser.add_argument("--one", choices=list(cases.CASES), help=argparse.SUPPRESS)
    parser.add_argument("--by", choices=list(held.METERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return say(given.one, given.weights, given.by)
    be_quiet(1)  # as in the processes that measure
    found = rows(given.on, given.weights)
    print(f"\n{tables.aligned(found)}")
    here = [name for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_"))]
    print(record.write(given.out, arguments.command(), {"weights": given.weights, "steps": held.STEPS}, found, here))
    return None


if __name__ == "__main__":
    main()
