"""A run in two stages: one form up to some epoch, then another, resumed from its checkpoint under the same schedules."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_sparse.reproduction import runs
from lightning_sparse.reproduction.runs import Job


@dataclass(frozen=True)
class Switched(Job):
    """``first`` are the overrides of the first ``switch`` epochs, ``overrides`` those of the others.

    The first stage is a run of the whole length that is stopped, in the folder ``first``; its checkpoint holds the weights,
    Adam's moments, the position in every schedule and the callback's state, which the other form takes up.
    """

    first: tuple[str, ...] = field(default=(), kw_only=True)
    switch: int = field(default=0, kw_only=True)

    @property
    def before(self) -> Job:
        """Return the job of the first stage."""
        return Job(self.recipe, self.seed, self.epochs, self.folder / "first", self.first, until=self.switch)

    def epochs_done(self) -> int:
        return max(super().epochs_done(), self.before.epochs_done())


def train(job: Job) -> dict[str, Any]:
    """Run or resume a job of one or two stages; return its result."""
    if isinstance(job, Switched) and not job.result.is_file() and not any(job.folder.glob("checkpoints/*.ckpt")):
        runs.train(job.before)
        _carry_over(job)
    return runs.train(job)


def _carry_over(job: Switched) -> None:
    """Copy the first stage's trajectory and last checkpoint to the second; the checkpoint last and atomically."""
    shutil.copyfile(job.before.trajectory, job.trajectory)
    last = max(job.before.folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    target = job.folder / "checkpoints" / f"first-{last.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(shutil.copyfile(last, target.with_suffix(".part")))
    part.rename(target)
