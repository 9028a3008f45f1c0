"""Interrupted runs of compare and path: from which checkpoint they continue, what is left of them, and what the command says."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from commands import PLAIN, QUIET, write_project
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sparse import cli
from lightning_sparse.cli import compare, main
from lightning_sparse.cli.comparison import engines, resuming, runs
from lightning_sparse.cli.comparison.recorder import Recorder

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")]

SCRIPT = """
import os, signal
from pathlib import Path
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 2)
    def on_train_epoch_start(self):
        with Path("epochs.txt").open("a") as file:
            file.write(f"{self.current_epoch} ")
    def training_step(self, batch, _):
        if self.current_epoch == 3 and Path("kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(batch).square().mean()
    def validation_step(self, batch, _):
        self.log("val_loss", self.layer(batch).square().mean())
    def train_dataloader(self): return torch.utils.data.DataLoader(torch.ones(8, 8), 4)
    val_dataloader = train_dataloader
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), 1e-2)

if __name__ == "__main__":
    LightningCLI(Net, seed_everything_default=0)
"""
CONFIG = "trainer: {accelerator: cpu, devices: 1, max_epochs: 6, logger: false, enable_progress_bar: false}"
WORDS = ["own.yaml", "--script", "train.py"]
COMPARE = ["compare", *WORDS, "--methods", "MagnitudePruning", "--targets", "0.75", "--no_dense"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_project(tmp_path, monkeypatch, SCRIPT, CONFIG)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_its_epoch_and_leaves_no_old_checkpoint(project, capsys):
    (project / "kill").touch()
    assert main(COMPARE) == 1
    (project / "kill").unlink()
    capsys.readouterr()
    assert main(COMPARE) == 0
    assert (project / "epochs.txt").read_text().split() == ["0", "1", "2", "3", "3", "4", "5"]
    folder = project / "runs/compare/own/MagnitudePruning-0.75-seed0"
    assert f"{folder.name}: continues from checkpoints/epoch=2-step=6.ckpt" in capsys.readouterr().out
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["epoch=5-step=12.ckpt"]
    assert not (folder / "resume.ckpt").exists()


class Net(LightningModule):
    """Two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layer(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(8, 2), 4)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Stop(Callback):
    """Ends a fit at the start of its fourth epoch, as a killed process would."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "weights.ckpt", weights_only=True)  # the newest file
            raise RuntimeError("stopped here")


SETTINGS = {"lr": 0.1}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that was stopped in its fourth epoch of five, with its checkpoints."""
    folder = tmp_path / "run"
    assert resuming.start(folder, SETTINGS) is None
    _fit(folder, Stop())
    return folder


def _fit(folder: Path, *more: Callback) -> None:
    keeper = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=folder, max_epochs=5, callbacks=[*more, Recorder(str(folder)), keeper], **quiet)
    if more:
        with pytest.raises(RuntimeError, match="stopped here"):
            trainer.fit(Net())
    else:
        trainer.fit(Net())


def _epoch(file: Path | None) -> int:
    assert file is not None
    epoch: int = torch.load(file, weights_only=True)["epoch"]
    return epoch


def test_the_newest_checkpoint_with_all_states_is_continued_from(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun / "resume.ckpt").unlink()
    assert _epoch(resuming.start(begun, SETTINGS)) == 2
    assert capsys.readouterr().out == "run: continues from checkpoints/epoch=2.ckpt\n"
    assert (begun / "weights.ckpt").is_file()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_continued_from(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun / "resume.ckpt").unlink()
    for epoch, kept in ((2, 0.5), (1, 0.0)):
        file = begun / f"checkpoints/epoch={epoch}.ckpt"
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * kept)])
    assert _epoch(resuming.start(begun, SETTINGS)) == 0
    *damaged, last = capsys.readouterr().out.splitlines()
    assert last == "run: continues from checkpoints/epoch=0.ckpt"
    for line, epoch in zip(sorted(damaged), (1, 2), strict=True):
        assert line.startswith(f"run: {begun / f'checkpoints/epoch={epoch}.ckpt'} is damaged: ")
    assert [file.name for file in (begun / "checkpoints").iterdir()] == ["epoch=0.ckpt"]


def test_without_a_whole_checkpoint_or_with_other_settings_a_run_starts_over(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = begun.with_name("other")
    shutil.copytree(begun, copy)
    for file in (begun / "resume.ckpt", *(begun / "checkpoints").iterdir()):
        file.write_bytes(file.read_bytes()[:100])
    assert resuming.start(begun, SETTINGS) is None
    assert capsys.readouterr().out.endswith("run: starts over, because no checkpoint of it can be resumed\n")
    assert resuming.start(copy, {"lr": 0.2}) is None
    assert capsys.readouterr().out == "other: starts over, because its checkpoints are of other settings\n"
    for folder in (begun, copy):
        assert not list(folder.rglob("*.ckpt"))
        assert not (folder / "progress.json").exists()
    _fit(copy, Stop())
    assert resuming.start(copy, {"lr": 0.2}) is not None


def test_a_checkpoint_at_the_end_is_not_continued_from_because_such_a_run_would_log_nothing(tmp_path: Path) -> None:
    resuming.start(tmp_path, SETTINGS)
    _fit(tmp_path)
    (tmp_path / "final.ckpt").unlink()
    assert _epoch(resuming.start(tmp_path, SETTINGS)) == 3


def test_a_run_whose_record_was_removed_is_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resuming.start(tmp_path, SETTINGS)
    _fit(tmp_path)
    (tmp_path / "metrics.json").unlink()
    assert resuming.start(tmp_path, SETTINGS) is None
    assert "starts over, because its record is missing" in capsys.readouterr().out


def test_ctrl_c_is_one_line_with_the_runs_done(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "run_all", interrupted)
    monkeypatch.setattr(compare.Run, "result", lambda run: {} if run.setting == 0.75 else None)
    assert main([*COMPARE, "--targets", "0.75", "0.9"]) == 130
    assert capsys.readouterr().err == "interrupted: 1 of 2 runs done; the same command goes on\n"
    assert main(["path", *WORDS, "--lams", "1e-3"]) == 130
    assert capsys.readouterr().err == "interrupted: 0 of 1 runs done; the same command goes on\n"


STOP = """
from lightning.pytorch import Callback

class Stop(Callback):
    def __init__(self, epoch: int):
        self.epoch = epoch
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt
"""


def test_an_interrupted_fit_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stop.py").write_text(STOP)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    fit = ["fit", "--config", "digits", *PLAIN, "--trainer.max_epochs", "3"]

    def interrupted(epoch: int) -> str:
        try:
            assert main([*fit, "--trainer.callbacks+=stop.Stop", f"--trainer.callbacks.epoch={epoch}"]) == 130
        finally:
            signal.signal(signal.SIGINT, before)  # the Trainer ignores further interrupts of a process that it ends
        return capsys.readouterr().err

    assert interrupted(0) == "interrupted: before a checkpoint was written\n"
    message = interrupted(1)
    assert message.startswith("interrupted: the same command with --ckpt_path ")
    file = message.split()[6]
    assert torch.load(file, weights_only=True)["epoch"] == 0
    assert main([*fit, "--ckpt_path", file]) == 0
    assert max(torch.load(path, weights_only=True)["epoch"] for path in tmp_path.rglob("*.ckpt")) == 2


def test_ctrl_c_in_a_fit_of_this_process_has_the_same_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_the_trainer(*_: object) -> NoReturn:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(cli, "_run", as_the_trainer)
    assert main(["seeds", "digits"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setattr(cli, "_run", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        main(["seeds", "digits"])


def test_no_run_is_started_after_ctrl_c(tmp_path: Path) -> None:
    workers = engines._Workers()
    workers.kill()
    assert workers.execute(runs.Run(str(tmp_path / "run"), "own.yaml", "M", 0.9, 0)) == {"failed": "stopped"}
    assert not (tmp_path / "run").exists()
