"""One run of the case study: a recipe with a seed, recorded epoch by epoch, and resumed where it was interrupted."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sparse._version import __version__
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.training import RecipeCLI, launch

FIELDS = ("epoch", "nonzero", "nonzero_file", "val_error", "train_loss", "seconds")
GAP = "duality_gap"  # a column after FIELDS where the form has ``gap_samples``
_QUIET = ["--trainer.logger", "false", "--report.table", "false", "--report.pictures", "false"]


@dataclass(frozen=True)
class Job:
    """One run: a recipe (a packaged name or a file) for ``epochs`` epochs with ``seed``, its files in ``folder``.

    ``until``: stop after that many of them; schedules are those of the whole run, which another job may go on with.
    """

    recipe: str
    seed: int
    epochs: int
    folder: Path
    overrides: tuple[str, ...] = ()
    until: int | None = None

    @property
    def trajectory(self) -> Path:
        """One line for each epoch, see FIELDS: shares in [0, 1], errors in %, seconds since the run began."""
        return self.folder / "trajectory.csv"

    @property
    def result(self) -> Path:
        """Written when the run is done."""
        return self.folder / "result.json"

    def epochs_done(self) -> int:
        """How far the run is."""
        return len(read(self.trajectory))


def read(trajectory: Path) -> list[dict[str, float]]:
    """The lines of a trajectory as numbers, an unfinished last line left out; none where the file does not exist yet."""
    if not trajectory.is_file():
        return []
    text = trajectory.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def write(trajectory: Path, lines: Sequence[Mapping[str, float]]) -> None:
    """Write a trajectory anew; with a column for the duality gap where a line has one."""
    with trajectory.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns(lines))
        writer.writeheader()
        writer.writerows({**line, "epoch": int(line["epoch"])} for line in lines)


def columns(lines: Iterable[Mapping[str, float]]) -> list[str]:
    """FIELDS, and GAP where one of the lines has it."""
    return [*FIELDS, *([GAP] if any(GAP in line for line in lines) else [])]


class Recorder(Callback):
    """Appends a line of FIELDS to a file at each epoch's end.

    ``nonzero`` is the share of weights whose alpha, as the form uses it, is at least ``tol``, as the paper counts;
    ``nonzero_file`` of those that a file of that epoch holds. After epoch ``until`` the run ends.
    """

    def __init__(self, file: Path, until: int | None = None) -> None:
        self.file, self.until = file, until
        self.began, self.before = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept = [row for row in read(self.file) if row["epoch"] <= trainer.current_epoch]
        self.before, self.began = (kept[-1]["seconds"] if kept else 0.0), time.perf_counter()
        write(self.file, kept)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        row = {
            "epoch": trainer.current_epoch + 1,
            "nonzero": share_above_tol(trainer),
            "nonzero_file": 1 - float(logged["sparsity/total"]),
            "val_error": 100 * (1 - float(logged.get("val/accuracy", torch.nan))),  # NaN where a run trains on all images
            "train_loss": float(logged["train/loss"]),
            "seconds": self.before + time.perf_counter() - self.began,
        }
        row |= {GAP: float(logged[f"sparsity/{GAP}"])} if f"sparsity/{GAP}" in logged else {}
        self._append(row)
        trainer.should_stop |= row["epoch"] == self.until

    def _append(self, row: dict[str, float]) -> None:
        """One line more; the first to have a gap, or to lack it, is written with all lines anew, under its own columns."""
        before = read(self.file)
        if columns(before) != columns([row]):
            write(self.file, [*before, row])
            return
        with self.file.open("a", newline="", encoding="utf-8") as out:
            csv.DictWriter(out, columns(before)).writerow(row)


def share_above_tol(trainer: Trainer) -> float:
    """Of the weights of the run's sparsity callbacks, those with alpha >= tol."""
    forms = [callback for callback in trainer.callbacks if isinstance(callback, Sparsifier)]  # type: ignore[attr-defined]
    kept = [(form.keep_probability(name) >= form.tol).float() for form in forms for name in form.parameters]
    return float(sum(part.sum() for part in kept)) / sum(part.numel() for part in kept)


class _Front(RecipeCLI):
    """``fit`` with a Recorder."""

    job: Job

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        recorder = Recorder(self.job.trajectory, self.job.until)
        trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined] # before a checkpoint is written
        return trainer


def train(job: Job) -> dict[str, Any]:
    """Run a job, from its last checkpoint if it has one, and write its result; what it prints goes to ``log.txt``.

    Raises UsageError for a recipe that cannot be trained or has no sparsity callback.
    """
    if job.result.is_file():
        found: dict[str, Any] = json.loads(job.result.read_text(encoding="utf-8"))
        return found
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        front: RecipeCLI = launch(type("Front", (_Front,), {"job": job}), ["fit", *_words(job)])
    if front.result is None:
        raise UsageError(f"{job.recipe} has no sparsity callback, so there is nothing to record")
    found = _summary(job, front)
    job.result.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _words(job: Job) -> list[str]:
    last = max(job.folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    resumed = [] if last is None else ["--ckpt_path", str(last)]
    length = ["--trainer.max_epochs", str(job.epochs), "--trainer.default_root_dir", str(job.folder)]
    return ["--config", job.recipe, *_QUIET, *length, *job.overrides, "--seed_everything", str(job.seed), *resumed]


def _summary(job: Job, front: RecipeCLI) -> dict[str, Any]:
    result, last = front.result, read(job.trajectory)[-1]
    assert result is not None
    versions = {"lightning-sparse": __version__, "torch": torch.__version__, "lightning": lightning.__version__}
    return {
        "recipe": job.recipe,
        "seed": job.seed,
        "epochs": job.epochs,
        "test_error": 100 * (1 - result.sparse.metrics["test/accuracy"]),
        "val_error": last["val_error"],
        "nonzero": 100 * last["nonzero"],
        "nonzero_file": 100 * result.sparse.nonzero / result.sparse.size,
        "weights": result.sparse.size,
        "seconds": round(last["seconds"], 1),
        "overrides": " ".join(job.overrides),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) + f", Python {platform.python_version()}",
    }
