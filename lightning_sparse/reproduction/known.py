"""Import of recorded runs: write their results and trajectories as if the jobs had been trained here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_sparse.reproduction import written
from lightning_sparse.reproduction.runs import Job, write


def lay_out(folder: Path, jobs: Iterable[Job]) -> int:
    """Write the recorded result for each job without one, from the CSVs of ``folder``; return the number of results written.

    A recorded run matches a job if recipe, seed, epochs and overrides (without the data folder) are the same. Raises
    FileNotFoundError naming the file if ``folder`` has no ``runs.csv`` or no ``trajectories.csv``.
    """
    runs = {(run["recipe"], run["seed"], run["epochs"], run["overrides"]): run for run in written.read_runs(folder / written.RUNS)}
    trajectories = written.read_trajectories(folder / written.TRAJECTORIES)
    count = 0
    for job in jobs:
        run = runs.get((job.recipe, job.seed, job.epochs, written.portable(job.overrides)))
        count += run is not None and give(job, run, trajectories[job.recipe][job.seed])
    return count


def give(job: Job, run: Mapping[str, Any], lines: Sequence[Mapping[str, float]]) -> bool:
    """Write a recorded result and trajectory to the job's files. Returns False, without writing, if the job has a result."""
    if job.result.is_file():
        return False
    job.folder.mkdir(parents=True, exist_ok=True)
    write(job.trajectory, lines)
    job.result.write_text(json.dumps(run, indent=1), encoding="utf-8")
    return True
