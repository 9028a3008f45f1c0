"""Sections of the performance page: tables of a record with verdicts, and its command and settings."""

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
    """Yield every list of rows in a record, with its path of keys."""
    if isinstance(results, Mapping):
        for key, part in results.items():
            yield from found_in(part, (*path, str(key)))
    elif isinstance(results, list) and results and all(isinstance(row, Mapping) for row in results):
        yield path, results


def markdown(rows: Rows) -> str:
    """Format a table with verdicts; values other than numbers and strings are left out."""
    return tables.markdown([judged(row, stray_of(row, rows)) for row in rows])


def judged(row: Mapping[str, Any], stray: float | None) -> dict[str, Any]:
    """Convert a row for the page: quartiles in one cell, and the verdict after subtracting A/A."""
    plain = {key: value for key, value in row.items() if key not in _HIDDEN and not isinstance(value, (Mapping, list))}
    if "value" in plain:  # of an arm that was timed
        plain = {"ms" if key == "value" else key: value * 1e3 if key == "value" else value for key, value in plain.items()}
    spread = f"{tables.cell(row['low'])} to {tables.cell(row['high'])}" if "low" in row else None
    cells = (row.get("ratio"), spread, stray if spread else None, row.get("goal"), verdict(row, stray or 0.0))
    return plain | dict(zip(_PLACES, cells, strict=True))


def verdict(row: Mapping[str, Any], stray: float) -> str | None:
    """Format the verdict from the row's ``met``, or its ``standing`` without a goal, or None."""
    if row.get("goal") is None or row.get("met") is None:
        return row.get("standing")
    over = row.get("ratio", row.get("both", 0.0)) - stray - row["goal"]
    return "met" if row["met"] else f"missed by {tables.cell(float(over))}"


def stray_of(row: Mapping[str, Any], rows: Rows) -> float | None:
    """Return a row's own A/A, or that of the A/A arm with the same base."""
    if "stray" in row:
        return float(row["stray"])
    again = [one for one in rows if rounds.AGAIN in one.values() and one.get("against") == row.get("against")]
    return max(again[0]["high"] - 1, 1 - again[0]["low"], 0.0) if again else None


def made_by(found: Mapping[str, Any]) -> str:
    """Format command, versions and settings of a record."""
    versions = ", ".join(f"{_NAMES.get(name, name)} {number}" for name, number in found["versions"].items())
    settings = ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in found["settings"].items())
    threads = f"{found['threads']} {'thread' if found['threads'] == 1 else 'threads'}"
    return f"`{found['command']}`: {versions}; {threads}" + (f"; {settings}" if settings else "") + "."


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(part)}" for key, part in value.items())
    return ", ".join(map(_said, value)) if isinstance(value, list) else tables.cell(value)


def section(found: Mapping[str, Any] | None, command: str, titles: Mapping[str, str] | None = None) -> str:
    """Format every table of a record with its title: the last key of its path, or its name in ``titles``."""
    if found is None:
        return f"{NOT_YET}: `{command}`."
    parts = []
    for path, rows in found_in(found["results"]):
        title = next(((titles or {})[key] for key in reversed(path) if key in (titles or {})), ", ".join(path))
        parts.append((f"**{title}**\n\n" if title else "") + markdown(rows))
    return "\n\n".join([*parts, made_by(found)])
