"""Invalid checkpoints on the command line, and failing runs: one-line message, exit code, previous files intact."""

from __future__ import annotations

import copy
import errno
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PLAIN, QUIET, SHORT, answer, refused
from lightning.pytorch import Trainer

import lightning_sparse
from lightning_sparse import export, save_shrunk, shrink
from lightning_sparse.cli import checkpoints, main
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.examples.digits import Digits
from lightning_sparse.examples.mlp import MLP

pytestmark = [pytest.mark.slow, *QUIET]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main(["fit", "--config", "digits", *PLAIN, "--trainer.default_root_dir", str(folder)]) == 0
    return next(folder.rglob("*.ckpt"))


def changed(whole: Path, key: str, change: object) -> str:
    """Copy the file with the entry at a dotted key replaced, or deleted if None."""
    content = copy.deepcopy(torch.load(whole, weights_only=True))
    *path, last = [next(k for k in content["callbacks"] if "Reweighted" in k) if part == "FORM" else part for part in key.split("/")]
    inner = content
    for part in path:
        inner = inner[part]
    if change is None:
        del inner[last]
    else:
        inner[last] = change
    torch.save(content, "changed.ckpt")
    return "changed.ckpt"


CHANGED = {
    "no weights": ("state_dict", None, ["changed.ckpt: not a checkpoint of a LightningModule", "not 'state_dict'"]),
    "no version": ("pytorch-lightning_version", None, ["not a checkpoint written by a Trainer"]),
    "weights only": ("optimizer_states", None, ["lacks ['optimizer_states']", "save_weights_only=True"]),
    "another shape": ("state_dict/layers.1.weight", torch.ones(3, 3), ["of another model", "layers.1.weight (3, 3) instead of (300, 64)"]),
    "a missing weight": ("state_dict/layers.1.weight", None, ["of another model", "lacks layers.1.weight"]),
    "one weight more": ("state_dict/other.weight", torch.ones(3), ["of another model", "has extra weights other.weight"]),
    "our step": ("callbacks/FORM/step", "x", ["'step' must be a whole number >= 0, got 'x'"]),
    "our weights": ("callbacks/FORM/taken", [1], ["'taken' must be a dict of finite"]),
    "callbacks": ("callbacks", [1], ["'callbacks' must be a dict by state key, got [1]"]),
    "hyper_parameters": ("hyper_parameters", 3, ["'hyper_parameters' must be a dict, got 3"]),
    "a hyper_parameter": ("hyper_parameters/sizes", "x", ["hyper_parameters of --ckpt_path"]),
    "an object": ("extra", Path("x"), ["pathlib", "may run code when loaded"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_changed_checkpoints(case: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, change, expected = CHANGED[case]
    message = refused(capsys, "fit", "--config", "digits", *SHORT, "--ckpt_path", changed(whole, key, change))
    for part in expected:
        assert part in message


def test_a_plain_state_dict_is_told_what_takes_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.load(whole, weights_only=True)["state_dict"], "dense.pt")
    message = refused(capsys, "report", "dense.pt", "--config", "digits")
    assert message.startswith("error: dense.pt: a plain state_dict, not a checkpoint of a LightningModule")
    for way in ("module.load_state_dict(torch.load(FILE))", "lightning_sparse.shrink(module,", "Trainer.save_checkpoint"):
        assert way in message


class Settings(dict):  # type: ignore[type-arg]
    """Arguments of a user's module, of a class that a command cannot import."""


def test_objects_beside_the_weights_are_no_obstacle_where_only_the_weights_are_used(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(whole, weights_only=True)
    content["hyper_parameters"] |= {"act": torch.nn.ReLU(), "kind": torch.nn.ReLU, "file": Path("x"), "call": partial(max, 3)}
    torch.save(content, "own.ckpt")
    assert main(["report", "own.ckpt", "--config", "digits"]) == 0
    assert "of 50,200 weights in 3 matrices" in capsys.readouterr().out
    said = refused(capsys, "test", "--config", "digits", "--ckpt_path", "own.ckpt")
    assert "which may run code when loaded; if you trust the file, give --weights_only false" in said
    trusted = ["test", "--config", "digits", "--trainer.logger", "false", "--ckpt_path", "own.ckpt", "--weights_only", "false"]
    assert "in Python: Trainer.fit(..., weights_only=False)" in refused(capsys, *trusted)
    del content["hyper_parameters"]["_class_path"]  # as a plain Trainer saves them
    torch.save(content, "own.ckpt")
    assert main(trusted) == 0
    content["hyper_parameters"]["own"] = Settings(a=1)
    torch.save(content, "dict.ckpt")
    torch.save(torch.nn.Linear(2, 2), "whole.pt")
    for file in ("dict.ckpt", "whole.pt"):
        said = refused(capsys, "report", file, "--config", "digits")
        assert "MyModule.load_from_checkpoint(FILE, weights_only=False)" in said


def run_it() -> str:
    """Leave a trace, called while a file is loaded."""
    Path("ran").touch()
    return "ran"


def test_a_file_whose_objects_would_run_code_runs_none(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Writes:
        def __reduce__(self) -> Any:
            return run_it, ()

    torch.save(torch.load(whole, weights_only=True) | {"extra": Writes()}, "bad.ckpt")
    assert main(["report", "bad.ckpt", "--config", "digits"]) == 0
    assert not Path("ran").exists()
    torch.load("bad.ckpt", weights_only=False)
    assert Path("ran").exists()


def test_files_for_use_in_python_are_named_with_the_call_that_loads_them(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, x = MLP([64, 300, 100, 10]), torch.zeros(2, 8, 8)
    network.load_state_dict(torch.load(whole, weights_only=True)["state_dict"])
    export.save_compact(network, "net.safetensors")
    with torch.no_grad():
        network.layers[1].weight[:100] = network.layers[1].bias[:100] = 0
    save_shrunk(shrink(network, x), "small")
    torch.export.save(torch.export.export(network, (x,)), "small/model.pt2")
    for file, call in (
        ("net.safetensors", "lightning_sparse.export.load_compact('net.safetensors')"),
        ("small", "lightning_sparse.load_shrunk('small', MyModule)"),
        ("small/model.pt", "lightning_sparse.load_shrunk('small', MyModule)"),
        ("small/model.pt2", "torch.export.load('small/model.pt2').module()"),
    ):
        message = refused(capsys, "report", file, "--config", "digits")
        assert message.startswith(f"error: {file}: ")
        assert call in message
        loaded = eval(call, {"lightning_sparse": lightning_sparse, "torch": torch, "MyModule": MLP})
        if file == "net.safetensors":
            network.load_state_dict(loaded)
            loaded = network
        assert loaded(torch.zeros(2, 8, 8)).shape == (2, 10)
    said = refused(capsys, "test", "--config", "digits", "--ckpt_path", "net.safetensors")
    assert said.startswith("error: net.safetensors: a compact file")


def test_the_report_of_a_cut_file_speaks_of_no_resumed_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cut.ckpt").write_bytes(whole.read_bytes()[:5000])
    message = refused(capsys, "report", "cut.ckpt", "--config", "digits")
    assert "cut.ckpt is damaged" in message
    assert "resume" not in message


LATER = {
    "changed weights": ("state_dict/layers.1.weight", torch.ones(300, 64), ["changed.ckpt: the checkpoint keeps", "0 zeros there"]),
    "another optimiser": ("optimizer_states", [3], ["changed.ckpt cannot be loaded here"]),
    "no loops": ("loops", {}, ["changed.ckpt cannot be loaded here", "fit_loop"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_errors_raised_by_the_trainer_are_one_line_too(case: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, change, expected = LATER[case]
    message = answer(capsys, 2, "fit", "--config", "digits", *PLAIN, "--ckpt_path", changed(whole, key, change))
    for part in expected:
        assert part in message
    assert len(message.splitlines()) == 1


def test_a_missing_checkpoint(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(whole.with_name("epoch=1-step=7.ckpt"))
    assert f"closest: {str(whole)!r}" in refused(capsys, "fit", "--config", "digits", *SHORT, "--ckpt_path", other)
    assert "no checkpoint 'a.ckpt'" in refused(capsys, "test", "--config", "digits", "--ckpt_path", "a.ckpt")


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_cut_file_and_a_flipped_bit_for_every_verb(verb: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = whole.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 4
    for name, content in (("cut", raw[:1000]), ("flipped", bytes(flipped)), ("empty", b""), ("text", b"hello world")):
        Path(f"{name}.ckpt").write_bytes(content)
        message = refused(capsys, verb, "--config", "digits", "--ckpt_path", f"{name}.ckpt")
        assert f"{name}.ckpt" in message
        assert "damaged" in message


def test_a_file_cut_at_any_of_20_places_is_named(whole: Path, tmp_path: Path) -> None:
    raw, path = whole.read_bytes(), tmp_path / "cut.ckpt"
    for i in range(20):
        path.write_bytes(raw[: i * len(raw) // 20])
        with pytest.raises(UsageError, match=r"cut\.ckpt.*damaged"):
            checkpoints.read(path)
    assert checkpoints.read(whole)["global_step"] == 6


@pytest.mark.filterwarnings("ignore:ReweightedPenalty continues for 9 optimiser steps in all")
def test_a_whole_file_is_resumed_and_tested(whole: Path) -> None:
    longer = [*PLAIN, "--trainer.max_epochs", "3", "--trainer.default_root_dir", "more"]
    assert main(["fit", "--config", "digits", *longer, "--ckpt_path", str(whole)]) == 0
    assert torch.load(next(Path("more").rglob("*.ckpt")), weights_only=True)["global_step"] == 9
    assert main(["test", "--config", "digits", "--trainer.logger", "false", "--ckpt_path", str(whole)]) == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a plain Trainer: its hyper_parameters name no class."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(MLP(sizes=[64, 8, 10]), datamodule=Digits())
    trainer.save_checkpoint(path)
    assert "_class_path" not in torch.load(path, weights_only=True)["hyper_parameters"]
    return str(path)


def test_a_file_of_a_plain_trainer_is_tested_and_resumed_with_the_models_class_in_the_configuration(plain: str) -> None:
    words = ["--config", "digits", "--trainer.logger", "false", "--model.sizes", "[64, 8, 10]", "--ckpt_path", plain]
    assert main(["test", *words]) == 0
    assert main(["fit", *words, *PLAIN, "--sparsify", "null", "--trainer.default_root_dir", "more"]) == 0


def test_a_file_of_a_plain_trainer_with_other_sizes_or_of_another_class_is_another_model(
    plain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "test", "--config", "digits", "--trainer.logger", "false", "--ckpt_path", plain)
    assert "plain.ckpt: a checkpoint of another model: it lacks layers.5.bias" in message
    assert "saved with sizes [64, 8, 10] instead of [64, 300, 100, 10]" in message
    other = ["--config", "digits", "--trainer.logger", "false", "--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
    for verb in ("test", "fit"):
        message = refused(capsys, verb, *other, "--ckpt_path", plain)
        assert "plain.ckpt: a checkpoint of another model: it lacks layer.bias" in message


def test_a_file_of_fit_of_another_class_does_not_replace_the_configurations(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--trainer.logger", "false", "--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
    assert "a checkpoint of another model: it lacks layer.bias" in refused(capsys, "test", *other, "--ckpt_path", str(whole))


# -- runs that fail ---------------------------------------------------------------------------------------------------------

DATA = """
from lightning_sparse.examples.digits import Digits


class Spoiled(Digits):
    def setup(self, stage):
        super().setup(stage)
        self.parts["training"][0][500] = float("nan")


class Missing(Digits):
    def setup(self, stage):
        open("no_such_file.csv")


class Bug(Digits):
    def setup(self, stage):
        raise KeyError("a bug of the user's")
"""


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_data", raising=False)


FAILURES = {
    "NaN in the data": (["--data", "own_data.Spoiled"], ["the loss is nan at optimiser step", "those before this batch"]),
    "a rate far too large": (["--model.lr", "1e30", "--trainer.max_epochs", "9"], ["the loss is nan at optimiser step"]),
    "a file of the user's": (["--data", "own_data.Missing"], ["FileNotFoundError", "no_such_file.csv"]),
}  # fmt: skip


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_run_says_so_in_one_line_with_exit_code_1(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = FAILURES[case]
    message = answer(capsys, 1, "fit", "--config", "digits", *PLAIN, *words)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.usefixtures("own_data")
def test_a_bug_in_the_users_code_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="a bug of the user's"):
        main(["fit", "--config", "digits", *PLAIN, "--data", "own_data.Bug"])


def test_a_full_disk_leaves_the_files_before_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.io import torch_io

    saved = []

    def save(content: object, path: object) -> None:
        saved.append(path)
        if len(saved) == 3:
            Path(str(path)).touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        torch.save(content, str(path))

    monkeypatch.setattr(torch_io, "_atomic_save", save)
    words = [
        "--trainer.max_epochs",
        "5",
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.callbacks",
        "ModelCheckpoint",
        "--trainer.callbacks.save_top_k",
        "-1",
    ]
    message = answer(capsys, 1, "fit", "--config", "digits", *PLAIN, *words)
    assert "No space left on device" in message
    assert len(saved) == 3
    for path in saved[:2]:
        assert "state_dict" in torch.load(path, weights_only=True)
    assert main(["fit", "--config", "digits", *PLAIN, "--ckpt_path", str(saved[1]), "--trainer.max_epochs", "3"]) == 0


def test_a_form_that_meets_its_limits_in_training_is_refused_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    message = answer(capsys, 2, "fit", "--config", "digits", *PLAIN, "--trainer.max_epochs", "-1", "--trainer.max_steps", "-1")
    assert "give the Trainer max_epochs or max_steps" in message
