"""Runs that were recorded elsewhere, laid out as if they had been trained here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.reproduction import written
from lightning_sparse.reproduction.runs import Job, write


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
        given += run is not None and give(job, run, trajectories[job.recipe][job.seed])
    return given


def give(job: Job, run: Mapping[str, Any], lines: Sequence[Mapping[str, float]]) -> bool:
    """Write a recorded result and its epochs where the job would have written its own, unless it has; whether it was written."""
    if job.result.is_file():
        return False
    job.folder.mkdir(parents=True, exist_ok=True)
    write(job.trajectory, lines)
    job.result.write_text(json.dumps(run, indent=1), encoding="utf-8")
    return True
