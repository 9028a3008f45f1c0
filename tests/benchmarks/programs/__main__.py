"""Run one program with every callback that is missing in the results file: python -m programs NAME RESULTS"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from programs.measure import Program, forms, run

ROOMS = ("forecasting", "tabular", "modules", "graphs")


def programs() -> dict[str, Program]:
    """Return every program by name."""
    rooms = (importlib.import_module(f"programs.{room}") for room in ROOMS)
    return {program.name: program for room in rooms for program in room.PROGRAMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the names and do nothing")
    parser.add_argument("name", nargs="?", choices=programs())
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--forms", nargs="*", help="all by default")
    given = parser.parse_args()
    if given.list:
        print(*programs(), sep="\n")
        return
    program = programs()[given.name]
    known = given.results.read_text(encoding="utf-8").splitlines() if given.results.exists() else []
    done = {(row["program"], row["form"]) for row in map(json.loads, known)}
    offered = list(forms(program))
    for form in given.forms or offered:
        if form in offered and (program.name, form) not in done:
            row = run(program, form)
            with given.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shown = (program.name, form, row["outcome"][:120], row.get("module"), row.get("error"), f"{row['seconds']} s")
            print(*shown, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
