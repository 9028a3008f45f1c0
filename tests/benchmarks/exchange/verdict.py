"""Verdicts from the rows of the tables: how often the two forms agree, and how often magnitude pruning is best."""

from __future__ import annotations

from collections.abc import Sequence

from exchange.frontier import Runs
from exchange.tables import MISSING, WITHIN_FACTOR, WITHIN_POINTS, equal_lambda_rows, level_rows

_SHARES, _POINTS = 7, 5  # columns with yes or no
_ERRORS = (2, 3, 7)  # penalty form, mask form, pruning


def markdown(runs: Runs) -> str:
    """Return three list items; missing runs are not counted."""
    shares, levels = list(equal_lambda_rows(runs)), list(level_rows(runs))
    near = f"At equal lam the mask form's share of non-zero weights is within a factor of {WITHIN_FACTOR:g} of the penalty form's"
    close = f"At equal sparsity the mask form's error is at most {WITHIN_POINTS:g} points above the penalty form's"
    lowest = "Magnitude pruning has the lowest error of the three at the same sparsity"
    counted = {near: _count(shares, _SHARES), close: _count(levels, _POINTS), lowest: pruning_wins(levels)}
    return "\n".join(f"- {text}: {count}." for text, count in counted.items())


def _count(rows: Sequence[Sequence[str]], column: int) -> str:
    said = [row[column] for row in rows if row[column]]
    return f"{said.count('yes')} of {len(said)}{_left_out(len(rows) - len(said))}" if said else MISSING


def _left_out(count: int) -> str:
    return f" ({count} more not run or out of range)" if count else ""


def pruning_wins(rows: Sequence[Sequence[str]]) -> str:
    """Count the rows at equal sparsity in which pruning is best, among those that all three frontiers reach."""
    errors = [[float(row[column]) for column in _ERRORS] for row in rows if all(_is_number(row[column]) for column in _ERRORS)]
    won = sum(pruned < min(others) for *others, pruned in errors)
    return f"{won} of {len(errors)}{_left_out(len(rows) - len(errors))}" if errors else MISSING


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
