"""Plan jobs from arms: one run per strength and seed, each in its own folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from exchange.grid import NETS, Arm, Words, grid
from exchange.studies import STUDIES, study
from exchange.switch import Switched
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.reproduction.runs import Job
from lightning_sparse.reproduction.written import portable

POINT = "point.json"


@dataclass(frozen=True)
class Planned:
    """A planned run: an arm at one strength, and its job."""

    arm: Arm
    strength: float
    job: Job

    def point(self) -> dict[str, str | float]:
        """Return the run's columns in the CSV."""
        shown = ("study", "variant", "net", "penalty", "form", "calibrated")
        arm: dict[str, str | float] = {name: getattr(self.arm, name) for name in shown}
        first = f"{self.job.switch} epochs of {portable(self.job.first)}" if isinstance(self.job, Switched) else ""
        return {"run": self.job.folder.name, "arm": self.arm.name} | arm | {"lam": self.strength, "first": first}

    def announce(self) -> None:
        """Write :meth:`point` into the run's folder. Raises UsageError if the folder has another run."""
        file = self.job.folder / POINT
        if file.is_file() and json.loads(file.read_text()) != self.point():
            raise UsageError(f"{self.job.folder} holds a run of {file.read_text()}, not {self.point()}; name another folder with --out")
        self.job.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.point(), indent=1))


def arms(patterns: Sequence[str], studies: Sequence[str]) -> list[Arm]:
    """Return the arms of these studies, or of the grid, whose names match a pattern. Raises UsageError if none does."""
    every = [arm for name in studies for arm in study(name)] if studies else grid()
    chosen = [arm for arm in every if not patterns or any(fnmatch(arm.name, pattern) for pattern in patterns)]
    if not chosen:
        raise UsageError(f"no arm is named {' or '.join(patterns)}; the arms are {', '.join(arm.name for arm in every)}")
    return chosen


def everything() -> list[Arm]:
    """Return the arms of the grid and of all studies."""
    return [*grid(), *(arm for name in STUDIES for arm in study(name))]


def plan(
    chosen: Iterable[Arm], seeds: Iterable[int], out: Path, common: Words, epochs: int | None = None, strengths: Sequence[float] = ()
) -> list[Planned]:
    """Return a run for each arm, strength and seed, sorted by seed; ``common`` options apply to all."""
    whole = [(arm, strength, seed) for seed in dict.fromkeys(seeds) for arm in chosen for strength in (strengths or arm.strengths)]
    return [Planned(arm, strength, _job(arm, strength, seed, out, common, epochs or NETS[arm.net].epochs)) for arm, strength, seed in whole]


def _job(arm: Arm, strength: float, seed: int, out: Path, common: Words, epochs: int) -> Job:
    folder = out / f"{arm.name.replace('/', '-')}-{strength:g}-{epochs}-seed{seed}"
    own = (arm.strength, f"{strength:g}", *common)
    job = Job(NETS[arm.net].recipe, seed, epochs, folder, (*arm.words, *own))
    if not arm.first:
        return job
    switch = max(1, round(arm.switch * epochs))
    return Switched(job.recipe, seed, epochs, folder, job.overrides, first=(*arm.first, *own), switch=switch)
