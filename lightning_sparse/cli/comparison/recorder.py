"""A callback that records one run of a comparison: its metrics, its zeros and a checkpoint from which it can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sparse import counts, select
from lightning_sparse.callbacks import Sparsifier, user_warnings
from lightning_sparse.cli.folders import CONFIG, run_folder

FINAL, RESUME, METRICS, PROGRESS = "final.ckpt", "resume.ckpt", "metrics.json", "progress.json"
ENDED = "lightning_sparse_run_ended"  # of a checkpoint, from which a resumed run would train and log nothing
SHARE = 0.05  # of the time, at most, goes into checkpoints to resume from


class Recorder(Callback):
    """Write a run's files into ``folder``, in which ``lightning-sparse compare`` and ``path`` read them.

    =================  ==================================================================================================
    ``progress.json``  epoch and epochs, after every epoch
    ``resume.ckpt``    a checkpoint, at the end of every epoch if that takes less than 5 % of the time; removed at the end
    ``final.ckpt``     the trained module
    ``config.yaml``    a copy of the configuration that the command saved, wherever the run's logger has its files
    ``metrics.json``   what the run logged last (``sparsity/...`` left out), zeros of the selected weights in [0, 1] in all
                       and by parameter, steps, seconds, the step of the last validation, and warnings of this package
    =================  ==================================================================================================

    Give it after all other callbacks, so that a checkpoint holds their states.

    Args:
        folder: the folder of the run.
        start_from: a checkpoint whose weights the module gets before training; None for its own.
    """

    def __init__(self, folder: str, start_from: str | None = None) -> None:
        self.folder, self.start_from = Path(folder), start_from
        self.validated: int | None = None
        self._before, self._began, self._due = 0.0, 0.0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.start_from is not None:
            state = torch.load(self.start_from, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        if trainer.is_global_zero:
            _write(self.folder / PROGRESS, {"epoch": epoch, "epochs": epochs})
        began = time.perf_counter()
        if trainer.strategy.broadcast(began > self._due and not _at_end(trainer)):
            part = self.folder / f"{RESUME}.part"
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                os.replace(part, self.folder / RESUME)
            ended = time.perf_counter()
            self._due = ended + (ended - began) / SHARE

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[ENDED] = _at_end(trainer)  # also in the files of a ModelCheckpoint

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self.validated = float(state_dict["seconds"]), state_dict["validated"]

    def _seconds(self) -> float:
        return self._before + (time.perf_counter() - self._began if self._began else 0.0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / FINAL)
        places = _places(trainer)
        if not trainer.is_global_zero:
            return
        saved = next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)
        if saved is not None and not (self.folder / CONFIG).is_file():
            shutil.copyfile(saved, self.folder / CONFIG)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("sparsity/")}
        own = [callback for callback in trainer.callbacks if isinstance(callback, Sparsifier)]  # type: ignore[attr-defined]
        chosen = {name: parameter for callback in own for name, parameter in callback.parameters.items()}
        zeros = counts.count_zeros(chosen or select.default_selection(pl_module))
        shares = {name: hits / size if size else 0.0 for name, (hits, size) in zeros.items()}
        record = {
            "metrics": found,
            "zeros": counts.share(zeros),
            "weights": sum(size for _, size in zeros.values()),
            "by_parameter": shares,
            "steps": trainer.global_step,
            "validated_at": self.validated,
            "seconds": round(self._seconds(), 2),
            "callbacks": [callback.recipe() for callback in own],
            "warnings": list(dict.fromkeys(user_warnings.heard)),
        }
        _write(self.folder / METRICS, record)
        (self.folder / RESUME).unlink(missing_ok=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            record = json.loads((self.folder / METRICS).read_text(encoding="utf-8"))
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("sparsity/")}
            _write(self.folder / METRICS, record | {"test": found})


def _places(trainer: Trainer) -> list[Path]:
    """Return the folders in which ``fit`` or a LightningCLI saves the configuration."""
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    found = [run_folder(Path(checkpoints))] if checkpoints else []
    return [*found, Path(trainer.log_dir)] if trainer.log_dir else found


def _at_end(trainer: Trainer) -> bool:
    """Return True if no batch is left to train."""
    if trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
        return True
    last = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return last and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a killed process leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)
