"""One run of the case study: a recipe with a seed, recorded every epoch and resumed after an interruption."""

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
GAP = "duality_gap"  # an extra column if the callback has ``gap_samples``
_QUIET = ["--trainer.logger", "false", "--report.table", "false", "--report.pictures", "false"]


@dataclass(frozen=True)
class Job:
    """One run: a recipe (a packaged name or a file) for ``epochs`` epochs with ``seed``, with its files in ``folder``.

    ``until`` stops the run after that many epochs. Schedules still span all ``epochs``, so another job can continue the run.
    """

    recipe: str
    seed: int
    epochs: int
    folder: Path
    overrides: tuple[str, ...] = ()
    until: int | None = None

    @property
    def trajectory(self) -> Path:
        """CSV file with one line per epoch, see FIELDS: shares in [0, 1], errors in %, seconds since the start."""
        return self.folder / "trajectory.csv"

    @property
    def result(self) -> Path:
        """JSON file, written at the end of the run."""
        return self.folder / "result.json"

    def epochs_done(self) -> int:
        """Count the recorded epochs."""
        return len(read(self.trajectory))


def read(trajectory: Path) -> list[dict[str, float]]:
    """Read the lines of a trajectory as numbers, without an incomplete last line. A missing file has no lines."""
    if not trajectory.is_file():
        return []
    text = trajectory.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def write(trajectory: Path, lines: Sequence[Mapping[str, float]]) -> None:
    """Overwrite a trajectory; with a column for the duality gap if one of the lines has it."""
    with trajectory.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns(lines))
        writer.writeheader()
        writer.writerows({**line, "epoch": int(line["epoch"])} for line in lines)


def columns(lines: Iterable[Mapping[str, float]]) -> list[str]:
    """Return FIELDS, plus GAP if one of the lines has it."""
    return [*FIELDS, *([GAP] if any(GAP in line for line in lines) else [])]


class Recorder(Callback):
    """Append a line of FIELDS to a file at the end of each epoch.

    ``nonzero`` is the share of weights with alpha >= ``tol``, as in the paper; alpha is the callback's keep probability.
    ``nonzero_file`` is the share of non-zero weights in a checkpoint of that epoch. The run ends after epoch ``until``.
    """

    def __init__(self, file: Path, until: int | None = None) -> None:
        self.file, self.until = file, until
        self.began, self.before = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        earlier = [row for row in read(self.file) if row["epoch"] <= trainer.current_epoch]
        self.before, self.began = (earlier[-1]["seconds"] if earlier else 0.0), time.perf_counter()
        write(self.file, earlier)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        row = {
            "epoch": trainer.current_epoch + 1,
            "nonzero": share_above_tol(trainer),
            "nonzero_file": 1 - float(logged["sparsity/total"]),
            "val_error": 100 * (1 - float(logged.get("val/accuracy", torch.nan))),  # NaN without validation images
            "train_loss": float(logged["train/loss"]),
            "seconds": self.before + time.perf_counter() - self.began,
        }
        row |= {GAP: float(logged[f"sparsity/{GAP}"])} if f"sparsity/{GAP}" in logged else {}
        self._append(row)
        trainer.should_stop |= row["epoch"] == self.until

    def _append(self, row: dict[str, float]) -> None:
        """Append a line; rewrite the whole file if its columns change (with or without a duality gap)."""
        before = read(self.file)
        if columns(before) != columns([row]):
            write(self.file, [*before, row])
            return
        with self.file.open("a", newline="", encoding="utf-8") as out:
            csv.DictWriter(out, columns(before)).writerow(row)


def share_above_tol(trainer: Trainer) -> float:
    """Return the share of weights with alpha >= tol, over all sparsity callbacks of the run."""
    own = [callback for callback in trainer.callbacks if isinstance(callback, Sparsifier)]  # type: ignore[attr-defined]
    masks = [(callback.keep_probability(name) >= callback.tol).float() for callback in own for name in callback.parameters]
    return float(sum(mask.sum() for mask in masks)) / sum(mask.numel() for mask in masks)


class _Front(RecipeCLI):
    """``fit`` with a Recorder."""

    job: Job

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        recorder = Recorder(self.job.trajectory, self.job.until)
        trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined] # first, to record before a checkpoint is written
        return trainer


def train(job: Job) -> dict[str, Any]:
    """Run a job, from its last checkpoint if there is one, and write its result. Output goes to ``log.txt``.

    A finished job is not run again: its result is read. Raises UsageError for a recipe that cannot be trained or has no
    sparsity callback.
    """
    if job.result.is_file():
        recorded: dict[str, Any] = json.loads(job.result.read_text(encoding="utf-8"))
        return recorded
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        front: RecipeCLI = launch(type("Front", (_Front,), {"job": job}), ["fit", *_words(job)])
    if front.result is None:
        raise UsageError(f"{job.recipe} has no sparsity callback, so there is nothing to record")
    result = _summary(job, front)
    job.result.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


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
