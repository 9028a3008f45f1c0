"""Tables from rows (dicts with the same keys), for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def cell(value: Any) -> str:
    """Format a value: numbers to three digits, large ones in full, yes or no, empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def columns(rows: Rows) -> list[str]:
    """Return all keys with a value in some row, in order of first occurrence."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [name for name in names if any(row.get(name) is not None for row in rows)]


def cells(rows: Rows) -> list[list[str]]:
    """Return the titles, with spaces for underscores, then one line per row."""
    names = columns(rows)
    return [[name.replace("_", " ") for name in names], *([cell(row.get(name)) for name in names] for row in rows)]


def aligned(rows: Rows) -> str:
    """Format for a terminal: the first column left-aligned, the others right-aligned."""
    lines = cells(rows)
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def markdown(rows: Rows) -> str:
    """Format as Markdown."""
    head, *lines = [[text.replace("|", "\\|") for text in line] for line in cells(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
