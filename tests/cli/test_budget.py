"""``lightning-sparse shrink --config X --max_drop D``: stages within a drop, resumed where they stopped."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, refused
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_sparse import coupling, load_shrunk, surgery
from lightning_sparse.cli import budget, formats, main, shrunk_table
from lightning_sparse.cli.formats import Format
from lightning_sparse.cli.saved import Saved
from lightning_sparse.examples.digits import Digits
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.shrinking import remove, save_shrunk, shrink_and_report

pytestmark = [*QUIET, pytest.mark.slow]
SHORT = ["--config", "digits", "--trainer.max_epochs", "4", "--epochs", "2", "--max_drop", "6", "--step", "0.4", "--stages", "3"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def state(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(folder, "state.json").read_text())
    return content


def test_stages_shrink_within_the_budget_and_resume(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["shrink", *SHORT, "--out", "whole"]) == 0
    shown = capsys.readouterr().out
    found = state("whole")
    counted = [stage for stage in found["stages"] if stage["counts"]]
    assert counted
    assert all(stage["drop"] <= 6 for stage in counted)
    smaller = [found["dense"]["multiply_adds"], *(stage["multiply_adds"] for stage in counted)]
    assert all(b <= 0.81 * a for a, b in itertools.pairwise(smaller))
    assert "left out: 10 groups of layers.5" in shown
    module = load_shrunk("whole", MLP)
    assert sum(p.numel() for p in module.parameters()) == counted[-1]["parameters"]
    written = Path("whole", "report.md").read_text()
    assert all(f"| {stage['number']} |" in written and f"{stage['parameters']:,}" in written for stage in found["stages"])

    tune, tuned = budget._Run._tune, list[int]()

    def stop_at_second(self: budget._Run, module: Any) -> None:
        tuned.append(1)
        if len(tuned) == 2:
            raise KeyboardInterrupt
        tune(self, module)

    with monkeypatch.context() as patch:
        patch.setattr(budget._Run, "_tune", stop_at_second)
        assert main(["shrink", *SHORT, "--out", "parts"]) == 130
        assert len(state("parts")["stages"]) == 1
        dense = Path("parts", "dense.ckpt").stat().st_mtime_ns
        assert main(["shrink", *SHORT, "--out", "parts"]) == 0
        assert len(tuned) == 2 + len(found["stages"]) - 1
        assert Path("parts", "dense.ckpt").stat().st_mtime_ns == dense
    assert state("parts") == found
    resumed = load_shrunk("parts", MLP)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))

    message = refused(capsys, "shrink", *SHORT, "--out", "parts", "--round_to", "4")
    assert "parts holds a run with other settings of round_to" in message
    assert "--out FOLDER --ckpt_path parts/dense.ckpt keeps its dense network" in message


def test_a_ratio_ends_the_stages(tmp_path: Path) -> None:
    words = ["--config", "digits", "--trainer.max_epochs", "2", "--epochs", "1", "--max_drop", "100", "--max_multiply_adds", "0.5"]
    assert main(["shrink", *words, "--step", "0.3", "--out", "twice"]) == 0
    found = state("twice")
    assert found["stages"][-1]["multiply_adds"] * 2 <= found["dense"]["multiply_adds"]
    assert all(stage["multiply_adds"] * 2 > found["dense"]["multiply_adds"] for stage in found["stages"][:-1])


def test_measured_goals_and_the_int8_column(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --max_drop any drop counts; latency is measured at --batch; the report has every row for dynamic int8 too."""
    words = ["--config", "digits", "--trainer.max_epochs", "1", "--epochs", "1", "--step", "0.5", "--stages", "1", "--batch", "48"]
    assert main(["shrink", *words, "--max_latency", "1e-6", "--speed_up", "1.01", "--for", "cpu", "--out", "timed"]) == 0
    shown = capsys.readouterr().out
    (stage,) = state("timed")["stages"]
    assert stage["counts"]
    assert stage["milliseconds"] > 0
    assert f"measured at batch 48 on cpu: {stage['milliseconds']:.3f} ms, {stage['times_faster']:.2f} times faster than dense" in shown
    assert "not reached within these stages: --max_latency 1e-06" in shown
    assert re.search(r"widths are multiples of \d+, measured \(1: ", shown)  # the default with such a goal
    assert state("timed")["settings"]["round_to"] == "fastest"
    message = refused(capsys, "shrink", *words, "--speed_up", "2", "--round_to", "quick")
    assert "round_to must be a whole number >= 1 or 'fastest', got 'quick'" in message
    written = Path("timed", "report.md").read_text()
    table = {cells[0]: cells[1:] for line in written.splitlines() if len(cells := line.strip("| ").split(" | ")) == 4}
    for label in ("bytes", "latency at batch 1", "test/accuracy"):
        assert len(table[label]) == 3
    assert int(table["bytes"][2].replace(",", "")) < 0.4 * int(table["bytes"][0].replace(",", ""))
    weights = torch.load("timed/model.pt", weights_only=True)
    held = load_file("timed/model.safetensors")
    assert held.keys() == weights.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in weights.items())
    assert ("ONNX: timed/model.onnx" in written) == Path("timed", "model.onnx").is_file()


def test_the_search_with_groups_trains_towards_the_width_that_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is removed is zero before it is removed, in nearly all groups; without the search with groups, in none."""
    shares: list[float] = []

    def removed(module: Any, inputs: Any, groups: Any, chosen: Any, round_to: int) -> Any:
        zeroed = surgery.duplicate(module)
        surgery.zero_(zeroed, coupling.indices(chosen))
        pairs = zip(module.parameters(), zeroed.parameters(), strict=True)
        gone = torch.cat([before[(after == 0).expand_as(before)] for before, after in pairs])
        shares.append(float((gone == 0).float().mean()))
        return remove(module, inputs, groups, chosen, round_to)

    monkeypatch.setattr(budget, "remove", removed)
    words = ["--config", "digits", "--trainer.max_epochs", "4", "--epochs", "3", "--step", "0.4", "--stages", "1", "--max_drop", "50"]
    for search in ("groups", "scores"):
        assert main(["shrink", *words, "--search", search, "--out", search]) == 0
    assert shares[0] > 0.8
    assert shares[1] < 0.1
    counts = [state(search)["stages"][0]["multiply_adds"] for search in ("groups", "scores")]
    assert max(counts) <= 0.6 * state("groups")["dense"]["multiply_adds"]


def test_a_missing_extra_is_named_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    words = ["--config", "digits", "--trainer.max_epochs", "1", "--epochs", "1", "--step", "0.5", "--stages", "1", "--max_params", "40000"]
    assert main(["shrink", *words, "--out", "plain"]) == 0
    assert not Path("plain", "model.onnx").exists()
    assert not Path("plain", "model.safetensors").exists()
    assert "no model.safetensors: pip install 'lightning-sparse[export]'" in Path("plain", "report.md").read_text()
    assert re.search(r"no model\.onnx: .*lightning-sparse\[export\]", Path("plain", "report.md").read_text())


def test_a_loss_may_rise_in_its_own_unit_and_an_accuracy_drop_in_points(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "digits", "--trainer.max_epochs", "1", "--epochs", "1", "--step", "0.5", "--stages", "1"]
    assert main(["shrink", *words, "--max_drop", "9", "--monitor", "val/loss", "--out", "loss"]) == 0
    shown = capsys.readouterr().out
    found = state("loss")
    assert "val/loss: smaller is better, guessed from its name (else give --mode max); --max_drop 9 allows a rise of 9" in shown
    rise = found["stages"][0]["metric"] - found["dense"]["metric"]
    assert found["stages"][0]["drop"] == pytest.approx(rise)
    assert f", rise {rise:.4f}: counts" in shown
    assert f"| rise {rise:.4f} |" in Path("loss", "report.md").read_text()
    assert main(["shrink", *words, "--max_drop", "99", "--mode", "max", "--ckpt_path", "loss/dense.ckpt", "--out", "accuracy"]) == 0
    shown = capsys.readouterr().out
    assert "val/accuracy: larger is better\n" in shown
    assert re.search(r", drop -?\d+\.\d\d points: counts", shown)


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--for must be cpu or cuda, got 'tpu'" in refused(capsys, "shrink", "--config", "digits", "--speed_up", "2", "--for", "tpu")
    assert "speed_up must be larger than 1" in refused(capsys, "shrink", "--config", "digits", "--speed_up", "0.5")
    assert "is given as --ckpt_path net.ckpt" in refused(capsys, "shrink", "net.ckpt", "--config", "digits", "--max_drop", "1")
    assert "did you mean --epochs?" in refused(capsys, "shrink", "--config", "digits", "--max_drop", "1", "--epocs", "2")
    assert "--batch must be at least 1" in refused(capsys, "shrink", "--config", "digits", "--speed_up", "2", "--batch", "0")
    assert "max_drop must be at least 0" in refused(capsys, "shrink", "--config", "digits", "--max_drop", "-1")
    assert "--step must lie in (0, 1), got 1.0" in refused(capsys, "shrink", "--config", "digits", "--max_drop", "1", "--step", "1")
    said = refused(capsys, "shrink", "--config", "digits", "--max_multiply_adds", "50")
    assert "max_multiply_adds must lie in (0, 1), got 50.0; did you mean 0.5?" in said
    assert "no checkpoint 'absent.ckpt'" in main_error(capsys, "--ckpt_path", "absent.ckpt")
    words = ["--config", "digits", "--max_drop", "1", "--trainer.max_epochs", "100000", "--monitor", "val/f1"]  # would never end
    assert "--monitor val/f1 is not among the validation metrics ['val/accuracy'" in refused(capsys, "shrink", *words)


def main_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["shrink", "--config", "digits", "--max_drop", "1", "--trainer.max_epochs", "1", *words]) == 2
    return capsys.readouterr().err


def test_a_drop_in_per_cent_is_told_to_give_points(capsys: pytest.CaptureFixture[str]) -> None:
    cases = {"1%": "got '1%': give the points without %, 1 for 0.01 of an accuracy", "much": "must be a number, got 'much'"}
    for word, said in cases.items():
        with pytest.raises(SystemExit):
            main(["shrink", "--config", "digits", "--max_drop", word])
        assert said in capsys.readouterr().err


class Normed(MLP):
    """Batch norms behind the hidden layer, whose first half of neurons is zero."""

    def __init__(self) -> None:
        super().__init__([64, 32, 10])
        self.layers.insert(2, nn.BatchNorm1d(32))
        for tensor in (self.layers[1].weight, self.layers[1].bias, self.layers[2].weight, self.layers[2].bias):
            tensor.data[:16] = 0.0
        self.layers[2].running_mean.fill_(0.5)


def test_the_table_measures_both_networks_in_evaluation_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit leaves its network in training mode: measured in it, batch norm fails for one sample, and running statistics change."""
    torch.manual_seed(0)
    for written in ("_programs", "_onnx"):
        monkeypatch.setattr(shrunk_table, written, lambda *_: [])
    given = Normed().train()
    given.layers[3].eval()  # a part in another mode than the rest
    data = Digits()
    data.setup("test")
    found = shrink_and_report(given, torch.randn(4, 64), seconds=0)
    save_shrunk(found.module, tmp_path)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    right = Saved(tmp_path / "net.ckpt", surgery.duplicate(given).eval(), data).test()["test/accuracy"]
    shown = shrunk_table.show(Saved(tmp_path / "net.ckpt", given, data), found, tmp_path, tuned=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert (given.training, given.layers[2].training, given.layers[3].training, found.module.training) == (True, True, False, True)
    rows = {row[0]: row[1:] for row in shown.rows}
    assert len(rows["latency at batch 1"]) == 3
    assert rows["test/accuracy"][0] == f"{right:.4f}"
    assert rows["test/accuracy"][0] == rows["test/accuracy"][1]


def test_latencies_and_differences_leave_the_modules_as_they_are(tmp_path: Path) -> None:
    """Also outside of the table of shrink."""
    given = Normed().train()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    saved, x = Saved(tmp_path / "net.ckpt", given, None), torch.randn(4, 64)
    column = formats.dense(saved, tmp_path)
    assert set(formats.latencies([column], (x,), 0.0, (1,))[1]) == {formats.DENSE, "A/A"}
    assert formats.difference(saved, column, (x,)) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert given.training


class Encoder(LightningModule):
    """One encoder layer of torch, whose fused path reads the weights of its Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.example_input_array = torch.randn(3, 4, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_an_encoder_layer_has_a_column_of_dynamic_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = Saved(tmp_path / "net.ckpt", Encoder().eval(), None)
    found = shrunk_table._int8(saved, tmp_path)
    assert isinstance(found, Format), found
    with torch.no_grad():
        given, made = saved.module(saved.module.example_input_array), found.call(saved.module.example_input_array)
    assert not torch.equal(given, made)
    torch.testing.assert_close(given, made, rtol=0.1, atol=0.1)
