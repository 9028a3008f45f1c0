"""report, shrink and export with a user's training script in the place of a configuration with classes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import QUIET, refused
from lightning.pytorch import Trainer

from lightning_sparse.cli import main, scripted, worth
from lightning_sparse.cli.errors import UsageError

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")]
MODULES = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Net(LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
    def forward(self, x): return self.body(x)
    def training_step(self, batch, _):
        raise AssertionError("nothing is to be trained")
    def test_step(self, batch, _):
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)

class Data(LightningDataModule):
    def train_dataloader(self): return DataLoader(TensorDataset(torch.randn(32, 8), torch.zeros(32)), 8)
    def test_dataloader(self): return self.train_dataloader()
"""
SCRIPTS = {
    "fixed classes": "from lightning.pytorch.cli import LightningCLI\nLightningCLI(Net, Data)",
    "SparseCLI": "from lightning_sparse.cli import SparseCLI\nSparseCLI(Net, Data)",
    "a data module": "from lightning.pytorch import Trainer\nTrainer(logger=False).fit(Net(24), datamodule=Data())",
    "a data module by position": "from lightning.pytorch import Trainer\nTrainer(logger=False).fit(Net(24), Data())",
    "loaders": "from lightning.pytorch import Trainer\nTrainer(logger=False).fit(Net(24), Data().train_dataloader())",
}
CONFIG = {"model": {"width": 24}, "data": {}, "trainer": {"accelerator": "cpu", "enable_checkpointing": False}, "seed_everything": 0}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(worth, "_SECONDS", 0.1)
    Path("run").mkdir()
    layers = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Linear(24, 2))
    with torch.no_grad():
        layers[0].weight[:16], layers[0].bias[:16] = 0, 0
    state = {f"body.{name}": w.detach() for name, w in layers.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, "run/net.ckpt")


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.slow
def test_a_script_gives_the_model_and_the_data(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text(f"{MODULES}\nif __name__ == '__main__':\n    " + SCRIPTS[kind].replace("\n", "\n    "))
    if "CLI" in SCRIPTS[kind]:
        Path("run/config.yaml").write_text(yaml.safe_dump(CONFIG))
    fit = Trainer.fit
    assert main(["shrink", "run/net.ckpt", "--script", "train.py", "--out", "small"]) == 0
    shown = capsys.readouterr().out
    assert "neurons of body.0" in shown
    assert ("test_acc" in shown) == (kind != "loaders")
    assert Path("small/model.pt").is_file()
    assert main(["report", "run/net.ckpt", "--script", "train.py"]) == 0
    assert "lightning-sparse export run/net.ckpt --script train.py --to compact" in capsys.readouterr().out
    assert main(["export", "run/net.ckpt", "--script", "train.py", "--to", "compact"]) == 0
    assert Trainer.fit is fit


def test_a_configuration_without_classes_is_answered_with_the_lines_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/config.yaml").write_text(yaml.safe_dump(CONFIG))
    message = refused(capsys, "report", "run/net.ckpt")
    assert "config.yaml: model names no class" in message
    assert "--script SCRIPT" in message
    lines = yaml.safe_load(message.partition("copy of the file:\n")[2])
    assert lines == {
        "model": {"class_path": "my_module.MyModel", "init_args": {"width": 24}},
        "data": {"class_path": "my_module.MyData"},
    }
    Path("run/config.yaml").unlink()
    message = refused(capsys, "report", "run/net.ckpt")
    assert "give --config RECIPE" in message
    assert "--script SCRIPT" in message
    assert "docs/guide/smaller.md, 'A checkpoint of a plain Trainer'" in message


ENDINGS = {
    "pass": "never called Trainer.fit",
    "raise SystemExit(3)": "ended with exit code 3 before it called Trainer.fit",
    "import pytorch_lightning as pl\npl.Trainer(logger=False).fit(pl.LightningModule())": "is no module of lightning.pytorch",
}


@pytest.mark.parametrize("source", ENDINGS)
def test_a_script_that_gives_no_model_is_refused(source: str) -> None:
    if "pytorch_lightning" in source:
        pytest.importorskip("pytorch_lightning")
    Path("train.py").write_text(source)
    with pytest.raises(UsageError, match=ENDINGS[source]):
        scripted.objects("train.py", ["fit"])


def test_an_error_of_the_script_is_one_line_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text("import sys, json\nif len(sys.argv) > 1:\n    json.loads(sys.argv[1])\nsys.argv[1]\n")
    message = refused(capsys, "report", "run/net.ckpt", "--script", "train.py")
    assert "train.py failed before Trainer.fit: IndexError: list index out of range (train.py, line 4: sys.argv[1]); " in message
    assert message.endswith("arguments after SCRIPT are passed to it: --script train.py --seed 1\n")
    message = refused(capsys, "report", "run/net.ckpt", "--script", "train.py", "{")
    assert "JSONDecodeError: " in message
    assert "(train.py, line 3: json.loads(sys.argv[1]), raised in decoder.py, line " in message
    Path("train.py").write_text("x = (\n")
    assert "failed before Trainer.fit: SyntaxError: '(' was never closed (train.py, line 1); arg" in refused(
        capsys, "report", "run/net.ckpt", "--script", "train.py"
    )


def test_a_missing_script_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file 'none.py'" in refused(capsys, "report", "run/net.ckpt", "--script", "none.py")
    Path("mlp.py").write_text("")
    message = refused(capsys, "report", "run/net.ckpt", "--script", "mpl.py")
    assert "--script must be your own training script, no file 'mpl.py'; closest: 'mlp.py'" in message


@pytest.mark.parametrize("words", [["--script", "train.py"], []])
def test_a_second_checkpoint_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_text("")
    for verb in (["report"], ["shrink"], ["export", "--to", "csr"]):
        message = refused(capsys, verb[0], "run/net.ckpt", "run/other.ckpt", *words, *verb[1:])
        assert "one checkpoint at a time, got run/net.ckpt and run/other.ckpt" in message
    assert "one checkpoint" in refused(capsys, "report", *words, "./run/net.ckpt", "other.ckpt")
    for given in (["teacher.ckpt"], ["--teacher", "teacher.ckpt"]):  # arguments of the script
        assert "never called Trainer.fit" in refused(capsys, "report", "run/net.ckpt", "--script", "train.py", *given)


def test_a_budget_takes_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name the classes of model and data in the YAML" in refused(capsys, "shrink", "--script", "train.py", "--max_drop", "1")


def test_arguments_of_a_class_that_is_not_named_are_refused_with_the_line_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text(yaml.safe_dump(CONFIG))
    message = refused(capsys, "check", "own.yaml")
    assert "model: 'width' without a class_path: write `model: {class_path: my_module.MyModel, init_args: {width: ...}}`" in message


def test_a_script_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    call = "Trainer(logger=False, enable_checkpointing=False, callbacks=[Sparsify(0.9, select={select})]).fit(Net())"
    for select, said in {"None": "Sparsify, to a share of 0.9 zeros", "['nothing*']": "select pattern 'nothing*' matches no"}.items():
        imports = "from lightning.pytorch import Trainer\nfrom lightning_sparse.callbacks import Sparsify"
        source = f"{MODULES}\n{imports}\nif __name__ == '__main__':\n    {call}"
        Path("train.py").write_text(source.replace("{select}", select))
        before = sorted(Path.cwd().rglob("*"))
        assert main(["check", "--script", "train.py"]) == (0 if select == "None" else 2)
        assert said in "".join(capsys.readouterr())
        assert [path for path in sorted(Path.cwd().rglob("*")) if "__pycache__" not in str(path)] == before
    Path("train.py").write_text(
        f"{MODULES}\nfrom lightning.pytorch.cli import LightningCLI\nif __name__ == '__main__':\n    LightningCLI(Net, Data)"
    )
    Path("own.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["check", "own.yaml", "--script", "train.py"]) == 0
    assert "ok: train.py, without a sparsity callback" in capsys.readouterr().out
