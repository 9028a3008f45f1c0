"""What ``fit`` shows at its end: one table, counted and tested from the saved checkpoint file, and two pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from torch import Tensor

from lightning_sparse import counts
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli.table import show
from lightning_sparse.cli.text import readable

if TYPE_CHECKING:
    from lightning_sparse.cli.training import RecipeCLI


class Scribe(Callback):
    """Keeps the logged figures of every epoch, and puts the whole configuration into the logger's and beside the checkpoints."""

    def __init__(self, recipe: str) -> None:
        self.names: list[str] = []
        self.recipe = readable(recipe)
        self.history: list[dict[str, float]] = []
        self.began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": yaml.safe_load(self.recipe)})
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder and trainer.is_global_zero:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (run_folder(Path(folder)) / "config.yaml").write_text(self.recipe, encoding="utf-8")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **logged})
        if trainer.progress_bar_callback is None and trainer.is_global_zero and self._due(trainer):
            print(_line(self.history[-1], trainer.max_epochs), flush=True)

    def _due(self, trainer: Trainer) -> bool:
        """Ten lines a run stand in for a progress bar that is switched off."""
        every = max((trainer.max_epochs or 1) // 10, 1)
        return (trainer.current_epoch + 1) % every == 0


def _line(entry: dict[str, float], epochs: int | None) -> str:
    shown = [f"{name} {entry[name]:.4f}" for name in entry if name in ("sparsity/total", "train/loss") or name.startswith("val")]
    return f"epoch {entry['epoch']}/{epochs}  " + "  ".join(shown)


def run_folder(checkpoints: Path) -> Path:
    """The folder of a run, given the one of its checkpoints."""
    return checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints


@dataclass(frozen=True)
class Trained:
    """One trained network as its file tells it: test metrics, and {name: (zeros, size)} of the selected weights."""

    file: Path
    metrics: dict[str, float]
    zeros: counts.Counts
    seconds: float

    @property
    def nonzero(self) -> int:
        return sum(size - zeros for zeros, size in self.zeros.values())

    @property
    def size(self) -> int:
        return sum(size for _, size in self.zeros.values())


@dataclass(frozen=True)
class Result:
    """The figures of the table; ``dense`` is None unless a dense twin was asked for."""

    sparse: Trained
    dense: Trained | None
    files: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What ``fit`` does after training.

    Args:
        dense_twin: train the same model on the same data, with the same seed and length, without ``sparsify``.
        table: print the table.
        pictures: draw the masks and the sparsity curve as PNG files beside the checkpoints.
    """

    dense_twin: bool = False
    pictures: bool = True
    table: bool = True

    def write(self, cli: RecipeCLI) -> Result | None:
        """Train the twin if asked for, print the table, save the pictures; None on other ranks than the first."""
        if not cli.trainer.is_global_zero or not cli.scribe.names:
            return None
        folder, file = _saved(cli.trainer)
        spent = time.perf_counter() - cli.scribe.began
        with _hushed():
            sparse = _measure(cli, file, spent)
            dense = _twin(cli, folder) if self.dense_twin and cli.trainer.world_size == 1 else None
        result = Result(sparse, dense, _files(cli, folder, sparse, dense, self.pictures))
        if self.table:
            show(result)
        return result


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the Trainer's notes on devices, which the first Trainer has printed already."""
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = notes.level
    notes.setLevel(logging.WARNING)
    try:
        yield
    finally:
        notes.setLevel(level)


def _twin(cli: RecipeCLI, folder: Path) -> Trained:
    """The same model on the same data, seed and length, without a Sparsifier and without a logger."""
    print("training the dense twin ...", flush=True)
    began = time.perf_counter()
    model, data, settings = cli.another()
    kept = [c for c in settings["callbacks"] or [] if not isinstance(c, (ProgressBar, ModelSummary, Sparsifier))]
    for callback in kept:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(folder / "dense")
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = Trainer(**{**settings, **quiet, "callbacks": kept})
    trainer.fit(model, datamodule=data)
    return _measure(cli, _saved(trainer, folder / "dense")[1], time.perf_counter() - began)


def _saved(trainer: Trainer, folder: Path | None = None) -> tuple[Path, Path]:
    """The folder of the run and its checkpoint; one is written where the Trainer has not."""
    keeper = trainer.checkpoint_callback
    path = getattr(keeper, "best_model_path", "") or getattr(keeper, "last_model_path", "")
    if not path:
        path = str((folder or Path(trainer.default_root_dir)) / "checkpoints" / "final.ckpt")
        trainer.save_checkpoint(path)
    file = Path(path)
    return run_folder(file.parent), file


def _measure(cli: RecipeCLI, file: Path, seconds: float) -> Trained:
    """Load the file into a fresh model, test that model and count the zeros in the file."""
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    model, data, _ = cli.another()
    model.load_state_dict(state)
    chosen = {name: state[name] for name in cli.scribe.names}
    return Trained(file, _test(model, data), counts.count_zeros(chosen), seconds)


def _test(model: LightningModule, data: Any) -> dict[str, float]:
    """The metrics of ``test_step``, without a logger; none where the model or the data has no test."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    if data is None or type(model).test_step is LightningModule.test_step:
        return {}
    found = Trainer(accelerator="cpu", devices=1, **quiet).test(model, datamodule=data, verbose=False)
    return {name: float(value) for metrics in found for name, value in metrics.items()}


def _files(cli: RecipeCLI, folder: Path, sparse: Trained, dense: Trained | None, pictures: bool) -> dict[str, Path]:
    files = {"checkpoint": sparse.file} | ({"dense checkpoint": dense.file} if dense else {})
    for logger in cli.trainer.loggers:
        run = getattr(getattr(logger, "experiment", None), "dir", None)
        if isinstance(run, str):
            files[f"{type(logger).__name__} run"] = Path(run).parent
    if pictures:
        from lightning_sparse import plots

        state = torch.load(sparse.file, map_location="cpu", weights_only=True)["state_dict"]
        masks = plots.masks({name: state[name] for name in cli.scribe.names})
        files["masks"] = plots.save(masks, folder / "masks.png")
        files["sparsity curve"] = plots.save(plots.sparsity_curve(cli.scribe.history, cli.scribe.names), folder / "sparsity.png")
    return files
