"""Runs that were recorded elsewhere, laid out as if they had been trained here."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from lightning_sparse.reproduction import written
from lightning_sparse.reproduction.runs import FIELDS, Job


def lay_out(folder: Path, jobs: Iterable[Job]) -> int:
    """Give each job without a result the one that the CSVs of ``folder`` hold for it; how many were given.

    A run is a job's where recipe, seed, epochs and overrides (but for the data's folder) are the same. Raises
    FileNotFoundError, naming the file, where ``folder`` holds no ``runs.csv`` and ``trajectories.csv``.
    """
    runs = {(run["recipe"], run["seed"], run["epochs"], run["overrides"]): run for run in written.read_runs(folder / written.RUNS)}
    trajectories = written.read_trajectories(folder / written.TRAJECTORIES)
    given = 0
    for job in jobs:
        run = runs.get((job.recipe, job.seed, job.epochs, written.portable(job.overrides)))
        if run is not None and not job.result.is_file():
            job.folder.mkdir(parents=True, exist_ok=True)
            _write(job.trajectory, trajectories[job.recipe][job.seed])
            job.result.write_text(json.dumps(run, indent=1), encoding="utf-8")
            given += 1
    return given


def _write(file: Path, lines: Iterable[dict[str, float]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, FIELDS)
        writer.writeheader()
        writer.writerows(line | {"epoch": int(line["epoch"])} for line in lines)
