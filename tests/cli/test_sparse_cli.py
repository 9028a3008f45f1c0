"""SparseCLI in a user's script: one-line errors, overlays in any order, configuration in UTF-8."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import QUIET
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_sparse
from lightning_sparse import callbacks
from lightning_sparse.callbacks import AdaptiveMask, MagnitudePruning, ReweightedPenalty
from lightning_sparse.cli import SparseCLI, main, recipes, text

pytestmark = QUIET
QUIETLY: dict[str, Any] = {"run": False, "seed_everything_default": False, "save_config_callback": None}
OWN = {
    "model": {"width": 4},
    "trainer": {"logger": False, "callbacks": [{"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "step"}}]},
}


class Net(BoringModel):
    """A user's module without any use of this package."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        if width > 5:
            raise ValueError("too wide")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    Path("own.yaml").write_text(yaml.safe_dump(OWN), encoding="utf-8")


def made(*words: str) -> Any:
    return SparseCLI(Net, **QUIETLY, args=list(words))


def kinds(cli: Any) -> list[str]:
    known = (AdaptiveMask, MagnitudePruning, ReweightedPenalty, LearningRateMonitor)
    return [type(callback).__name__ for callback in cli.trainer.callbacks if isinstance(callback, known)]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        made(*words)
    assert end.value.code == 2
    return capsys.readouterr().err


ORDERS = {
    "last": ["own.yaml", "overlay/adaptive_mask"],
    "first": ["overlay/adaptive_mask", "own.yaml"],
    "between": ["own.yaml", "overlay/adaptive_mask", "own.yaml"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_an_overlay_is_kept_wherever_it_stands(order: str) -> None:
    cli = made(*[word for name in ORDERS[order] for word in ("--config", name)], "--trainer.callbacks.lam", "0.25")
    assert kinds(cli) == ["LearningRateMonitor", "AdaptiveMask"]
    assert cli.sparsifiers()[0].lam == 0.25
    assert len(cli.overruled) == (0 if order == "last" else 1)


def test_two_overlays_are_kept() -> None:
    cli = made("--config=overlay/magnitude_pruning", "-c", "overlay/adaptive_mask", "--config", "own.yaml")
    assert kinds(cli) == ["LearningRateMonitor", "MagnitudePruning", "AdaptiveMask"]


def test_lightnings_own_drops_it() -> None:
    """Lightning's behaviour behind `overruled`; remove `overruled` if this test fails."""
    from lightning.pytorch.cli import LightningCLI

    words = ["--config", str(recipes.find("overlay/adaptive_mask")), "--config", "own.yaml"]
    assert kinds(LightningCLI(Net, **QUIETLY, args=words)) == ["LearningRateMonitor"]


def test_a_form_is_chosen_by_a_key_of_its_own() -> None:
    cli = made("--config", "own.yaml", "--sparsify", "ReweightedPenalty", "--sparsify.penalty", "L1", "--sparsify.lam", "0.5")
    assert kinds(cli) == ["LearningRateMonitor", "ReweightedPenalty"]
    assert kinds(made("--config", "{model: {width: 2}}")) == []


MISTAKES = {
    "key": (["--trainer.max_epoch", "3"], "no key 'trainer.max_epoch'; closest: 'trainer.max_epochs'"),
    "model": (["--model.widht", "3"], "no key 'model.widht'; closest: 'model.width'"),
    "class": (["--sparsify", "AdaptivMask"], "sparsify: no class 'AdaptivMask'; closest: 'AdaptiveMask'"),
    "argument": (["--config", "overlay/adaptive_mask", "--trainer.callbacks.lamm", "1"], "AdaptiveMask takes no 'lamm'; closest: 'lam'\n"),
    "value": (["--sparsify", "PenaltyLoss", "--sparsify.penalty", "LogSum", "--sparsify.penalty.eps", "-1"], "eps must be a finite number"),
    "later value": (["--config", "overlay/adaptive_mask", "--trainer.callbacks.lam", "-1"], "lam must be a finite number > 0, got -1"),
    "recipe": (["--config", "overlay/adaptive_musk"], "no recipe 'overlay/adaptive_musk'; closest: 'overlay/adaptive_mask'"),
}  # fmt: skip


PRUNE = {"class_path": "MagnitudePruning", "init_args": {"target_sparsity": 0.5}}
SAVE: dict[str, Any] = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "loss"}}
TWICE = {
    "a callback of the Trainer and the key sparsify": ([PRUNE], PRUNE, "two callbacks are MagnitudePruning with the same select"),
    "two checkpoint callbacks": ([SAVE, SAVE], None, "two callbacks are ModelCheckpoint with the same settings"),
}


@pytest.mark.parametrize(("listed", "sparsify", "expected"), TWICE.values(), ids=TWICE.keys())
def test_two_callbacks_with_one_state_are_refused_in_one_line(
    listed: list[Any], sparsify: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"logger": False, "callbacks": listed}, "sparsify": sparsify}), encoding="utf-8")
    message = refused(capsys, "--config", "own.yaml")
    assert message.startswith(f"error: {expected}")
    assert message.count("\n") == 1


def test_two_callbacks_of_one_class_with_their_own_select_are_accepted() -> None:
    two = [{**PRUNE, "init_args": {"target_sparsity": 0.5, "select": [name]}} for name in ("layer.weight", "other.weight")]
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"logger": False, "callbacks": two}}), encoding="utf-8")
    assert kinds(made("--config", "own.yaml")) == ["MagnitudePruning", "MagnitudePruning"]


def test_a_configuration_without_its_flag_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "own.yaml", "--model.width", "3") == "error: no key 'own.yaml'; did you mean --config own.yaml?\n"


@pytest.mark.parametrize("case", MISTAKES)
def test_invalid_input_gives_a_one_line_error(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = MISTAKES[case]
    message = refused(capsys, "--config", "own.yaml", *words)
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1


def test_an_error_of_the_users_own_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="too wide"):
        made("--model.width", "9")


def test_check_warns_that_the_order_matters_with_lightning_cli(capsys: pytest.CaptureFixture[str]) -> None:
    own = OWN | {"model": "lightning.pytorch.demos.boring_classes.BoringModel"}
    Path("whole.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    assert main(["check", "overlay/adaptive_mask", "--config", "whole.yaml"]) == 0
    first = capsys.readouterr().out
    assert main(["check", "whole.yaml", "--config", "overlay/adaptive_mask"]) == 0
    last = capsys.readouterr().out
    assert "note: whole.yaml follows" in first
    assert "note:" not in last
    assert "AdaptiveMask with LogSum(eps=2.0), lam 0.001: 1 weight matrix with 64 weights" in first
    assert "AdaptiveMask with LogSum(eps=2.0), lam 0.001: 1 weight matrix with 64 weights" in last


SCRIPT = """
import warnings
warnings.simplefilter("ignore")
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_sparse.cli import SparseCLI
SparseCLI(BoringModel)
"""
JAPANESE = """# ふつうの設定
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 1
  limit_val_batches: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: CSVLogger, init_args: {save_dir: logs, name: run, version: 0}}
  callbacks:
  - class_path: lightning.pytorch.callbacks.EarlyStopping
    init_args: {monitor: 実験, check_on_train_epoch_end: false, strict: false}
"""


def in_ascii(*words: str) -> subprocess.CompletedProcess[bytes]:
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, env=os.environ | ascii_locale, check=False)


@pytest.mark.slow
def test_a_script_runs_in_an_ascii_locale() -> None:
    Path("script.py").write_text(SCRIPT, encoding="utf-8")
    Path("設定.yaml").write_text(JAPANESE, encoding="utf-8")
    done = in_ascii("script.py", "fit", "--config", "overlay/magnitude_pruning", "--config", "設定.yaml")
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    saved = Path("logs/run/version_0/config.yaml").read_text(encoding="utf-8")
    assert "monitor: 実験" in saved
    assert "MagnitudePruning" in saved


RECIPE = """# summary: 手書き数字
trainer:
  logger: {class_path: WandbLogger, init_args: {project: digits, save_dir: ., offline: true, notes: 実験}}
  max_epochs: 1
"""


@pytest.mark.slow
def test_a_recipe_is_trained_in_an_ascii_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    Path("レシピ.yaml").write_text(RECIPE, encoding="utf-8")
    short = ["--data.batch_size", "400", "--report.dense_twin", "false", "--report.pictures", "false", "--trainer.default_root_dir", "出力"]
    done = in_ascii("-m", "lightning_sparse.cli", "fit", "--config", "digits", "--config", "レシピ.yaml", *short)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    saved = next(path for path in Path.cwd().rglob("config.yaml") if "files" not in path.parts)
    assert "notes: 実験" in saved.read_text(encoding="utf-8")
    assert 'default_root_dir: "出力"' in saved.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_folder_that_an_ascii_locale_cannot_name_is_refused_before_anything_is_written() -> None:
    Path("own.yaml").write_text("trainer: {default_root_dir: 実験}", encoding="utf-8")
    before = sorted(Path.cwd().iterdir())
    done = in_ascii("-m", "lightning_sparse.cli", "fit", "--config", "digits", "--config", "own.yaml")
    assert (done.returncode, sorted(Path.cwd().iterdir())) == (2, before)
    assert "ASCII file names, got '実験': set PYTHONUTF8=1" in done.stderr.decode("utf-8")


def test_names_of_files_alone_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsencode", lambda name: name.encode("ascii", "surrogateescape"))
    config = {"fit": {"trainer": {"default_root_dir": "runs", "callbacks": [{"init_args": {"monitor": "実験", "dirpath": "出力"}}]}}}
    assert text.unencodable_name(config) == "出力"
    assert text.unencodable_name({"default_root_dir": "\udce5", "notes": "実験"}) is None


def opened_without_encoding(source: str) -> list[int]:
    """Return the lines that open a text file in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if name in ("open", "read_text", "write_text", "NamedTemporaryFile", "FileHandler"):
            words = [ast.unparse(argument) for argument in node.args]
            binary = any(word.strip("'") in ("rb", "wb", "ab", "r+b") for word in words)
            if not binary and not any(keyword.arg in ("encoding", None) for keyword in node.keywords):
                found.append(node.lineno)
    return found


def test_every_text_file_is_opened_as_utf8() -> None:
    folders = Path(lightning_sparse.__file__).parent, Path(callbacks.__file__).parent
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(sources) > 100
    odd = {str(path): lines for path in sources if (lines := opened_without_encoding(path.read_text(encoding="utf-8")))}
    assert odd == {}
    assert opened_without_encoding("open('a')\nopen('a', 'rb')\npath.open('w', encoding='utf-8')\npath.write_text(x)") == [1, 4]


def test_a_checkpoint_of_another_model_with_a_fixed_class(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"depth": 2}}, "other.ckpt")
    with pytest.raises(SystemExit):
        SparseCLI(Net, **(QUIETLY | {"run": True}), args=["test", "--ckpt_path", "other.ckpt"])
    assert "hyper_parameters of --ckpt_path: no key 'model.depth'; is it a file of another model?" in capsys.readouterr().err


def test_a_cut_checkpoint_is_called_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"w": torch.ones(1000)}}, "cut.ckpt")
    Path("cut.ckpt").write_bytes(Path("cut.ckpt").read_bytes()[:3000])
    with pytest.raises(SystemExit):
        SparseCLI(Net, **(QUIETLY | {"run": True}), args=["fit", "--ckpt_path", "cut.ckpt"])
    assert capsys.readouterr().err.startswith("error: cut.ckpt is damaged: ")


def test_a_command_of_lightning_sparse_is_answered_with_the_line_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    for words, line in ((["check", "own.yaml"], "check CONFIG"), (["report", "a.ckpt"], "report CKPT")):
        with pytest.raises(SystemExit):
            SparseCLI(Net, **(QUIETLY | {"run": True}), args=words)
        assert f"lightning-sparse {line} --script SCRIPT" in capsys.readouterr().err
