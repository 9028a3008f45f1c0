"""Sections of the performance page: tables of what a benchmark recorded, with verdicts, and how it was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from performance import rounds, tables
from performance.tables import Rows

NOT_YET = "Not run yet"
_HIDDEN = ("low", "high", "stray", "goal", "met", "standing", "ratio", "floor")  # most go into _PLACES; a floor in words, nowhere
_PLACES = ("ratio", "quartiles", "A/A", "goal", "verdict")
_NAMES = {"python": "Python"}


def found_in(results: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Rows]]:
    """Every list of rows in what a benchmark recorded, with the keys that lead to it."""
    if isinstance(results, Mapping):
        for key, part in results.items():
            yield from found_in(part, (*path, str(key)))
    elif isinstance(results, list) and results and all(isinstance(row, Mapping) for row in results):
        yield path, results


def markdown(rows: Rows) -> str:
    """A table with a verdict for each goal; what is no number or text in a row is left out."""
    return tables.markdown([judged(row, stray_of(row, rows)) for row in rows])


def judged(row: Mapping[str, Any], stray: float | None) -> dict[str, Any]:
    """A row for the page: quartiles in one cell, and by how much a goal is met or missed once the A/A arm's part is off."""
    plain = {key: value for key, value in row.items() if key not in _HIDDEN and not isinstance(value, (Mapping, list))}
    if "value" in plain:  # of an arm that was timed
        plain = {"ms" if key == "value" else key: value * 1e3 if key == "value" else value for key, value in plain.items()}
    spread = f"{tables.cell(row['low'])} to {tables.cell(row['high'])}" if "low" in row else None
    cells = (row.get("ratio"), spread, stray if spread else None, row.get("goal"), verdict(row, stray or 0.0))
    return plain | dict(zip(_PLACES, cells, strict=True))


def verdict(row: Mapping[str, Any], stray: float) -> str | None:
    """``met`` is taken from the row, where it was decided, and so is the ``standing`` of what has no goal; else None."""
    if row.get("goal") is None or row.get("met") is None:
        return row.get("standing")
    over = row.get("ratio", row.get("both", 0.0)) - stray - row["goal"]
    return "met" if row["met"] else f"missed by {tables.cell(float(over))}"


def stray_of(row: Mapping[str, Any], rows: Rows) -> float | None:
    """A row's own, or that of the A/A arm among its neighbours that are held against the same base."""
    if "stray" in row:
        return float(row["stray"])
    again = [one for one in rows if rounds.AGAIN in one.values() and one.get("against") == row.get("against")]
    return max(again[0]["high"] - 1, 1 - again[0]["low"], 0.0) if again else None


def made_by(found: Mapping[str, Any]) -> str:
    """The command, versions and settings of a record."""
    versions = ", ".join(f"{_NAMES.get(name, name)} {number}" for name, number in found["versions"].items())
    settings = ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in found["settings"].items())
    threads = f"{found['threads']} {'thread' if found['threads'] == 1 else 'threads'}"
    return f"`{found['command']}`: {versions}; {threads}" + (f"; {settings}" if settings else "") + "."


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(part)}" for key, part in value.items())
    return ", ".join(map(_said, value)) if isinstance(value, list) else tables.cell(value)


def section(found: Mapping[str, Any] | None, command: str, titles: Mapping[str, str] | None = None) -> str:
    """Every table of a record with its title, the last of the keys that lead to it by default; ``titles`` may rename one."""
    if found is None:
        return f"{NOT_YET}: `{command}`."
    parts = []
    for path, rows in found_in(found["results"]):
        title = next(((titles or {})[key] for key in reversed(path) if key in (titles or {})), ", ".join(path))
        parts.append((f"**{title}**\n\n" if title else "") + markdown(rows))
    return "\n\n".join([*parts, made_by(found)])
