"""From which checkpoint an interrupted run of a comparison continues; what is left of a start that is given up is removed."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from lightning_sparse import archive
from lightning_sparse.cli import checkpoints
from lightning_sparse.cli.comparison import recorder
from lightning_sparse.cli.errors import UsageError

_BEGUN = "begun.json"  # the settings of the run that the checkpoints of its folder are of
_FULL = ("optimizer_states", "loops")  # keys that a file of weights alone lacks


def start(folder: Path, settings: Any) -> Path | None:
    """Return the checkpoint that a run continues from; None if it starts from the beginning, and then no old checkpoint is left.

    That is the newest one in the run's folder that can be resumed, of a ModelCheckpoint or of the Recorder, as the Recorder's file.
    Prints what it does if there are checkpoints. ``settings`` (plain values) are kept in the folder, and checkpoints of others are
    not continued from.
    """
    settings = json.loads(json.dumps(settings, default=str))
    files = _newest_first(folder)
    same = _read(folder / _BEGUN) == settings
    complete = (folder / recorder.FINAL).is_file()  # and its record was removed, to train it again
    for file in files if same and not complete else ():
        problem = _problem(file)
        if problem is None:
            print(f"{folder.name}: continues from {file.relative_to(folder)}", flush=True)
            return _kept(file, folder)
        if problem:
            print(f"{folder.name}: {problem}", flush=True)
            file.unlink()
    if files:
        reason = "its record is missing" if complete else "no checkpoint of it can be resumed"
        reason = reason if same else "its checkpoints are of other settings"
        print(f"{folder.name}: starts over, because {reason}", flush=True)
    for file in [*files, folder / recorder.PROGRESS]:
        file.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _BEGUN).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return None


def _newest_first(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*.ckpt") if file.is_file())
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def _kept(file: Path, folder: Path) -> Path:
    """Return a copy of the file, because a ModelCheckpoint would never remove the file that the Trainer continues from."""
    kept = folder / recorder.RESUME
    if file != kept:
        part = folder / f"{recorder.RESUME}.part"
        shutil.copyfile(file, part)
        os.replace(part, kept)
    return kept


def _problem(file: Path) -> str | None:
    """Return None for a file that can be resumed, the reason for a damaged one, and an empty string for one that serves something else."""
    try:
        archive.check(file)
    except ValueError as error:
        return " ".join(str(error).split())
    if not zipfile.is_zipfile(file):
        return f"{file} is damaged: it is no archive of torch"
    if file.name == recorder.RESUME:  # complete and not at the end, and a script's objects in it need not be loaded here
        return None
    try:
        content = checkpoints.read(file)
    except UsageError:
        return ""
    whole = all(key in content for key in _FULL)
    return None if whole and not content.get(recorder.ENDED, True) else ""


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
