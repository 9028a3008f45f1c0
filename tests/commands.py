"""Run commands of ``lightning-sparse`` in this process; return their messages and check that no files are left."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch  # noqa: F401  (before a test captures stderr, because its log handler keeps the stream of its import)
import pytest

from lightning_sparse.cli import main

SHORT = ["--trainer.max_epochs", "2", "--data.batch_size", "400", "--report.dense_twin", "false", "--report.pictures", "false"]
SHORT += ["--report.table", "false"]
PLAIN = [*SHORT, "--trainer.logger", "false"]
QUIET = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),  # Lightning with this torch
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # LightningCLI with this jsonargparse
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden"),
]


def answer(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Run a command that must end with exit code ``code``; return its message, which has no traceback."""
    capsys.readouterr()
    assert main(words) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Like :func:`answer`, with exit code 2 and no files written."""
    before = sorted(Path.cwd().rglob("*"))
    message = answer(capsys, 2, *words)
    assert sorted(Path.cwd().rglob("*")) == before
    return message


def write_project(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, config: str) -> Path:
    """Write a user's script and configuration into a folder, make that the current one, and return it."""
    (folder / "train.py").write_text(script)
    (folder / "own.yaml").write_text(config)
    monkeypatch.chdir(folder)
    return folder
