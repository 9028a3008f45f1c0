"""The folder of a run that is free: one in which no run of other settings has left its config.yaml and checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

CONFIG = "config.yaml"
_NOT_OF_THE_RUN = ("ckpt_path", "weights_only", "report", "threads", "verbose")  # keys that leave the trained network as it is
_OF_THE_NETWORK = ("model", "data", "seed_everything")  # which a resumed run shares with the one that it continues


def run_folder(checkpoints: Path) -> Path:
    """Return the folder of a run, given the folder of its checkpoints."""
    return checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints


def choose(trainer: Trainer, recipe: str, resumed: Any) -> None:
    """Let the ModelCheckpoints write into a folder ``version_N`` of their own, if theirs holds a run of other settings, and say so.

    Otherwise the first run's checkpoints would be measured with the settings of this one. ``resumed`` is the checkpoint that a run
    goes on from: with its model, data and seed it stays in the folder. A logger makes a folder for each run, so that none is chosen.
    """
    keepers = [keeper for keeper in trainer.checkpoint_callbacks if isinstance(keeper, ModelCheckpoint)]
    if not keepers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    places = {id(keeper): _checkpoints(keeper, trainer) for keeper in keepers}
    first = places[id(keepers[0])]
    if first is None:
        return
    folder = run_folder(first)
    for number in itertools.count():
        free = folder / f"version_{number}" if number else folder
        if _is_free(free, yaml.safe_load(recipe), resumed):
            break
    if free == folder:
        return
    for keeper in keepers:
        place = places[id(keeper)]
        if place is not None and run_folder(place) == folder:
            keeper.dirpath = str(free / place.relative_to(folder))
    if trainer.is_global_zero:
        print(f"{folder / CONFIG} is of a run with other settings, so this run is written to {free}", flush=True)


def _checkpoints(keeper: ModelCheckpoint, trainer: Trainer) -> Path | None:
    """Return the local folder in which a ModelCheckpoint will write; None if that is chosen by a logger, or elsewhere."""
    if keeper.dirpath is None:
        return None if trainer.loggers or "://" in trainer.default_root_dir else Path(trainer.default_root_dir) / "checkpoints"
    return None if "://" in str(keeper.dirpath) else Path(keeper.dirpath)


def _is_free(folder: Path, settings: Mapping[str, Any], resumed: Any) -> bool:
    file = folder / CONFIG
    if not file.is_file():
        return True
    try:
        known = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    if not isinstance(known, dict):
        return False
    if resumed is not None and folder.resolve() in Path(str(resumed)).resolve().parents:
        return all(known.get(key) == settings.get(key) for key in _OF_THE_NETWORK)
    return {key: known[key] for key in known if key not in _NOT_OF_THE_RUN} == {
        key: settings[key] for key in settings if key not in _NOT_OF_THE_RUN
    }
