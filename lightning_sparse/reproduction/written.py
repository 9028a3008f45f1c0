"""The output files of a reproduction: CSVs of all runs and all epochs, and the table and figures made from the CSVs."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse import plots
from lightning_sparse.reproduction import figures, table
from lightning_sparse.reproduction.figures import Trajectories
from lightning_sparse.reproduction.runs import Job, columns, read
from lightning_sparse.reproduction.table import Runs

RUNS, TRAJECTORIES = "runs.csv", "trajectories.csv"
_INTEGERS, _TEXT = ("seed", "epochs", "weights"), ("recipe", "overrides", "versions")
_DATA_ROOT = "--data.root"  # not recorded, because the folder of the data does not affect a run


def write(results: Sequence[Mapping[str, Any]], jobs: Sequence[Job], folder: Path) -> list[Path]:
    """Write the CSVs of finished ``jobs`` and their ``results`` (in the same order), then the table and the figures.

    Raises ValueError unless there is one result per job and at least one job.
    """
    if not results or len(results) != len(jobs):
        raise ValueError(f"there must be a result for each job and at least one, got {len(results)} of {len(jobs)}")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{**result, "overrides": portable(job.overrides)} for result, job in zip(results, jobs, strict=True)]
    order = {row.recipe: index for index, row in enumerate(table.rows_of(lines))}
    lines.sort(key=lambda line: (order[line["recipe"]], line["seed"]))
    jobs = sorted(jobs, key=lambda job: (order[job.recipe], job.seed))
    files = [csv_of(folder / RUNS, list(lines[0]), lines)]
    epochs = list(_epochs(jobs))
    files.append(csv_of(folder / TRAJECTORIES, ["recipe", "seed", *columns(epochs)], epochs))
    return files + redraw(folder)


def portable(overrides: Sequence[str]) -> str:
    """Join the overrides of a command, without the data folder, quoted for a shell."""
    words = [word for before, word in zip(("", *overrides), overrides, strict=False) if _DATA_ROOT not in (before, word)]
    return shlex.join(word for word in words if not word.startswith(f"{_DATA_ROOT}="))


def _epochs(jobs: Sequence[Job]) -> Iterable[dict[str, Any]]:
    for job in jobs:
        for line in read(job.trajectory):
            yield {"recipe": job.recipe, "seed": job.seed} | digits(line)


def digits(line: Mapping[str, float]) -> dict[str, str]:
    """Format numbers with seven significant digits."""
    return {name: f"{value:.7g}" for name, value in line.items()}


def csv_of(file: Path, names: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write a CSV with the columns ``names`` and return its path."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return file


def redraw(folder: Path) -> list[Path]:
    """Write table and figures from the CSVs of ``folder`` and return their paths. Raises FileNotFoundError without CSVs."""
    runs = read_runs(folder / RUNS)
    (folder / "table.md").write_text(table.markdown(runs), encoding="utf-8")
    return [folder / "table.md", *draw(runs, read_trajectories(folder / TRAJECTORIES), folder)]


def draw(runs: Runs, trajectories: Trajectories, folder: Path) -> list[Path]:
    """Save figure 1 and, if there are trajectories, figure 2, each as PNG and PDF."""
    made = {"figure1": figures.penalties()}
    if trajectories:
        made["figure2"] = figures.trajectories(table.rows_of(runs), trajectories)
    return [plots.save(figure, folder / f"{name}{suffix}") for name, figure in made.items() for suffix in (".png", ".pdf")]


def read_runs(file: Path) -> list[dict[str, Any]]:
    """Read ``runs.csv`` with typed values. Raises ValueError naming the file for runs of different numbers of epochs."""
    runs = read_lines(file)
    lengths = sorted({run["epochs"] for run in runs})
    if len(lengths) > 1:
        raise ValueError(f"{file} mixes runs of {lengths} epochs; their figures are not one table")
    return runs


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a CSV of runs with typed values; the runs may have different numbers of epochs."""
    with file.open(newline="", encoding="utf-8") as text:
        return [{name: _value(name, value) for name, value in line.items()} for line in csv.DictReader(text)]


def _value(name: str, text: str) -> Any:
    return text if name in _TEXT else int(text) if name in _INTEGERS else float(text)


def read_trajectories(file: Path) -> Trajectories:
    """Read ``trajectories.csv``: by recipe and seed, the lines of the epochs in order."""
    trajectories: Trajectories = {}
    with file.open(newline="", encoding="utf-8") as text:
        for line in csv.DictReader(text):
            seeds = trajectories.setdefault(line.pop("recipe"), {})
            seeds.setdefault(int(line.pop("seed")), []).append({name: float(value) for name, value in line.items() if value})
    return trajectories
