"""The table of the case study in Markdown: what the runs reached, over seeds, beside the published figures."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.reproduction.rows import ROWS, Row

Runs = Sequence[dict[str, Any]]  # one mapping a run, with the keys of its result.json

PUBLISHED_EPOCHS = 200
_HEAD = (
    "method",
    "test error %",
    "published",
    "apart, points",
    "non-zero %",
    "published",
    "apart, relative",
    "non-zero in the file %",
    "seeds",
    "epochs",
    "minutes a run",
)
_READING = (
    "Mean (standard deviation) over the seeds; the published figures are one run each. A weight counts as non-zero where its "
    "alpha is at least the form's `tol` (0.05), as in the paper; the file's share counts what is not 0 in the checkpoint, and "
    "the test error is that checkpoint's."
)


def rows_of(runs: Runs) -> list[Row]:
    """The rows of the case study, then one for every other recipe that was run."""
    known = {row.recipe for row in ROWS}
    others = sorted({str(run["recipe"]) for run in runs} - known)
    return [*ROWS, *(Row(Path(recipe).stem if recipe.endswith(".yaml") else recipe, recipe) for recipe in others)]


def of_row(row: Row, runs: Runs) -> list[dict[str, Any]]:
    """The runs of one row."""
    return [run for run in runs if run["recipe"] == row.recipe]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``mean (sd)``, the sd of a sample; the value alone where there is one, nothing where there is none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else mean


def markdown(runs: Runs) -> str:
    """Settings, versions and commands, the table, and a footnote for each published run that had a slip."""
    notes: list[str] = []
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    lines += ["| " + " | ".join(_cells(row, of_row(row, runs), notes)) + " |" for row in rows_of(runs)]
    return "\n".join([*_preamble(runs), "", *lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]).rstrip() + "\n"


def _cells(row: Row, runs: Runs, notes: list[str]) -> list[str]:
    error, share = ([run[name] for run in runs] for name in ("test_error", "nonzero"))
    return [
        row.title + _note(row, notes),
        spread(error) or "not run yet",
        _published(row.test_error),
        _apart(error, row.test_error),
        spread(share) or "not run yet",
        _published(row.nonzero),
        _apart(share, row.nonzero, relative=True),
        spread([run["nonzero_file"] for run in runs]),
        _listed(run["seed"] for run in runs),
        _listed(run["epochs"] for run in runs),
        spread([run["seconds"] / 60 for run in runs], 1),
    ]


def _note(row: Row, notes: list[str]) -> str:
    if not row.slip:
        return ""
    notes.append(f"The published run of {row.title} differs from what its method is: {row.slip}. Ours does not.")
    return f" ({len(notes)})"


def _published(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _apart(values: Sequence[float], published: float | None, relative: bool = False) -> str:
    """Mean of ours minus the published figure: in points, or as a share of the published figure."""
    if published is None or not values:
        return ""
    ours = statistics.mean(values)
    return f"{100 * (ours / published - 1):+.0f} %" if relative else f"{ours - published:+.2f}"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def _preamble(runs: Runs) -> list[str]:
    if not runs:
        return ["No run yet. The published figures are of 200 epochs."]
    lines = ["```sh", *commands(runs), "```", "", f"{'; '.join(sorted({str(run['versions']) for run in runs}))}. {_READING}"]
    other = sorted({int(run["epochs"]) for run in runs} - {PUBLISHED_EPOCHS})
    if other:
        lines += ["", f"**The published figures are of {PUBLISHED_EPOCHS} epochs, runs of {_listed(other)} do not compare with them.**"]
    return lines


def commands(runs: Runs) -> list[str]:
    """The commands that make these runs: one for each set of epochs, seeds and overrides."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows_of(runs):
        found = of_row(row, runs)
        if found:
            seeds = [str(seed) for seed in sorted({run["seed"] for run in found})]
            key = ("--epochs", str(found[0]["epochs"]), "--seeds", *seeds, *shlex.split(str(found[0]["overrides"])))
            groups.setdefault(key, []).append(row.key if row in ROWS else row.recipe)
    return [_command(key, names) for key, names in groups.items()]


def _command(key: tuple[str, ...], names: list[str]) -> str:
    every = [row.key for row in ROWS]
    chosen = [] if names == every else ["--rows", *names]
    return shlex.join(["lightning-sparse", "reproduce", *chosen, *key])
