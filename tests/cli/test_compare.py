"""compare, path and sweep: what they train, what they keep, and what they refuse. Runs are of a user's own LightningCLI script."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import write_project

from lightning_sparse import counts
from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning
from lightning_sparse.cli import compare, main, recipes, sweep
from lightning_sparse.cli.comparison import engines, methods, results, runs
from lightning_sparse.cli.errors import UsageError

SCRIPT = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

class Net(LightningModule):
    def __init__(self, width: int = 16, wait: float = 0.0):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
        self.wait = wait
    def training_step(self, batch, _):
        import time
        time.sleep(self.wait)
        return torch.nn.functional.cross_entropy(self.body(batch[0]), batch[1])
    def validation_step(self, batch, _):
        self.log("val_acc", (self.body(batch[0]).argmax(1) == batch[1]).float().mean())
    def test_step(self, batch, _):
        self.log("test_acc", (self.body(batch[0]).argmax(1) == batch[1]).float().mean())
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)

class Data(LightningDataModule):
    def data(self, seed):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
    def train_dataloader(self): return self.data(0)
    def val_dataloader(self): return self.data(1)
    def test_dataloader(self): return self.data(2)

if __name__ == "__main__":
    LightningCLI(Net, Data, seed_everything_default=0)
"""
CONFIG = """
trainer: {accelerator: cpu, devices: 1, max_epochs: 4, logger: false, enable_progress_bar: false, enable_checkpointing: false}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_project(tmp_path, monkeypatch, SCRIPT, CONFIG)


MLP_ON_DIGITS = (
    "{model: {class_path: lightning_sparse.examples.mlp.MLP, init_args: {sizes: [64, 20, 10]}}, "
    "data: {class_path: lightning_sparse.examples.digits.Digits}}"
)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[runs.Run]:
    """Return the runs that the last command has planned; nothing is trained."""
    found: list[runs.Run] = []

    def stop(every, *_):
        found[:] = every
        raise UsageError("stopped")

    monkeypatch.setattr(engines, "run_all", stop)
    return found


def arguments(planned: list[runs.Run]) -> list[dict[str, Any]]:
    return [run.callback["init_args"] for run in planned if run.callback is not None]


def _lines(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))


COMPARE = ["compare", "own.yaml", "--script", "train.py", "--methods", "MagnitudePruning", "--targets", "0.75"]


@pytest.mark.slow
def test_a_users_script_is_compared_and_the_same_command_trains_only_what_is_missing(project, capsys):
    assert main([*COMPARE, "--test", "--model.width", "8"]) == 0
    folder = project / "runs/compare/own"
    lines = _lines(folder)
    assert [line["method"] for line in lines] == ["dense", "MagnitudePruning"]
    assert [float(line["zeros"]) for line in lines] == [0.0, 0.75]
    for line, name in zip(lines, ("dense-seed0", "MagnitudePruning-0.75-seed0"), strict=True):
        state = torch.load(folder / name / "final.ckpt", weights_only=True)["state_dict"]
        weights = {key: w for key, w in state.items() if w.dim() == 2}
        assert state["body.0.weight"].shape == (8, 8)  # the override came through
        assert counts.share(counts.count_zeros(weights)) == float(line["zeros"])
        assert 0 <= float(line["test_acc"]) <= 1
    assert (folder / "frontier.png").stat().st_size > 0
    table = (folder / "table.md").read_text()
    assert f"{float(lines[1]['val_acc']):.4f}" in table
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("final.ckpt")}
    capsys.readouterr()
    checkpoint = str(folder / "MagnitudePruning-0.75-seed0/final.ckpt")
    assert main(["report", checkpoint, "--script", "train.py"]) == 0  # its config.yaml is beside it
    said = capsys.readouterr().out
    assert "(75.00 %)" in said
    assert 'not measured, the network fails for inputs of the shapes [(8, 8)]: Module [Net] is missing the required "forward"' in said
    (folder / "dense-seed0/metrics.json").unlink()
    capsys.readouterr()
    assert main([*COMPARE, "--test", "--model.width", "8", "--metric", "val_ac"]) == 2
    said = capsys.readouterr()
    assert "no run logged 'val_ac'; closest: 'val_acc'" in said.err
    assert "to go" not in said.out  # nothing was trained
    assert main([*COMPARE, "--test", "--model.width", "8"]) == 0
    assert "2 runs, 1 to go" in capsys.readouterr().out
    again = {path: path.stat().st_mtime_ns for path in folder.rglob("final.ckpt")}
    assert {path.parent.name for path in times if again[path] != times[path]} == {"dense-seed0"}
    assert main([*COMPARE, "--model.width", "9"]) == 2  # other settings in the same folder
    assert "holds runs with other overrides;" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "folder"), [("own.yaml", "own"), ("../own.yaml", "own"), ("sub/own.yaml", "sub_own")])
def test_the_folder_is_named_after_the_configuration(project, monkeypatch, config, folder):
    place = project / "elsewhere" / config
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(CONFIG)
    monkeypatch.chdir(project / "elsewhere")
    given = argparse.Namespace(config=config, script=None, out=None)
    assert compare._Settings(given, "compare", ()).out == project / "elsewhere/runs/compare" / folder


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_configuration_is_beside_the_final_checkpoint_wherever_the_logger_writes(project, checkpoints):
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: elsewhere}}"
    words = ["--trainer.logger", logger, "--trainer.enable_checkpointing", str(checkpoints)]
    assert main([*COMPARE, "--no_dense", *words]) == 0
    folder = project / "runs/compare/own/MagnitudePruning-0.75-seed0"
    (elsewhere,) = (project / "elsewhere").rglob("config.yaml")
    assert (folder / "config.yaml").read_text() == elsewhere.read_text()
    assert main(["report", str(folder / "final.ckpt"), "--script", "train.py"]) == 0


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_with_its_reason(project, capsys):
    words = [*COMPARE, "--no_dense", "--methods", "AdaptiveProx: {select: ['nothing*']}", "MagnitudePruning"]
    assert main(words) == 0
    failed, good = _lines(project / "runs/compare/own")
    assert "select pattern 'nothing*' matches no selectable parameter" in failed["failed"]
    assert failed["zeros"] == ""
    assert float(good["zeros"]) == 0.75
    assert "failed: " in (project / "runs/compare/own/table.md").read_text()


@pytest.mark.slow
def test_the_exit_code_is_1_if_every_run_of_the_methods_failed(project, capsys):
    assert main([*COMPARE, "--methods", "AdaptiveProx: {select: ['nothing*']}"]) == 1
    dense, sparse = _lines(project / "runs/compare/own")
    assert (dense["failed"], sparse["zeros"]) == ("", "")


def test_a_method_that_cannot_be_built_is_refused_before_any_run(project, capsys):
    cases = {
        "AdaptiveProx: {penalty: MCP}": ": penalty: MCP needs 'c', such as `{class_path: MCP, init_args: {c: ",
        "AdaptiveProx: {penalty: {class_path: MCP, init_args: {c: -1}}}": "c must be a finite number > 0, got -1",
        "AdaptiveProx: {metric: nonsense}": ": metric: must be one of",
    }
    for method, said in cases.items():
        for words in (["compare", "own.yaml", "--methods", method], ["path", "own.yaml", "--lams", "1", "--method", method]):
            assert main([*words, "--script", "train.py"]) == 2
            text = capsys.readouterr().err
            assert f"method {method!r}: " in text
            assert said in text
            assert "--method." not in text
    assert not (project / "runs").exists()


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "Sparsify"], "no argument '--method'; did you mean --methods?"),
        (["--trainer.max_epoch", "3"], "no key 'trainer.max_epoch'; closest: 'trainer.max_epochs'"),
    ],
)
def test_a_misspelt_argument_is_refused_before_any_run(project, capsys, words, said):
    assert main(["compare", "digits", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (project / "runs").exists()


@pytest.mark.slow
def test_a_configuration_that_fails_without_sparsity_stops_the_comparison(project, capsys):
    assert main([*COMPARE, "--jobs", "1", "--model.widht", "8"]) == 2
    said = capsys.readouterr().err
    assert "dense-seed0 has failed, which has no sparsity callback, so the other runs would fail too and were stopped: " in said
    assert "widht" in said
    assert "log.txt" in said
    other = project / "runs/compare/own/MagnitudePruning-0.75-seed0/failed.txt"  # there if the run had just begun
    assert not other.exists() or other.read_text().startswith("stopped, because another run failed")
    dense, *_ = _settings(COMPARE).comparison()
    engines._check_dense(dense, {"failed": "killed by SIGKILL"})  # the system's own doing, such as too little memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (
            "from lightning.pytorch import Trainer\nTrainer(logger=False).fit(Net())",
            "plain.py makes no LightningCLI; this command needs one",
        ),
        ("import argparse\nargparse.ArgumentParser().parse_args()", "plain.py ended with exit code 2 before it made a LightningCLI; this"),
    ],
)
def test_a_script_without_a_lightning_cli_is_refused_before_it_trains(project, capsys, ending, said):
    source = SCRIPT.partition('if __name__ == "__main__":')[0].replace("def train_dataloader", "def unused")
    (project / "plain.py").write_text(f"{source}\n{ending}\n")
    words = ["compare", "own.yaml", "--methods", "MagnitudePruning", "--targets", "0.75", "--jobs", "2"]
    assert main([*words, "--script", "plain.py"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {said}")
    assert message.count("\n") == 1
    assert not list(project.rglob("*.ckpt"))
    _settings([*words, "--script", "train.py"]).keep()  # the folder can be used with another script


@pytest.mark.slow
def test_a_warning_of_a_run_stands_below_the_table(project, capsys):
    words = [*COMPARE, "--no_dense", "--methods", "MagnitudePruning: {every: 10}"]
    assert main(words) == 0
    warned = "MagnitudePruning reaches 75.0% zeros in 3 cuts"
    assert warned in " ".join(capsys.readouterr().out.split())
    table = (project / "runs/compare/own/table.md").read_text()
    assert "\n\nWarnings, in full in log.txt of each run's folder:\n- MagnitudePruning_every_10_-0.75-seed0: " + warned in table


@pytest.mark.slow
def test_a_killed_comparison_takes_its_runs_with_it_and_resumes(project):
    words = [*COMPARE, "--no_dense", "--model.wait", "0.3", "--trainer.max_epochs", "40"]
    command = [sys.executable, "-c", "import sys; from lightning_sparse.cli import main; sys.exit(main(sys.argv[1:]))", *words]
    every = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(command, env=os.environ | every, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = project / "runs/compare/own/MagnitudePruning-0.75-seed0"
    progress = folder / "progress.json"
    deadline = time.monotonic() + 240
    while not (folder / "resume.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    epochs = [json.loads(progress.read_text())["epoch"]]
    while len(epochs) < 2 or (epochs[-1] != epochs[-2] and len(epochs) < 12):  # the worker ends soon after the pipe does
        time.sleep(3.5)  # more than an epoch
        epochs.append(json.loads(progress.read_text())["epoch"])
    assert epochs[-1] == epochs[-2], epochs
    step = torch.load(folder / "resume.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 320
    run = next(iter(_settings(words).comparison()))
    assert main(words) == 0
    record = run.result()
    assert record is not None
    assert record["steps"] == 320
    assert record["zeros"] == 0.75
    log = (folder / "log.txt").read_text()
    assert "Restored all states from the checkpoint" in log


def _settings(words: list[str]) -> compare._Settings:
    args, overrides = compare._parser("compare").parse_known_args(words[1:])
    return compare._Settings(args, "compare", tuple(overrides))


@pytest.mark.slow
def test_each_run_of_a_path_starts_from_the_weights_of_the_last(project):
    words = ["path", "own.yaml", "--script", "train.py", "--lams", "1e-1", "1e-3", "--trainer.max_steps", "1"]
    assert main([*words, "--method", "AdaptiveProx"]) == 0
    folder = project / "runs/path/own"
    weak, strong = (line for line in _lines(folder))
    assert (float(weak["lam"]), float(strong["lam"])) == (1e-3, 1e-1)
    first, second = (
        torch.load(folder / f"AdaptiveProx-{lam}-seed0/final.ckpt", weights_only=True)["state_dict"] for lam in ("0.001", "0.1")
    )
    for name, w in first.items():  # AdamW's first step moves a weight by 1e-2 at most, before the prox shrinks it
        assert bool((second[name].abs() <= w.abs() + 0.011).all())
    assert (folder / "path.png").stat().st_size > 0


def test_a_path_trains_the_configurations_own_callback_if_it_takes_lam(project, capsys):
    penalty = "{class_path: MCP, init_args: {c: 0.5}}"
    own = f"AdaptiveProx, init_args: {{penalty: {penalty}, lam: 1.0e-2, freeze: 0.25}}"
    for sparsify, expected in ((own, "AdaptiveProx"), ("Sparsify, init_args: {target_sparsity: 0.9}", "ReweightedPenalty")):
        (project / "own.yaml").write_text(f"{CONFIG}\nsparsify: {{class_path: {sparsify}}}\n")
        args, _ = compare._parser("path").parse_known_args(["own.yaml", "--script", "train.py", "--lams", "1e-3"])
        (run,) = compare._Settings(args, "path", ()).path()
        assert run.method == expected
        assert run.callback is not None
        assert run.callback["class_path"].endswith(expected)
        assert run.callback["init_args"]["lam"] == 1e-3
        assert ("freeze" in run.callback["init_args"]) == (expected == "AdaptiveProx")
        assert f"path of {expected}, " in capsys.readouterr().out


@pytest.mark.slow
def test_slurm_runs_are_collected_by_submitit(project):
    pytest.importorskip("submitit")
    words = [*COMPARE, "--no_dense", "--engine", "slurm", "--engine_options", "{cluster: local, timeout_min: 10}"]
    assert main(words) == 0
    (line,) = _lines(project / "runs/compare/own")
    assert float(line["zeros"]) == 0.75
    assert list((project / "runs/compare/own/slurm").iterdir())


@pytest.mark.slow
def test_ray_runs_are_collected_by_tune(project):
    ray = pytest.importorskip("ray")
    words = [*COMPARE, "--no_dense", "--engine", "ray", "--engine_options", "{num_cpus: 2, include_dashboard: false}"]
    try:
        assert main(words) == 0
    finally:
        ray.shutdown()
    (line,) = _lines(project / "runs/compare/own")
    assert float(line["zeros"]) == 0.75


@pytest.mark.slow
def test_a_metric_that_is_not_logged_is_refused_before_training(project, capsys):
    (project / "own.yaml").write_text(CONFIG.replace("max_epochs: 4", "max_epochs: 100000"))  # would never end
    assert main([*COMPARE, "--metric", "val_accuracy"]) == 2
    said = capsys.readouterr().err
    assert "--metric val_accuracy is not logged; a trial of two batches logged val_acc; closest: 'val_acc'" in said
    assert [path.name for path in (project / "runs/compare/own").iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--targets", "90"], "--targets must lie in (0, 1), got 90.0; did you mean 0.9?"),
        (["--methods", "MagnitudPruning"], "closest: 'MagnitudePruning'"),
        (["--methods", "AdaptiveProx: {metrik: adam}"], "takes no 'metrik'; closest: 'metric'"),
        (["--methods", "BestAfterTarget"], "no sparsity callback"),
        (["--script", "none.py"], "no file 'none.py'"),
        (["--jobs", "0"], "at least 1"),
        (["--engine_options", "{a: 1}"], "the local engine takes none"),
        (["--seeds", "-1"], "whole numbers"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(project, capsys, words, said):
    assert main(["compare", "own.yaml", "--script", "train.py", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(project.rglob("*.ckpt"))


@pytest.mark.parametrize("script", [["--script", "train.py"], []])
@pytest.mark.parametrize("key", ["callbacks", "callbacks+"])
def test_a_sparsity_callback_beside_those_of_the_runs_is_refused(project, capsys, script, key):
    sparsify = "{class_path: lightning_sparse.callbacks.Sparsify, init_args: {target_sparsity: 0.9}}"
    listed = f"{{{key}: [{{class_path: LearningRateMonitor}}, {sparsify}]}}"
    Path("more.yaml").write_text(f"trainer: {listed}")
    name = "own.yaml" if script else "digits"
    for verb in (["compare"], ["path", "--lams", "1e-3"]):
        assert main([verb[0], name, *verb[1:], *script, "--config", "more.yaml"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: trainer.callbacks of more.yaml has lightning_sparse.callbacks.Sparsify, which every run of")
        assert said.endswith("take it out\n" if script else f"take it out, or move it to the key sparsify, which {verb[0]} replaces\n")
    assert not Path("runs").exists()


def test_classes_that_only_a_script_fixes_are_asked_for_before_anything_is_trained(project, capsys):
    (project / "own.yaml").write_text(f"{CONFIG}\nmodel: {{width: 8}}\n")
    for words in (["compare", "own.yaml"], ["path", "own.yaml", "--lams", "1"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "own.yaml: model names no class" in said
        assert "--script SCRIPT" in said
        assert "model: {class_path: my_module.MyModel, init_args: {width: 8}}" in said
    assert not (project / "runs").exists()
    settings = _settings(["compare", "own.yaml", "--model", "train.Net"])
    settings.check_classes()  # named on the command line


def test_a_folder_in_which_nothing_was_trained_can_be_used_with_other_settings(project):
    _settings([*COMPARE, "--model.width", "8"]).keep()
    folder = project / "runs/compare/own/dense-seed0"
    folder.mkdir()
    (folder / "overlay.yaml").write_text("")
    (folder / "failed.txt").write_text("a wrong metric")
    _settings([*COMPARE, "--model.width", "9"]).keep()
    (folder / "failed.txt").unlink()  # a run that is trained, or was interrupted
    with pytest.raises(UsageError, match=r"holds runs with other overrides and other --threads; choose another folder"):
        _settings([*COMPARE, "--threads", "2"]).keep()


def test_an_engine_that_is_not_installed_is_named(project, capsys, monkeypatch):
    for engine, extra in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, extra, None)
        assert main([*COMPARE, "--engine", engine]) == 2
        assert f"lightning-sparse[{engine}]" in capsys.readouterr().err


def test_a_method_gets_the_recipes_penalty_unless_it_names_its_own():
    own = {"class_path": "MCP", "init_args": {"c": 0.5}}
    assert methods.described("AdaptiveProx", own, {"lam": 1e-3}) == {
        "class_path": "lightning_sparse.callbacks.AdaptiveProx",
        "init_args": {"penalty": own, "lam": 1e-3},
    }
    other = methods.described("AdaptiveProx: {penalty: {class_path: L1}, metric: plain}", own, {"lam": 1e-3})
    assert other["init_args"] == {"penalty": {"class_path": "L1"}, "metric": "plain", "lam": 1e-3}
    for sets_none in ("MagnitudePruning", "Sparsify"):
        assert methods.described(sets_none, own, {"target_sparsity": 0.9})["init_args"] == {"target_sparsity": 0.9}
    assert {"metric", "exact", "select", "target_sparsity"} <= methods.arguments_of(AdaptiveProx).keys()
    assert "target_sparsity" in methods.arguments_of(MagnitudePruning)


def test_the_configurations_callback_keeps_its_arguments_and_others_take_which_weights_may_become_zero(project, capsys, planned):
    sparsify = "{class_path: Sparsify, init_args: {target_sparsity: 0.5, structure: Rows, select: ['*.3.weight'], freeze: 0.4}}"
    (project / "own.yaml").write_text(f"{MLP_ON_DIGITS[:-1]}, sparsify: {sparsify}}}")
    methods = ["Sparsify", "Sparsify: {freeze: 0.2}", "VariationalDropout", "MagnitudePruning: {structure: Columns}"]
    assert main(["compare", "own.yaml", "--targets", "0.8", "--methods", *methods]) == 2
    of_all = {"target_sparsity": 0.8, "select": ["*.3.weight"]}
    own = [of_all | {"structure": "Rows", "freeze": freeze} for freeze in (0.4, 0.2)]
    assert arguments(planned) == [*own, *(of_all | {"structure": structure} for structure in ("Rows", "Columns"))]
    said = capsys.readouterr().out
    assert "\nSparsify takes over from sparsify in the configuration: structure, select, freeze\n" in said
    assert "\nSparsify: {freeze: 0.2} takes over from sparsify in the configuration: structure, select\n" in said
    assert "\nVariationalDropout takes over from sparsify in the configuration: structure, select; not freeze: give" in said
    assert "\nMagnitudePruning: {structure: Columns} takes over from sparsify in the configuration: select; not freeze" in said
    (project / "own.yaml").write_text((project / "own.yaml").read_text().replace("target_sparsity: 0.5", "target_sparsity: null"))
    assert main(["compare", "own.yaml", "--targets", "0.8", "--methods", "Sparsify", "VariationalDropout"]) == 2
    assert arguments(planned) == 2 * [of_all | {"structure": "Rows"}]  # freeze was chosen for another kind of strength
    assert "every method takes over from sparsify in the configuration: structure, select; not freeze" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["a second file", "a script's configuration"])
def test_the_dense_run_has_no_callback_wherever_the_configuration_sets_it(place, project, planned):
    own = "sparsify: {class_path: Sparsify, init_args: {target_sparsity: 0.5}}"
    words = ["compare", "own.yaml", "--targets", "0.8", "--methods", "Sparsify"]
    if place == "a second file":
        (project / "own.yaml").write_text(MLP_ON_DIGITS)
        (project / "over.yaml").write_text(own)
        words += ["--config", "over.yaml"]
    else:
        (project / "own.yaml").write_text(f"{MLP_ON_DIGITS[:-1]}, {own}}}")
        (project / "mine.py").write_text("from lightning_sparse.cli import SparseCLI\nSparseCLI()\n")
        words += ["--script", "mine.py"]
    assert main(words) == 2
    assert [run.method for run in planned] == ["dense", "Sparsify"]
    assert all(run.words()[-2:] == ["--sparsify", "null"] for run in planned)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--sparsify.freeze", "0.25"],
            "--sparsify.freeze would set the callback that compare replaces: give it as --methods 'Name: {freeze: ...}'",
        ),
        (["--sparsify", "Sparsify"], "--sparsify would set the callback that compare replaces"),
        (["--methods", "Sparsifier"], "no sparsity callback 'Sparsifier'"),
        (["--methods", "{1: {}}"], "a method is a class name"),
        (
            ["--methods", "Sparsify: {target_sparsity: 0.5}"],
            "target_sparsity of Sparsify cannot be given here: --targets sets the strength",
        ),
        (["--methods", "Sparsify: {least_kept: 0.1}", "--targets", "0.95", "0.8"], "least_kept"),
    ],
)
def test_words_that_would_be_dropped_or_fail_later_are_refused_first(words, said, project, capsys):
    (project / "own.yaml").write_text(MLP_ON_DIGITS)
    assert main(["compare", "own.yaml", "--targets", "0.8", *words]) == 2
    assert said in capsys.readouterr().err


def test_path_gives_its_own_callback_the_arguments_of_a_lam_alone(project, capsys, planned):
    for strength, kept in (("lam: 0.001", {"freeze": 0.4}), ("target_sparsity: 0.9", {})):
        init_args = f"{{penalty: {{class_path: L1}}, {strength}, freeze: 0.4, select: ['*.0.weight']}}"
        own = f"sparsify: {{class_path: AdaptiveProx, init_args: {init_args}}}"
        (project / "own.yaml").write_text(f"{MLP_ON_DIGITS[:-1]}, {own}}}")
        for words in ([], ["--method", "AdaptiveProx"]):
            assert main(["path", "own.yaml", "--lams", "0.1", *words]) == 2
            assert arguments(planned)[0] == {"penalty": {"class_path": "L1"}, "lam": 0.1, "select": ["*.0.weight"]} | kept
            assert ("not freeze: give what a method needs as --method 'Name: {freeze: ...}'" in capsys.readouterr().out) is not bool(kept)
    (project / "own.yaml").write_text(f"{MLP_ON_DIGITS[:-1]}, sparsify: AdaptiveProx}}")
    assert main(["path", "own.yaml", "--lams", "0.1"]) == 2
    assert arguments(planned)[-1]["penalty"]["class_path"].endswith("LogSum")


def _cell(method: str, setting: float | None, *values: float) -> results.Cell:
    return results.Cell(method, setting, list(values), [setting or 0.0] * len(values), [1.0] * len(values), [])


def test_warnings_of_the_runs_are_footnotes_once_each():
    described = [runs.Run(f"a/M-{target}-seed0", "own.yaml", "M", target, 0) for target in (0.9, 0.95)]
    records = [{"warnings": [f"M has left at most one weight of ['{name}']", "M is odd"][:n]} for name, n in (("x", 2), ("y", 1))]
    assert results.footnotes(described, records) == [
        "M-0.9-seed0, M-0.95-seed0: M has left at most one weight of ['x']",
        "M-0.9-seed0: M is odd",
    ]
    assert results.footnotes(described, [{"failed": "x"}, {}]) == []


def test_the_best_mean_is_bold_and_the_dense_run_is_not():
    table = results.markdown([_cell("dense", None, 0.99), _cell("a", 0.9, 0.5, 0.7), _cell("b", 0.9, 0.55, 0.6)], "val_acc", "target", True)
    lines = table.splitlines()
    assert "| 0.9900 |" in lines[2]
    assert "**0.6000 (0.1414)**" in lines[3]
    assert "**" not in lines[4]
    assert "**" in results.markdown([_cell("a", 0.9, 0.5), _cell("b", 0.9, 0.4)], "val_loss", "target", False).splitlines()[3]
    assert not table.endswith(results.NO_SPREAD)
    single = results.markdown([_cell("dense", None, 0.9), _cell("a", 0.9, 0.5)], "val_loss", "target", False)
    assert single.endswith("|\n\none seed: no spread is known")


def test_methods_that_tie_are_all_bold_and_a_reason_that_is_cut_ends_in_dots():
    cells = [_cell("a", 0.9, 0.50001), _cell("b", 0.9, 0.5), _cell("c", 0.9, 0.4), _cell("d", 0.9)._replace(failed=["word " * 50])]
    lines = results.markdown(cells, "val_acc", "target", True).splitlines()[2:6]
    assert ["**0.5000**" in line for line in lines] == [True, True, False, False]
    assert "word ... |" in lines[3]


def test_the_metric_is_a_validation_accuracy_if_there_is_one():
    record = {"metrics": {"train_acc": 1.0, "val_loss": 0.1, "val/accuracy": 0.9}}
    assert results.metric_of([record], None) == "val/accuracy"
    assert results.metric_of([{"metrics": {"val_loss": 0.1}}], None) == "val_loss"
    assert (results.rises("val/accuracy"), results.rises("val_loss"), results.rises("val_loss", "max")) == (True, False, True)
    assert not results.rises("val_recall_loss")
    assert not results.rises("val/mape")


def test_the_reason_of_a_failure_is_one_line():
    trace = "Traceback (most recent call last):\n  File x\nValueError: it is wrong\n  note"
    assert runs.reason_in(trace, 1) == "ValueError: it is wrong (exit code 1)"
    assert runs.reason_in("Note: fine\nerror: no recipe 'x'\n", 2) == "no recipe 'x'"
    assert runs.reason_in("", -9) == "killed by SIGKILL"


def test_files_of_a_command_become_absolute_and_recipes_stay(project):
    words = ["--config", "own.yaml", "--config=own.yaml", "-c", "digits", "--trainer.max_epochs", "3"]
    file = project / "own.yaml"
    assert recipes.with_absolute(words) == ["--config", str(file), f"--config={file}", "-c", "digits", "--trainer.max_epochs", "3"]


# -- sweep -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_file_gives_commands_that_the_program_accepts(project, capsys):
    words = ["sweep", "digits", "--search", "grid", "--lam", "1e-3", "3e-3", "--eps", "0.5", "--callbacks", "AdaptiveProx"]
    assert main([*words, "--metric", "val/accuracy", "--trainer.logger", "false"]) == 0
    said = capsys.readouterr().out
    assert "the YAML needs a WandbLogger" in said
    assert said.endswith("wandb agent ID      # in a shell that finds lightning-sparse on its PATH\n")
    file = yaml.safe_load(Path("sweep.yaml").read_text())
    assert file["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    assert file["parameters"]["sparsify.init_args.lam"] == {"values": [1e-3, 3e-3]}
    program, verb, *command = [word for word in file["command"] if word not in ("${env}", "${args}")]
    assert (program, verb) == ("lightning-sparse", "fit")
    chosen = [f"--{name}={one['values'][-1]}" for name, one in sorted(file["parameters"].items())]  # as wandb agent writes them
    config, *rest = [word for word in command if word != "--config"]
    assert main(["check", config, *rest, *chosen]) == 0
    said = capsys.readouterr().out
    assert "AdaptiveProx" in said
    assert "0.003" in said


@pytest.mark.slow
def test_a_sweep_has_log_uniform_strengths_and_uniform_shares(project, capsys):
    assert main(["sweep", "digits", "--lam", "1e-4", "1e-2", "--freeze", "0.2", "0.6", "--runs", "20", "--metric", "val/loss"]) == 0
    assert "needs a WandbLogger" not in capsys.readouterr().out
    file = yaml.safe_load(Path("sweep.yaml").read_text())
    assert file["parameters"]["sparsify.init_args.lam"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    assert file["parameters"]["sparsify.init_args.freeze"]["distribution"] == "uniform"
    assert (file["metric"]["goal"], file["run_cap"]) == ("minimize", 20)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to search"),
        (["--target", "0.8"], "has one value; give two bounds, such as --target 0.8 0.95"),
        (["--lam", "1e-3", "1e-2", "1e-1"], "needs two different bounds"),
        (["--lam", "0", "1"], "must be > 0"),
        (["--target", "80", "95"], "--target must lie in (0, 1), got 80.0; did you mean 0.8?"),
        (["--freeze", "0.5", "1"], "--freeze must lie in [0, 1)"),
        (["--lam", "0.1", "1", "--callbacks", "AdaptiveProx", "Sparsify"], "--lam: Sparsify takes no 'lam'; give --target"),
        (["--eps", "0.1", "1", "--callbacks", "MagnitudePruning"], "--eps: MagnitudePruning takes no 'penalty'"),
    ],
)
def test_a_sweep_without_a_search_space_is_refused(project, capsys, words, said):
    assert main(["sweep", "digits", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("sweep.yaml").exists()


MINE = (
    f"{CONFIG}\nmodel: {{class_path: train.Net}}\ndata: {{class_path: train.Data}}\n"
    "sparsify: {class_path: Sparsify, init_args: {target_sparsity: 0.9}}\n"
)
OVERLAY = "trainer: {callbacks: [{class_path: lightning_sparse.callbacks.Sparsify, init_args: {target_sparsity: 0.9}}]}\n"


def _commands(script: str | None = None) -> list[list[str]]:
    """Return the words after the program of one run for each callback of sweep.yaml, as wandb agent writes them."""
    file = yaml.safe_load(Path("sweep.yaml").read_text())
    words = file["command"]
    first = {name: one["values"][0] if "values" in one else one["min"] for name, one in file["parameters"].items()}
    forms = file["parameters"].get("sparsify", {}).get("values", [None])
    runs = [sorted((first | ({"sparsify": form} if form else {})).items()) for form in forms]
    return [[*words[words.index("fit") : -1], *(f"--{name}={value}" for name, value in one)] for one in runs]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--callbacks", "Sparsify", "MagnitudePruning", "HardConcrete"]])
def test_every_run_of_a_sweep_over_targets_trains_and_the_metric_is_the_modules_own(project, capsys, monkeypatch, more):
    monkeypatch.syspath_prepend(str(project))
    Path("my.yaml").write_text(MINE)
    assert main(["sweep", "my.yaml", "--target", "0.8", "0.95", *more]) == 0
    assert yaml.safe_load(Path("sweep.yaml").read_text())["metric"] == {"name": "val_acc", "goal": "maximize"}
    for words in _commands():
        assert not any(word.endswith("=null") for word in words)
        assert main(["check", *words[2:]]) == 0


@pytest.mark.slow
def test_the_strength_of_the_configuration_is_unset_where_there_is_one(project):
    words = ["sweep", "digits", "--target", "0.8", "0.9", "--callbacks", "AdaptiveProx", "Sparsify", "--metric", "val/accuracy"]
    assert main(words) == 0
    for words in _commands():
        assert "--sparsify.init_args.lam=null" in words
        assert main(["check", *words[2:]]) == 0


def test_a_target_of_the_configuration_is_unset_where_lam_is_varied(project, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(project))
    penalty = "init_args: {penalty: {class_path: LogSum, init_args: {eps: 2.0}}, "
    Path("my.yaml").write_text(MINE.replace("Sparsify", "AdaptiveProx").replace("init_args: {", penalty))
    assert main(["sweep", "my.yaml", "--lam", "1e-4", "1e-2", "--metric", "val_acc"]) == 0
    for words in _commands():
        assert "--sparsify.init_args.target_sparsity=null" in words
        assert main(["check", *words[2:]]) == 0
    assert main(["sweep", "my.yaml", "--lam", "1e-4", "1e-2", "--target", "0.8", "0.9"]) == 2
    assert "--lam and --target together: with a target lam only bounds its search" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_of_a_users_script_is_tried_before_it_is_written(project, capsys):
    Path("overlay.yaml").write_text(OVERLAY)
    words = ["sweep", "own.yaml", "--script", "train.py", "--config", "overlay.yaml", "--target", "0.8", "0.95"]
    assert main([*words, "--metric", "val_ac"]) == 2
    assert "--metric val_ac is not logged; a trial of two batches logged val_acc; closest: 'val_acc'" in capsys.readouterr().err
    assert main([*words, "--model.widht", "8"]) == 2
    assert "a run of this sweep fails, with --config overlay.yaml --model.widht 8" in capsys.readouterr().err
    assert not Path("sweep.yaml").exists()
    assert main(words) == 0
    (run,) = _commands()
    assert [word for word in run if word.endswith(".yaml")] == [str(project / "own.yaml"), str(project / "overlay.yaml")]
    done = subprocess.run([sys.executable, "train.py", *run, "--trainer.fast_dev_run", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_sweep_in_which_a_run_would_fail_is_refused(project, capsys):
    assert main(["sweep", "digits", "--lam", "1e-3", "1e-2", "--eps", "0.5", "2", "--callbacks", "AdaptiveProx", "HardConcrte"]) == 2
    said = capsys.readouterr().err
    assert "a run of this sweep would fail, with --sparsify=HardConcrte" in said
    assert "'HardConcrete'" in said
    assert not Path("sweep.yaml").exists()
    Path("sparsify.yaml").write_text("sparsify: {class_path: Sparsify, init_args: {target_sparsity: 0.9}}")
    varied = ["sweep", "digits", "--config", "sparsify.yaml", "--callbacks", "Sparsify", "AdaptiveProx"]
    assert main(varied) == 2
    said = capsys.readouterr().err
    assert "AdaptiveProx needs 'penalty', such as `{class_path: AdaptiveProx, init_args: {penalty: {class_path: LogSum, " in said
    assert said.endswith("}}` under sparsify in the YAML\n")  # a flag would be one of Sparsify too


CALLBACKS = {
    "": "it has no callback",
    "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint}]}": "its last callback is lightning.pytorch",
    "trainer: {callbacks+: {class_path: ModelCheckpoint}}": "its last callback is ModelCheckpoint",
}


@pytest.mark.parametrize("overlay", CALLBACKS)
def test_a_script_without_a_sparsity_callback_to_vary_is_refused(project, capsys, overlay):
    Path("overlay.yaml").write_text(overlay or "seed_everything: 0")
    assert main(["sweep", "own.yaml", "--script", "train.py", "--config", "overlay.yaml", "--lam", "1e-3", "1e-2"]) == 2
    said = capsys.readouterr().err
    assert f"own.yaml: no sparsity callback at the end of trainer.callbacks ({CALLBACKS[overlay]}" in said
    needed = yaml.safe_load(said.partition("`")[2].partition("`")[0])["trainer"]["callbacks+"]
    assert needed[0]["class_path"] == "lightning_sparse.callbacks.ReweightedPenalty"  # which has the lam to vary
    for accepted in ("lightning_sparse.callbacks.Sparsify", "Sparsify", "elsewhere.Own"):
        sweep._check_last(accepted, argparse.Namespace(config="own.yaml", script="train.py", lam=None, eps=None))


@pytest.mark.parametrize(
    "words", [["--lam", "1e-4", "1e-2"], ["--eps", "0.5", "2"], ["--target", "0.8", "0.9"], ["--freeze", "0.2", "0.5"]]
)
def test_the_callback_that_the_message_proposes_has_the_arguments_to_vary(project, monkeypatch, capsys, words):
    monkeypatch.syspath_prepend(str(project))
    file = Path("my.yaml")
    file.write_text(MINE.partition("sparsify")[0])
    assert main(["sweep", "my.yaml", *words]) == 2
    proposed = capsys.readouterr().err.partition("`")[2].partition("`")[0]
    file.write_text(f"{file.read_text()}{proposed}\n")
    assert main(["sweep", "my.yaml", *words, "--metric", "val_acc"]) == 0


def test_a_configuration_without_a_callback_is_told_which_lines_it_needs(project, capsys):
    assert main(["sweep", "own.yaml", "--target", "0.8", "0.95"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    needed = said.partition("`")[2].partition("`")[0]
    assert yaml.safe_load(needed) == {"sparsify": {"class_path": "Sparsify", "init_args": {"target_sparsity": 0.9}}}


def test_a_finished_run_of_other_arguments_is_not_taken_for_this_one(project, capsys, planned):
    (project / "own.yaml").write_text(MLP_ON_DIGITS)
    words = ["compare", "own.yaml", "--targets", "0.8", "--methods", "Sparsify"]
    assert main(words) == 2
    dense, sparse = planned
    for run in (dense, sparse):
        run.begin()
        (run.path / "metrics.json").write_text("{}")
    assert main(words) == 2
    assert "stopped" in capsys.readouterr().err
    overlay = sparse.path / "overlay.yaml"
    overlay.write_text(overlay.read_text().replace("target_sparsity: 0.8", "target_sparsity: 0.75"))
    assert main(words) == 2
    assert f"{sparse.path} holds a finished run of Sparsify with other arguments; choose another folder" in capsys.readouterr().err
