"""Every conformance check on every callback of the package and on others, and what each holds in memory:

    python tests/benchmarks/conformance.py [--write docs/correctness.md] [--only NAME ...]

Prints each outcome as it comes, then the two tables of docs/correctness.md, which --write puts between their markers.
Where torchao is installed, its PruneOptimizer stands in the last column.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import sys
from functools import partial
from pathlib import Path

import lightning
import torch

from lightning_sparse import conformance, noise
from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.conformance import Outcome, Subject, memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "conformance"))

import subjects

MARK = {"pass": "yes", "n/a": "n/a", "fail": "**no**"}


def run(columns: list[Subject], names: list[str]) -> dict[str, dict[str, Outcome]]:
    """Outcomes by check and subject."""
    found: dict[str, dict[str, Outcome]] = {}
    for name in names:
        found[name] = {subject.name: conformance.outcome(subject, name) for subject in columns}
        for subject, outcome in found[name].items():
            print(f"{subject:26} {name:44} {outcome.verdict:5} {outcome.reason[:160]}", flush=True)
    return found


def versions(columns: list[Subject]) -> str:
    """What ran."""
    ao = f", torchao {importlib.metadata.version('torchao')}" if any(s.name == "PruneOptimizer" for s in columns) else ""
    return f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}{ao}"


def table(columns: list[Subject], found: dict[str, dict[str, Outcome]]) -> str:
    """Checks by callbacks in Markdown, with the reasons of failures and of silence below."""
    notes: list[str] = []
    lines = [f"{versions(columns)}.", "", "| check | " + " | ".join(s.name for s in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = [_cell(row[subject.name], notes) for subject in columns]
        lines.append(f"| {conformance.CHECKS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def _cell(outcome: Outcome, notes: list[str]) -> str:
    if not outcome.reason:
        return MARK[outcome.verdict]
    reason = re.sub(r"\s+", " ", outcome.reason.replace("|", "/"))[:240]
    if reason not in notes:
        notes.append(reason)
    return f"{MARK[outcome.verdict]} ({notes.index(reason) + 1})"


def memory_table() -> str:
    """Extra bytes per selected weight, the largest of six steps."""
    mask = partial(AdaptiveMask, subjects.LOG_SUM, 0.5, curvature=None)
    rows = [
        Subject("ReweightedPenalty", subjects.penalty),
        Subject("AdaptiveProx", subjects.prox),
        Subject("AdaptiveMask(noise=ScaledBernoulli(), curvature=None)", lambda: [mask(noise=noise.ScaledBernoulli())]),
        Subject("AdaptiveMask(noise=Gaussian(), curvature=None)", lambda: [mask(noise=noise.Gaussian())]),
        Subject("AdaptiveMask(curvature=None), noise on the outputs", lambda: [mask()]),
        Subject("AdaptiveMask(), the default: the same with curvature", subjects.mask),
        subjects.OTHERS["ModelPruning"],
    ]
    lines = ["| callback | between batches | from batch start to backward |", "|---|---|---|"]
    for subject in rows:
        with conformance.undisturbed():
            sizes = memory.extra_bytes(subject)
        lines.append(f"| {subject.name} | {max(sizes['between']):.1f} | {max(sizes['within']):.1f} |")
    return "\n".join(lines)


def write(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of ``name`` in a file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, _, rest = path.read_text().partition(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", nargs="*", default=list(conformance.CHECKS), choices=list(conformance.CHECKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    others = [s for s in subjects.OTHERS.values() if s.optimizer is None or importlib.util.find_spec("torchao")]
    columns = [*subjects.OURS.values(), *others]
    checks, held = table(columns, run(columns, given.only)), memory_table()
    print(f"\n{checks}\n\n{held}")
    if given.write:
        write(given.write, "checks", checks)
        write(given.write, "memory", held)


if __name__ == "__main__":
    main()
