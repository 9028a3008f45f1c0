"""Run every conformance check on every callback and on other tools, and measure their memory:

    python tests/benchmarks/conformance [--only CHECK ...] [--on CALLBACK ...] [--write docs/correctness.md]

Prints each outcome as it comes and keeps it in results.json beside this file, so that a part can be run again; then the two
tables of docs/correctness.md, which --write puts between their markers. Where torchao is installed, its PruneOptimizer
stands in the last column.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
from functools import partial
from pathlib import Path

import lightning
import torch

from lightning_sparse import conformance, noise
from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.conformance import Subject, memory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import subjects

STORE = Path(__file__).resolve().parent / "results.json"
MARK = {"pass": "yes", "n/a": "n/a", "fail": "**no**"}


def run(columns: list[Subject], names: list[str], store: Path) -> None:
    """Run checks on subjects and keep the outcomes."""
    for name in names:
        for subject in columns:
            outcome = conformance.outcome(subject, name)
            print(f"{subject.name:26} {name:44} {outcome.verdict:5} {outcome.reason[:160]}", flush=True)
            kept = json.loads(store.read_text()) if store.exists() else {}
            kept.setdefault(name, {})[subject.name] = [outcome.verdict, said(outcome.reason), versions()]
            store.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def said(reason: str) -> str:
    """Format a reason in one line, without paths and addresses."""
    return re.sub(r"0x[0-9a-f]+|(/[\w.+-]+){2,}", "...", " ".join(reason.replace("|", "/").split()))[:240]


def versions() -> str:
    """Return the versions."""
    ao = f", torchao {importlib.metadata.version('torchao')}" if importlib.util.find_spec("torchao") else ""
    return f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}{ao}"


def table(kept: dict[str, dict[str, list[str]]]) -> str:
    """Format the Markdown table of checks and callbacks, with reasons of "no" and "n/a" below."""
    notes: list[str] = []
    columns = [name for name in (*subjects.OURS, *subjects.OTHERS) if any(name in row for row in kept.values())]
    ran = sorted({outcome[2] for row in kept.values() for outcome in row.values()})
    lines = [f"{'; '.join(ran)}.", "", "| check | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in (name for name in conformance.CHECKS if name in kept):
        cells = [_cell(kept[name].get(column), notes) for column in columns]
        lines.append(f"| {conformance.CHECKS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), *_compiled(kept)])


def _compiled(kept: dict[str, dict[str, list[str]]]) -> list[str]:
    """List, for callbacks with compile=True, how many checks pass and which do not."""
    found = {name: {check: row[name][0] for check, row in kept.items() if name in row} for name in subjects.COMPILED}
    lines = ["", "With `compile=True`:", ""]
    for name, verdicts in found.items():
        told = f"{sum(verdict == 'pass' for verdict in verdicts.values())} of {len(verdicts)} checks pass"
        odd = {word: [f"`{check}`" for check, verdict in verdicts.items() if verdict == word] for word in ("fail", "n/a")}
        odd["not run"] = [f"`{check}`" for check in conformance.CHECKS if check not in verdicts]
        told += "".join(f"; {word}: {', '.join(names)}" for word, names in odd.items() if names)
        lines += [f"- {name.removesuffix(', compiled')}: {told}"] if verdicts else []
    return lines if any(found.values()) else []


def _cell(outcome: list[str] | None, notes: list[str]) -> str:
    if outcome is None:
        return ""
    verdict, reason, _ = outcome
    if not reason:
        return MARK[verdict]
    if reason not in notes:
        notes.append(reason)
    return f"{MARK[verdict]} ({notes.index(reason) + 1})"


def memory_table() -> str:
    """Format the table of extra bytes per selected weight, the largest of six steps."""
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
    others = [s for s in subjects.OTHERS.values() if s.optimizer is None or importlib.util.find_spec("torchao")]
    columns = {subject.name: subject for subject in [*subjects.OURS.values(), *subjects.COMPILED.values(), *others]}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(conformance.CHECKS), choices=list(conformance.CHECKS), metavar="CHECK")
    parser.add_argument("--on", nargs="*", default=list(columns), choices=list(columns), metavar="CALLBACK")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run([columns[name] for name in given.on], given.only, STORE)
    checks, held = table(json.loads(STORE.read_text())), memory_table()
    print(f"\n{checks}\n\n{held}")
    if given.write:
        write(given.write, "checks", checks)
        write(given.write, "memory", held)


if __name__ == "__main__":
    main()
