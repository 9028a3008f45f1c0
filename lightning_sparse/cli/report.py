"""Report at the end of ``fit``: a table of figures measured on the saved checkpoint, and two pictures."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from torch import Tensor

from lightning_sparse import counts
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.callbacks.form import peers_of
from lightning_sparse.cli.folders import CONFIG, run_folder
from lightning_sparse.cli.saved import Saved, silence_device_messages
from lightning_sparse.cli.table import Result, Trained, show
from lightning_sparse.cli.text import decode_names


class RunRecorder(Callback):
    """Record the logged figures of every epoch; save the configuration in the loggers and in the run's folder."""

    def __init__(self, recipe: str) -> None:
        self.names: list[str] = []  # of the selected parameters
        self.beside: list[str] = []  # of the biases and norms that are in their groups
        self.recipe = decode_names(recipe)
        self.history: list[dict[str, float]] = []
        self.began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.beside = [name for callback in peers_of(trainer) for name in callback.parameters if name not in self.names]
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": yaml.safe_load(self.recipe)})
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder and trainer.is_global_zero:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (run_folder(Path(folder)) / CONFIG).write_text(self.recipe, encoding="utf-8")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **logged})
        if trainer.progress_bar_callback is None and trainer.is_global_zero and self._due(trainer):
            print(_line(self.history[-1], trainer.max_epochs), flush=True)

    def _due(self, trainer: Trainer) -> bool:
        """Return True for about ten epochs per run. Their lines replace a progress bar that is switched off."""
        every = max((trainer.max_epochs or 1) // 10, 1)
        return (trainer.current_epoch + 1) % every == 0


def _line(entry: dict[str, float], epochs: int | None) -> str:
    shown = [f"{name} {entry[name]:.4f}" for name in entry if name in ("sparsity/total", "train/loss") or name.startswith("val")]
    return f"epoch {entry['epoch']}/{epochs}  " + "  ".join(shown)


class Reported(Protocol):
    """The interface that a report needs from the command that trained."""

    trainer: Trainer
    recorder: RunRecorder

    def rebuild(self) -> tuple[LightningModule, LightningDataModule | None, Any]:
        """Return a new model and data module with the run's seed, and new settings of the Trainer."""


@dataclass(frozen=True)
class Report:
    """Settings of the report after ``fit``.

    Args:
        dense_twin: train the same model on the same data, with the same seed and length, without ``sparsify``.
        table: print the table.
        pictures: draw the masks and the sparsity curve as PNG files in the run's folder.
        exports: below the table, measure what each export would gain on this machine (seconds); ``lightning-sparse report`` does so later.
    """

    dense_twin: bool = False
    pictures: bool = True
    table: bool = True
    exports: bool = False

    def write(self, cli: Reported) -> Result | None:
        """Train the dense twin if requested, print the table and save the pictures. Returns None on ranks other than 0."""
        if not cli.trainer.is_global_zero or not cli.recorder.names:
            return None
        folder, file = _saved(cli.trainer)
        spent = time.perf_counter() - cli.recorder.began
        with silence_device_messages():
            sparse = _measure(cli, file, spent)
            dense = _twin(cli, folder) if self.dense_twin and cli.trainer.world_size == 1 else None
        result = Result(sparse, dense, _files(cli, folder, sparse, dense, self.pictures))
        if self.table:
            show(result)
            self._worth(cli, file)
        return result

    def _worth(self, cli: Reported, file: Path) -> None:
        if not self.exports:
            print(f"{'exports:':17} lightning-sparse report {shlex.quote(str(file))}")
            return
        from lightning_sparse.cli import worth

        with silence_device_messages():
            worth.at_end(_loaded(cli, file))


def _twin(cli: Reported, folder: Path) -> Trained:
    """Train the same model on the same data, with the same seed and length, without a Sparsifier and a logger."""
    print("training the dense twin ...", flush=True)
    began = time.perf_counter()
    model, data, settings = cli.rebuild()
    kept = [c for c in settings["callbacks"] or [] if not isinstance(c, (ProgressBar, ModelSummary, Sparsifier))]
    for callback in kept:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(folder / "dense")
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = Trainer(**{**settings, **quiet, "callbacks": kept})
    trainer.fit(model, datamodule=data)
    return _measure(cli, _saved(trainer, folder / "dense")[1], time.perf_counter() - began)


def _saved(trainer: Trainer, folder: Path | None = None) -> tuple[Path, Path]:
    """Return the folder of the run and its checkpoint. Saves a checkpoint if the Trainer has not."""
    keeper = trainer.checkpoint_callback
    path = getattr(keeper, "best_model_path", "") or getattr(keeper, "last_model_path", "")
    if not path:
        path = str((folder or Path(trainer.default_root_dir)) / "checkpoints" / "final.ckpt")
        trainer.save_checkpoint(path)
    file = Path(path)
    return run_folder(file.parent), file


def _measure(cli: Reported, file: Path, seconds: float) -> Trained:
    """Load the file into a fresh model, test that model and count the zeros in the file."""
    saved = _loaded(cli, file)
    state = saved.module.state_dict()
    chosen = {name: state[name] for name in [*cli.recorder.names, *cli.recorder.beside]}
    return Trained(file, saved.test(), counts.count_zeros(chosen), seconds, tuple(cli.recorder.beside))


def _loaded(cli: Reported, file: Path) -> Saved:
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    model, data, _ = cli.rebuild()
    model.load_state_dict(state)
    return Saved(file, model.eval(), data, tuple(cli.recorder.names))


def _files(cli: Reported, folder: Path, sparse: Trained, dense: Trained | None, pictures: bool) -> dict[str, Path]:
    files = {"checkpoint": sparse.file} | ({"dense checkpoint": dense.file} if dense else {})
    for logger in cli.trainer.loggers:
        run = getattr(getattr(logger, "experiment", None), "dir", None)
        if isinstance(run, str):
            files[f"{type(logger).__name__} run"] = Path(run).parent
    if pictures:
        from lightning_sparse import plots

        state = torch.load(sparse.file, map_location="cpu", weights_only=True)["state_dict"]
        masks = plots.masks({name: state[name] for name in cli.recorder.names})
        files["masks"] = plots.save(masks, folder / "masks.png")
        files["sparsity curve"] = plots.save(plots.sparsity_curve(cli.recorder.history, cli.recorder.names), folder / "sparsity.png")
    return files
