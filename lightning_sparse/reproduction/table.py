"""The table of the case study in Markdown: results of the runs over seeds, with the published figures."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.reproduction.rows import ROWS, Row

Runs = Sequence[dict[str, Any]]  # one mapping per run, with the keys of result.json

PUBLISHED_EPOCHS = 200
_HEAD = (
    "method",
    "test error %",
    "published",
    "difference, points",
    "non-zero %",
    "published",
    "difference, relative",
    "non-zero in the file %",
    "seeds",
    "epochs",
    "minutes a run",
)
_READING = (
    "Mean (standard deviation) over the seeds; the published figures are one run each. A weight counts as non-zero if its "
    "alpha is at least the callback's `tol` (0.05), as in the paper; the file's share counts the non-zero weights of the checkpoint, "
    "and the test error is that of the checkpoint."
)


def rows_of(runs: Runs) -> list[Row]:
    """Return the rows of the case study, then one row for every other recipe in ``runs``."""
    known = {row.recipe for row in ROWS}
    others = sorted({str(run["recipe"]) for run in runs} - known)
    return [*ROWS, *(Row(Path(recipe).stem if recipe.endswith(".yaml") else recipe, recipe) for recipe in others)]


def of_row(row: Row, runs: Runs) -> list[dict[str, Any]]:
    """Return the runs of one row."""
    return [run for run in runs if run["recipe"] == row.recipe]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format values as ``mean (sd)`` with the sample sd; a single value without sd, no values as an empty string."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else mean


def markdown(runs: Runs) -> str:
    """Return commands and versions, the table, and a footnote for each published run that deviates from its method."""
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
    notes.append(f"The published run of {row.title} deviates from the method: {row.slip}. Ours does not.")
    return f" ({len(notes)})"


def _published(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _apart(values: Sequence[float], published: float | None, relative: bool = False) -> str:
    """Format the mean of our values minus the published value, in points or relative to the published value."""
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
    """Return the commands that repeat these runs: one for each combination of epochs, seeds and overrides."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows_of(runs):
        own = of_row(row, runs)
        if own:
            seeds = [str(seed) for seed in sorted({run["seed"] for run in own})]
            key = ("--epochs", str(own[0]["epochs"]), "--seeds", *seeds, *shlex.split(str(own[0]["overrides"])))
            groups.setdefault(key, []).append(row.key if row in ROWS else row.recipe)
    return [_command(key, names) for key, names in groups.items()]


def _command(key: tuple[str, ...], names: list[str]) -> str:
    every = [row.key for row in ROWS]
    chosen = [] if names == every else ["--rows", *names]
    return shlex.join(["lightning-sparse", "reproduce", *chosen, *key])
