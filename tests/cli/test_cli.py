"""The command line in this process: subcommands, overrides, and errors before anything is written."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lightning_sparse import duality
from lightning_sparse.callbacks import AdaptiveMask, ReweightedPenalty
from lightning_sparse.cli import main, recipes
from lightning_sparse.cli.check import CheckCLI
from lightning_sparse.cli.training import RecipeCLI, fit, launch
from lightning_sparse.mask_rules import Standout
from lightning_sparse.penalties import ARD, LogSum

SHORT = ["--trainer.max_epochs", "2", "--trainer.logger", "false", "--data.batch_size", "400"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*",  # Lightning with this torch
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # LightningCLI with this jsonargparse
    "ignore:The number of training batches",
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checked(*overrides: str) -> CheckCLI:
    return launch(CheckCLI, ["fit", "--config", "digits", *overrides])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail with exit code 2 and write no file; return its message."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(words) == 2
    assert sorted(Path.cwd().rglob("*")) == before
    return capsys.readouterr().err


def test_the_form_is_swapped_by_one_override_and_keeps_penalty_and_strength() -> None:
    own, swapped = checked().settings["sparsify"], checked("--sparsify", "AdaptiveMask").settings["sparsify"]
    assert type(own) is ReweightedPenalty
    assert type(swapped) is AdaptiveMask
    assert (swapped.penalty, swapped.schedule, swapped.freeze) == (own.penalty, own.schedule, own.freeze)


@pytest.mark.slow
def test_the_penalty_is_swapped_by_its_short_name() -> None:
    words = ["--sparsify.penalty", "Standout", "--sparsify.penalty.a", "3", "--sparsify.threshold", "0.01"]
    callback = checked(*words).settings["sparsify"]
    assert callback.given == Standout(a=3.0)
    assert callback.schedule == checked().settings["sparsify"].schedule


@pytest.mark.slow
def test_the_strength_takes_a_number_or_a_schedule() -> None:
    assert checked("--sparsify.lam", "0.5").settings["sparsify"].lam == 0.5
    warm = checked("--sparsify.lam", "LinearWarmup", "--sparsify.lam.lam", "0.5", "--sparsify.lam.share", "0.25")
    assert warm.settings["sparsify"].schedule(step=5, total=40) == 0.25


@pytest.mark.slow
def test_fit_reports_what_its_checkpoint_holds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "digits", *SHORT, "--sparsify.threshold", "0.05"]
    result = fit(words).result
    assert result is not None
    assert result.dense is not None
    state = torch.load(result.sparse.file, weights_only=True)["state_dict"]
    zeros = {name: (int((state[name] == 0).sum()), state[name].numel()) for name in result.sparse.zeros}
    assert result.sparse.zeros == zeros
    assert sum(hits for hits, _ in zeros.values()) > 0
    assert result.dense.nonzero == result.dense.size
    printed = capsys.readouterr().out
    for name, (hits, size) in zeros.items():
        assert f"non-zero {name}" in printed
        assert f"{size - hits} of {size}" in printed
    assert f"{result.sparse.metrics['test/accuracy']:.4f}" in printed
    for path in result.files.values():
        assert path.exists()
        assert str(path) in printed


@pytest.mark.slow
def test_the_dense_twin_is_the_run_without_the_callback() -> None:
    result = fit(["--config", "digits", *SHORT, "--report.pictures", "false"]).result
    assert result is not None
    assert result.dense is not None
    plain = launch(RecipeCLI, ["fit", "--config", "digits", *SHORT, "--sparsify", "null", "--trainer.default_root_dir", "plain"])
    twin = torch.load(result.dense.file, weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(plain.model.state_dict()), dict(twin), rtol=0, atol=0)


@pytest.mark.slow
def test_the_whole_configuration_lies_beside_the_checkpoints_and_trains_again() -> None:
    result = fit(["--config", "digits", *SHORT, "--report.dense_twin", "false", "--trainer.default_root_dir", "first"]).result
    assert result is not None
    config = next(Path("first").rglob("config.yaml"))
    again = fit(["--config", str(config), "--trainer.default_root_dir", "second"]).result
    assert again is not None
    assert again.sparse.metrics == result.sparse.metrics
    assert again.sparse.zeros == result.sparse.zeros


@pytest.mark.slow
def test_a_saved_checkpoint_is_tested_by_the_test_verb(capsys: pytest.CaptureFixture[str]) -> None:
    result = fit(["--config", "digits", *SHORT, "--report.dense_twin", "false", "--report.pictures", "false"]).result
    assert result is not None
    capsys.readouterr()
    assert main(["test", "--config", "digits", "--trainer.logger", "false", "--ckpt_path", str(result.sparse.file)]) == 0
    assert f"{result.sparse.metrics['test/accuracy']:.4f}"[:5] in capsys.readouterr().out


def test_a_class_in_a_file_beside_the_recipe_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from lightning_sparse.penalties import LogSum\nclass Mine(LogSum):\n    pass\n"
    (tmp_path / "my_penalties.py").write_text(source)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    recipe = {"penalty": {"class_path": "my_penalties.Mine", "init_args": {"eps": 1.5}}, "lam": 1e-3}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"sparsify": {"class_path": "ReweightedPenalty", "init_args": recipe}}))
    assert main(["check", "digits", "--config", "mine.yaml"]) == 0


_MODEL = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
MISTAKES = {
    "unknown recipe": (["fit", "--config", "digist"], ["no recipe 'digist'", "'digits'"]),
    "unknown recipe to check": (["check", "overlay/adaptive_musk"], ["overlay/adaptive_musk", "'overlay/adaptive_mask'"]),
    "no --config": (["fit", "my.yaml"], ["no key 'my.yaml'; did you mean --config my.yaml?"]),
    "no --config of a recipe": (["fit", "digits", "--trainer.max_epochs", "1"], ["no key 'digits'; did you mean --config digits?"]),
    "no callback for a target": (
        ["fit", *_MODEL, "--sparsify.target_sparsity", "0.9"],
        ["--sparsify.target_sparsity without a callback", "name one, too, such as --sparsify Sparsify\n"],
    ),
    "no callback for a strength": (
        ["fit", *_MODEL, "--sparsify.lam=0.1"],
        ["--sparsify.lam without a callback", "such as --sparsify ReweightedPenalty --sparsify.penalty L1\n"],
    ),
    "unknown verb": (["fitt"], ["no verb 'fitt'", "'fit'"]),
    "key of the trainer": (["fit", "--config", "digits", "--trainer.max_epoch", "3"], ["'trainer.max_epoch'", "'trainer.max_epochs'"]),
    "key of the callback": (["fit", "--config", "digits", "--sparsify.lamda", "1"], ["takes no 'lamda'", "'lam'"]),
    "key of the penalty": (["check", "digits", "--sparsify.penalty.epps", "1"], ["LogSum takes no 'epps'", "'eps'"]),
    "class of the form": (["check", "digits", "--sparsify", "AdaptivMask"], ["no class 'AdaptivMask'", "'AdaptiveMask'"]),
    "class of the penalty": (["check", "digits", "--sparsify.penalty", "LogSun"], ["sparsify.penalty: no class 'LogSun'", "'LogSum'"]),
    "type": (["check", "digits", "--sparsify.freeze", "late"], ["sparsify.freeze", "float", "late"]),
    "negative lam": (["fit", "--config", "digits", "--sparsify.lam", "-1"], ["lam must be a finite number > 0, got -1"]),
    "zero eps": (["fit", "--config", "digits", "--sparsify.penalty.eps", "0"], ["eps must be a finite number > 0, got 0"]),
    "pattern": (["fit", "--config", "digits", "--sparsify.select", "[layer.*]"], ["'layer.*' matches no", "'layers."]),
    "shrinks only": (
        ["fit", "--config", "digits", "--sparsify.penalty", "Standout", "--sparsify.threshold", "null"],
        ["only shrinks", "threshold"],
    ),
    "plot class": (["plot", "MPC", "-o", "a.png"], ["no class 'MPC'", "'MCP'"]),
    "plot key": (["plot", "LogSum: {epps: 1}", "-o", "a.png"], ["LogSum takes no 'epps'", "'eps'"]),
    "plot value": (["plot", "LogSum: {eps: -1}", "-o", "a.png"], ["eps must be a finite number > 0"]),
    "plot file": (["plot", "LogSum", "-o", "a.gif"], ["must end in .png or .pdf", "a.gif"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_invalid_input_fails_before_anything_is_written(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = MISTAKES[case]
    message = refused(capsys, *words)
    for part in expected:
        assert part in message
    assert "Traceback" not in message


IN_YAML = {
    "top level": ({"sparsfy": {"class_path": "ReweightedPenalty"}}, ["no key 'sparsfy", "'sparsify'"]),
    "trainer": ({"trainer": {"max_epoch": 3}}, ["no key 'trainer.max_epoch'", "'trainer.max_epochs'"]),
    "callback": ({"sparsify": {"init_args": {"lamda": 1.0}}}, ["takes no 'lamda'", "'lam'"]),
    "callbacks": ({"trainer": {"callbacks": [{"class_path": "ModelCheckpoin"}]}}, ["no class 'ModelCheckpoin'", "'ModelCheckpoint'"]),
    "value": ({"sparsify": {"init_args": {"tol": 2.0}}}, ["tol must lie in (0, 1), got 2.0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_YAML)
def test_an_error_in_a_file_suggests_the_closest_name(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, expected = IN_YAML[case]
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    message = refused(capsys, "fit", "--config", "digits", "--config", "mine.yaml")
    for part in expected:
        assert part in message


def test_broken_yaml_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("trainer: [")
    assert "mine.yaml" in refused(capsys, "check", "mine.yaml")


def test_check_describes_the_run_without_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "digits", "--sparsify.select", "['!layers.5.weight']"]) == 0
    printed = capsys.readouterr().out
    assert "2 weight matrices with 49,200 weights" in printed
    assert "structure" not in printed
    assert "ok: digits" in printed
    assert list(Path.cwd().iterdir()) == []


def test_check_shows_which_weights_are_zero_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "digits", "--sparsify.structure", "Blocks", "--sparsify.structure.shape", "[4, 2]"]) == 0
    assert ", lam 0.002, structure Blocks(shape=(4, 2)): 3 weight" in capsys.readouterr().out


def test_a_class_of_a_file_beside_the_configuration_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    penalty = "from lightning_sparse.penalties import LogSum\n\n\nclass Beside(LogSum):\n    pass\n"
    (tmp_path / "there" / "beside_the_yaml.py").write_text(penalty)
    recipe = yaml.safe_load(recipes.find("digits").read_text())
    recipe["sparsify"]["init_args"]["penalty"] = {"class_path": "beside_the_yaml.Beside", "init_args": {"eps": 0.5}}
    (tmp_path / "there" / "own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["check", str(tmp_path / "there" / "own.yaml")]) == 0
    assert "Beside(eps=0.5)" in capsys.readouterr().out


def test_check_names_a_penalty_only_where_the_callback_takes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "digits", "--sparsify", "Sparsify", "--sparsify.target_sparsity", "0.9"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Sparsify, to a share of 0.9 zeros")
    assert "omega'" not in said


@pytest.mark.slow
def test_the_table_of_a_run_with_channels_counts_what_the_run_counts(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    chosen = ["--sparsify", "Sparsify", "--sparsify.target_sparsity", "0.5", "--sparsify.structure", "Channels"]
    assert main(["check", "digits", *chosen]) == 0
    assert "structure Channels() (fit also counts the biases and norms in its groups)" in capsys.readouterr().out
    short = ["--trainer.max_epochs", "2", "--trainer.logger", "false", "--report.dense_twin", "false", "--report.exports", "false"]
    with caplog.at_level(logging.INFO):
        assert main(["fit", "--config", "digits", *chosen, *short]) == 0
    printed = capsys.readouterr().out
    (told,) = re.findall(r"([\d.]+)% of (\d+) selected weights are zero", caplog.text)
    (total,) = re.findall(r"non-zero, total\W+\d+ of (\d+)", printed)
    (zeros,) = re.findall(r"zeros\W+([\d.]+) %", printed)
    assert told == (zeros, total)
    assert "non-zero biases and norms in their groups" in printed


def test_a_penalty_of_many_weights_is_refused_in_one_line_without_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "plot", "ARD")
    assert message.startswith("error: ARD(X=<tensor of 4 x 3>, tau=0.5) is not separable")
    assert message.count("\n") == 1
    with pytest.raises(ValueError, match=r"^ARD\(X=<tensor of 4 x 3>, tau=0.5\) is not separable: it has no slope"):
        duality.fine_print(ARD(**ARD.examples[0]))


def test_recipes_are_listed_with_their_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("reaches:") == printed.count("summary:") >= 4
    assert "overlay/adaptive_mask" in printed


@pytest.mark.parametrize("words", [["recipes"], ["--help"]])
def test_a_reader_that_ends_early_ends_the_command_quietly(words: list[str]) -> None:
    program = [sys.executable, "-m", "lightning_sparse.cli", *words]
    every = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, env=os.environ | every, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_what_fit_prints_into_files_has_no_escape_codes(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs", "1", "--report.dense_twin", "false", "--report.pictures", "false", "--report.exports", "false"]
    program = [sys.executable, "-m", "lightning_sparse.cli", "fit", "--config", "digits", *short]
    every = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | every, cwd=tmp_path, timeout=300, check=True)
    assert "sync" in done.stdout + done.stderr  # W&B's last words
    assert "\x1b" not in done.stdout + done.stderr


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "predict", "recipes", "check", "seeds", "plot"):
        assert f"\n  {verb} " in printed


def test_the_command_is_silent_about_what_lightning_calls_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(verb: str, rest: list[str]) -> int:
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use is_leaf()", FutureWarning, stacklevel=2)
        return 0

    monkeypatch.setattr("lightning_sparse.cli._run", warn)
    monkeypatch.setattr("sys.argv", ["lightning-sparse", "recipes"])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert main() == 0
    assert heard == []


def test_plot_draws_names_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["LogSum", "MCP: {c: 0.7}", json.dumps({"class_path": "LogSum", "init_args": {"eps": 0.5}})]
    assert main(["plot", *words, "-o", "curves.png"]) == 0
    assert capsys.readouterr().out.strip() == "curves.png"
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_word_of_plot_becomes_the_named_object() -> None:
    from lightning_sparse.cli.plot import read

    assert read("LogSum: {eps: 0.5}") == LogSum(eps=0.5)
    assert read("LogSum") == LogSum(**LogSum.examples[0])
