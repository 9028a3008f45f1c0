"""Records as CSV: write them from finished runs, restore run folders from them, and read them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exchange.plan import POINT, Planned
from lightning_sparse.reproduction import known, written
from lightning_sparse.reproduction.runs import Job, columns, read

_POINT = ("run", "arm", "study", "variant", "net", "penalty", "form", "calibrated", "lam")
_REACHED = ("val_error", "test_error", "nonzero", "nonzero_file", "weights", "seconds")
COLUMNS = (*_POINT, "seed", "epochs", *_REACHED, "recipe", "overrides", "first", "versions")
_TEXT = (*_POINT[:-1], "recipe", "overrides", "first", "versions")
FOLDER = Path(__file__).resolve().parent / "results"
_WHOLE = ("seed", "epochs", "weights")
Gaps = dict[str, list[dict[str, float]]]  # run, one line an epoch


def write(out: Path) -> list[Path]:
    """``runs.csv`` and ``trajectories.csv`` of every finished run in ``out``, whichever command trained it; their paths.

    Errors are in %, and so are the shares of weights that are not zero; seconds are of the wall clock.
    """
    folders = sorted((path.parent for path in out.glob("*/result.json") if (path.parent / POINT).is_file()), key=lambda path: path.name)
    files = [written.csv_of(out / written.RUNS, list(COLUMNS), [_line(folder) for folder in folders])]
    epochs = [{"run": folder.name} | written.digits(line) for folder in folders for line in read(folder / "trajectory.csv")]
    return [*files, written.csv_of(out / written.TRAJECTORIES, ["run", *columns(epochs)], epochs)]  # type: ignore[arg-type]


def _line(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "result.json").read_text()) | json.loads((folder / POINT).read_text())
    return {name: found[name] for name in COLUMNS} | {"overrides": written.portable(found["overrides"].split())}


def lay_out(recorded: Path, out: Path) -> int:
    """Restore the runs in the CSVs of ``recorded`` to ``out``, unless they exist; return their number."""
    epochs, given = read_trajectories(recorded / written.TRAJECTORIES), 0
    for run in read_runs(recorded / written.RUNS):
        job = Job(run["recipe"], run["seed"], run["epochs"], out / run["run"])
        if known.give(job, run, epochs[run["run"]]):
            point = {name: run[name] for name in (*_POINT, "first")}
            (job.folder / POINT).write_text(json.dumps(point, indent=1))
            given += 1
    return given


def read_runs(file: Path) -> list[dict[str, Any]]:
    """Read ``runs.csv`` with typed values. Raises ValueError naming the file if a network has runs of two lengths."""
    with file.open(newline="", encoding="utf-8") as text:
        found = [{name: _value(name, value) for name, value in line.items()} for line in csv.DictReader(text)]
    for net in {run["net"] for run in found}:
        lengths = sorted({run["epochs"] for run in found if run["net"] == net})
        if len(lengths) > 1:
            raise ValueError(f"{file} mixes runs of {lengths} epochs of {net}; their figures are not one table")
    return found


def _value(name: str, text: str) -> Any:
    return text if name in _TEXT else int(text) if name in _WHOLE else float(text)


def read_trajectories(file: Path) -> Gaps:
    """Read trajectories by run; columns without values are left out."""
    found: Gaps = {}
    with file.open(newline="", encoding="utf-8") as text:
        for line in csv.DictReader(text):
            found.setdefault(line.pop("run"), []).append({name: float(value) for name, value in line.items() if value})
    return found


def recorded(folder: Path) -> tuple[list[dict[str, Any]], Gaps]:
    """Read runs and trajectories; empty if the files are missing."""
    files = folder / written.RUNS, folder / written.TRAJECTORIES
    if not all(file.is_file() for file in files):
        return [], {}
    return read_runs(files[0]), read_trajectories(files[1])


def announce(planned: Iterable[Planned]) -> None:
    """Write each run's description into its folder."""
    for run in planned:
        run.announce()
