"""Records of the race: one line of JSON a run, added as runs end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "results" / "runs.jsonl"
KEY = ("problem", "budget", "target", "method", "seed")
Record = dict[str, Any]


def key(record: Record) -> tuple[Any, ...]:
    """Return what tells a run from the others."""
    return tuple(record[name] for name in KEY)


def read(file: Path = FILE) -> list[Record]:
    """Read the records; of several of one run the last. A line that an interrupted command cut off is skipped."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[key(record)] = record
    return [*found.values()]


def add(record: Record, file: Path = FILE) -> None:
    """Add a record in one write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
