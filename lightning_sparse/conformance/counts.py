"""Logged figures equal a direct count of the zeros in the checkpoint, for every logger."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback, CSVLogger, Logger, ModelCheckpoint, TensorBoardLogger, WandbLogger
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require

GROUP = "counts"
PREFIX, TOTAL = "sparsity/", "sparsity/total"
EPOCHS = 3


def _compare(figures: Mapping[str, float], file: Mapping[str, Tensor], where: str) -> None:
    """Compare every ``sparsity/<parameter>`` and the total with the zeros in a file."""
    names = [key[len(PREFIX) :] for key in figures if key.startswith(PREFIX) and key[len(PREFIX) :] in file]
    require(names and TOTAL in figures, f"{where} has no sparsity figures; it has {sorted(figures)[:8]}")
    for name in names:
        share = float((file[name] == 0).double().mean())
        logged = figures[PREFIX + name]
        require(abs(logged - share) < 1e-6, f"{where} says {logged:.6f} of {name}, the file has {share:.6f}")
    count, size = sum(int((file[name] == 0).sum()) for name in names), sum(file[name].numel() for name in names)
    require(abs(figures[TOTAL] - count / size) < 1e-6, f"{where} says {figures[TOTAL]:.6f} in all, the file has {count} of {size}")


def _by_csv(folder: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    with next(folder.rglob("metrics.csv")).open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            rows.setdefault(int(row["step"]), {}).update({k: float(v) for k, v in row.items() if k.startswith(PREFIX) and v})
    return rows


def _by_tensorboard(folder: Path) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.out*")).parent))
    events.Reload()
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    return rows


def _by_wandb(folder: Path) -> dict[int, dict[str, float]]:
    from lightning_sparse.conformance._wandb_file import history

    return history(folder)


def _logged(subject: Subject, folder: Path, logger: Logger, read: Any) -> None:
    keeper = ModelCheckpoint(folder / "files", filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    module = subject.model()
    subject.fit(module, keeper, logger=logger, enable_checkpointing=True, epochs=EPOCHS)
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
    rows = {step: row for step, row in read(folder).items() if any(key.startswith(PREFIX) for key in row)}
    where = type(logger).__name__
    require(rows, f"{where} got no figure that starts with {PREFIX!r}")
    for path in (folder / "files").glob("*.ckpt"):
        step = int(path.stem.partition("=")[2])
        row = rows.get(step - 1, {})  # Lightning logs epoch values at the last step of the epoch, counted from 0
        _compare(row, torch.load(path, weights_only=True)["state_dict"], f"{where} at step {step}")
    _compare(rows[max(rows)], module.state_dict(), f"the last of {where}")


@check("CSVLogger: logged figures, total and per parameter, equal a count of the checkpoint at every epoch and at the end", GROUP)
def csv_figures_equal_the_file(subject: Subject, folder: Path) -> None:
    _logged(subject, folder, CSVLogger(folder / "log"), _by_csv)


@check("TensorBoardLogger: logged figures equal a count of the checkpoint", GROUP)
def tensorboard_figures_equal_the_file(subject: Subject, folder: Path) -> None:
    try:
        logger = TensorBoardLogger(folder / "log")
    except ModuleNotFoundError:
        raise NotApplicable("tensorboard is not installed") from None
    _logged(subject, folder, logger, _by_tensorboard)


@check("WandbLogger, offline: logged figures, read from the run's file, equal a count of the checkpoint", GROUP, slow=True)
def wandb_figures_equal_the_file(subject: Subject, folder: Path) -> None:
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    with patch.dict(os.environ, quiet):
        try:
            logger = WandbLogger(save_dir=folder / "log", offline=True)
        except ModuleNotFoundError:
            raise NotApplicable("wandb is not installed") from None
        _logged(subject, folder, logger, _by_wandb)


class _Stop(Callback):
    """Stop the run at the end of an epoch, or raise an error there."""

    def __init__(self, epoch: int, error: bool = False) -> None:
        self.epoch, self.error = epoch, error

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch and self.error:
            raise InterruptedError
        trainer.should_stop = trainer.should_stop or trainer.current_epoch == self.epoch


def _volume(subject: Subject, folder: Path, *stop: Callback, **options: Any) -> tuple[list[int], int]:
    """Fit with an offline W&B run. Return the steps of its rows with histograms, and the number of its table files."""
    from lightning_sparse.conformance._wandb_file import read_run

    logger = WandbLogger(save_dir=folder, offline=True)
    with suppress(InterruptedError):
        subject.fit(subject.model(), *stop, logger=logger, limit_val_batches=0, **options)
    logger.experiment.finish()
    rows = read_run(folder).history
    kinds = [(row, {value.get("_type") for value in row.values() if isinstance(value, dict)}) for row in rows]
    tables = {*folder.rglob("*.table.json")}
    return [int(row["trainer/global_step"]) for row, found in kinds if "histogram" in found], len(tables)


@check("WandbLogger, offline: at most one table file and about 50 histograms for any run length, the last at its end", GROUP, slow=True)
def wandb_runs_stay_small(subject: Subject, folder: Path) -> None:
    keep: dict[str, Any] = {"default_root_dir": folder, "enable_checkpointing": True}
    saved = ModelCheckpoint(folder / "files", filename="kept", every_n_epochs=10)
    loader = toys.data(2 * 16)  # two batches in an epoch
    # by name: the fewest histograms, the step of the last ones, how to fit
    runs: dict[str, tuple[int, int | None, tuple[Callback, ...], dict[str, Any]]] = {
        "of 60 epochs": (20, 120, (), {"epochs": 60}),
        "of 120 steps": (20, 120, (), {"epochs": -1, "max_steps": 120}),
        "of 10,000 epochs that stops after 40": (15, 80, (_Stop(39),), {"epochs": 10_000}),
        "of one epoch of 300 steps": (4, 300, (), {"epochs": 1, "loader": toys.data(16 * 300)}),
        "of 60 epochs that is interrupted after 30": (10, None, (saved, _Stop(29, error=True)), {"epochs": 60, **keep}),
        "that resumes it": (10, 120, (), {"epochs": 60, "ckpt_path": folder / "files" / "kept.ckpt"}),
    }
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    silent = True
    with patch.dict(os.environ, quiet):
        for index, (name, (least, last, stop, options)) in enumerate(runs.items()):
            try:
                at, tables = _volume(subject, folder / str(index), *stop, **({"loader": loader} | options))
            except ModuleNotFoundError:
                raise NotApplicable("wandb is not installed") from None
            silent = silent and not at and not tables
            require(tables <= 1, f"a run {name} wrote {tables} table files")
            require(not at or least <= len(at) <= 60, f"a run {name} logged histograms {len(at)} times, not about {least} to 60")
            require(not at or last in (None, at[-1]), f"a run {name} logged its last histograms at step {at[-1:]}, not at step {last}")
    if silent:
        raise NotApplicable("logs neither histograms nor tables")


class Tied(nn.Module):
    """Two layers with a tied weight, and a third layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return output


@check("tied weights are counted once", GROUP)
def tied_weights_are_counted_once(subject: Subject, folder: Path) -> None:
    module = subject.model(Tied())
    trainer = subject.fit(module)
    require(module.network.first.weight is module.network.second.weight, "the weights are no longer tied")  # type: ignore[union-attr]
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(PREFIX)}
    matrices = [p for p in module.parameters() if p.dim() > 1]
    require(TOTAL in figures, "nothing is logged as sparsity/total")
    share = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
    require(abs(figures[TOTAL] - share) < 1e-6, f"sparsity/total is {figures[TOTAL]:.6f}, a count of the module gives {share:.6f}")
    require(all(0 <= figures[key] <= 1 for key in figures if key[len(PREFIX) :] in module.state_dict()), f"not fractions: {figures}")
