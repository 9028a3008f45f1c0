"""``lightning-sparse reproduce``: invalid arguments, and complete and interrupted runs on the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import QUIET, refused

from lightning_sparse.cli import main, recipes
from lightning_sparse.reproduction import runs

pytestmark = QUIET
MISTAKES = {
    "row": (["--rows", "ada_porx"], ["no row 'ada_porx'", "'ada_prox'"]),
    "epochs": (["--epochs", "0"], ["--epochs must be at least 1, got 0"]),
    "jobs": (["--jobs", "-1"], ["--jobs must be at least 1, got -1"]),
    "seed": (["--seeds", "0", "-2"], ["--seeds must be whole numbers >= 0", "-2"]),
    "known": (["--known", "nowhere"], ["--known must name a folder with the runs.csv", "nowhere"]),
    "finished": (["--finished"], ["no run in runs/reproduce is finished"]),
    "shared name": (["--rows", "log_sum", "log_sum.yaml"], ["named 'log_sum'"]),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_invalid_input_fails_before_anything_is_written(
    words: list[str], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log_sum.yaml").write_text(recipes.find("paper/log_sum").read_text())
    message = refused(capsys, "reproduce", *words)
    assert all(part in message for part in said)


def test_a_finished_run_with_other_overrides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Path("out/log_sum-200-seed1")
    kept.mkdir(parents=True)
    (kept / "result.json").write_text(json.dumps({"overrides": "--data.root elsewhere --sparsify.lam 1e-2"}))
    message = refused(capsys, "reproduce", "--rows", "log_sum", "--out", "out", "--sparsify.lam", "1e-3")
    assert "the overrides '--sparsify.lam 1e-2', not '--sparsify.lam 1e-3'" in message


STOP = """
from pathlib import Path
from lightning.pytorch import Callback

class Stop(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1 and Path("stop").exists():
            raise RuntimeError("the power is gone")
"""


def tiny(folder: Path) -> None:
    """Write a recipe of one second on the digits; a file named ``stop`` interrupts it in the second epoch."""
    recipe = yaml.safe_load(recipes.find("digits").read_text())
    recipe["model"]["init_args"]["sizes"] = [64, 20, 10]
    recipe["trainer"] |= {"check_val_every_n_epoch": 1, "logger": False, "max_epochs": 2}
    recipe["trainer"]["callbacks"] += [{"class_path": "stopping.Stop"}]
    recipe["report"] = {"dense_twin": False}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "stopping.py").write_text(STOP)


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return everything recorded except times."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    texts = {path.parent.name: path.read_text().splitlines() for path in folder.glob("*/trajectory.csv")}
    return [found | {"seconds": 0} for found in results], {run: [line.rpartition(",")[0] for line in text] for run, text in texts.items()}


@pytest.mark.slow
def test_an_interrupted_reproduction_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path)
    command = ["reproduce", "--rows", "tiny.yaml", "--epochs", "2", "--seeds", "0", "1", "--jobs", "2"]
    assert main([*command, "--out", "whole"]) == 0
    Path("stop").touch()
    with pytest.raises(RuntimeError, match="the power is gone"):
        main([*command, "--out", "parts"])
    assert not list(Path("parts").glob("*/result.json"))
    assert all(len(runs.read(file)) <= 1 for file in Path("parts").glob("*/trajectory.csv"))
    assert list(Path("parts").glob("*/checkpoints/*.ckpt"))
    Path("stop").unlink()
    assert main([*command, "--out", "parts"]) == 0
    assert outcome(Path("parts")) == outcome(Path("whole"))
    results, lines = outcome(Path("whole"))
    assert [len(text) for text in lines.values()] == [3, 3]
    assert results[0]["test_error"] != results[1]["test_error"]
    again = {path: path.stat().st_mtime_ns for path in Path("parts").glob("*/*.*")}
    assert main([*command, "--out", "parts"]) == 0
    assert again == {path: path.stat().st_mtime_ns for path in Path("parts").glob("*/*.*")}
    assert "| tiny |" in Path("parts/table.md").read_text()
    assert "2 runs of 2 epochs, 0 to go" in capfd.readouterr().out
