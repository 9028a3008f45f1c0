"""Published runs with an error ("slip"), compared with ours with and without the same error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.reproduction import table
from lightning_sparse.reproduction.figures import Trajectories, mean_and_band
from lightning_sparse.reproduction.rows import EPOCHS, ROWS, Row

_HEAD = ("run", "test error %", "non-zero %", *(f"epoch {epoch}" for epoch in EPOCHS))


def markdown(runs: Sequence[dict[str, Any]], found: Trajectories) -> str:
    """Format three lines per row with a slip: non-zero shares (%) at some epochs, means over seeds."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    for row in (row for row in ROWS if row.slip):
        lines += ["| " + " | ".join(cells) + " |" for cells in _three(row, runs, found)]
    return "\n".join(lines)


def slipped(key: str, recipes: Iterator[str] | Sequence[str]) -> str:
    """Return the recipe of a row with its slip, or an empty string."""
    return next((recipe for recipe in recipes if Path(recipe).stem == f"{key}_slip"), "")


def _three(row: Row, runs: Sequence[dict[str, Any]], found: Trajectories) -> Iterator[list[str]]:
    shares = [f"{100 * share:.1f}" for share in row.shares]
    yield [f"{row.title}, published, with the slip", f"{row.test_error:.2f}", f"{row.nonzero:.2f}", *shares]
    for title, recipe in (("with the slip", slipped(row.key, [run["recipe"] for run in runs])), ("corrected", row.recipe)):
        own = [run for run in runs if run["recipe"] == recipe]
        reached = [table.spread([run[name] for run in own]) or "not run yet" for name in ("test_error", "nonzero")]
        yield [f"{row.title}, ours, {title}", *reached, *_shares(found.get(recipe, {}))]


def _shares(seeds: dict[int, list[dict[str, float]]]) -> list[str]:
    if not seeds:
        return [""] * len(EPOCHS)
    curve = mean_and_band(seeds, "nonzero")[:, 1]
    return [f"{100 * curve[epoch - 1]:.1f}" if epoch <= len(curve) else "" for epoch in EPOCHS]
