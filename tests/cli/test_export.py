"""``export`` and ``report`` on a checkpoint: files that give back the network, figures that were measured, errors in words."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from commands import PLAIN, QUIET, refused
from export_networks import zeroed
from lightning.pytorch import LightningModule

import lightning_sparse
from lightning_sparse import coupling, export
from lightning_sparse.cli import formats, main, shrunk_table, worth
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.saved import Saved, example_inputs
from lightning_sparse.examples.digits import Digits
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.export import Gain, latency, program
from lightning_sparse.export.latency import Timing

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")]
SIZES = [64, 300, 100, 10]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run whose weights were then set to zero, but for a tenth."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["fit", "--config", "digits", *PLAIN, "--trainer.default_root_dir", str(folder)]) == 0
    (file,) = folder.rglob("*.ckpt")
    content = torch.load(file, weights_only=True)
    content["state_dict"] = dict(_network(0.9).state_dict())
    torch.save(content, file)
    return file


def _network(zeros: float) -> MLP:
    torch.manual_seed(0)
    return zeroed(MLP(SIZES), zeros)  # type: ignore[return-value]


def saved(network: LightningModule, data: object = None) -> Saved:
    return Saved(Path("some folder/net.ckpt"), network, data)


@pytest.mark.slow
def test_each_format_gives_back_the_network(trained, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["export", str(trained), "--to", "csr", "onnx", "compact", "--out", "files"]) == 0
    shown = capsys.readouterr().out
    for row in ("bytes", "bytes, gzipped", "latency at batch 1", "latency at batch 256", "test/accuracy", "largest difference of outputs"):
        assert row in shown
    assert "sparse layers: layers.1 (csr), layers." in shown
    assert "dense stay" not in shown
    stem, network, x = trained.stem, _network(0.9), torch.randn(7, 64)
    assert sorted(p.name for p in Path("files").iterdir()) == [f"{stem}.compact.safetensors", f"{stem}.csr.pt2", f"{stem}.onnx"]
    loaded = torch.export.load(f"files/{stem}.csr.pt2").module()
    torch.testing.assert_close(loaded(x), network(x))
    torch.testing.assert_close(formats.onnx_file.session(f"files/{stem}.onnx")(x), network(x).detach(), rtol=1e-4, atol=1e-5)
    found = export.load_compact(f"files/{stem}.compact.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


class Constant(MLP):
    """A batch size that tracing makes a constant."""

    def forward(self, x):
        gc.isenabled()  # which torch's second tracer does not know
        return super().forward(x).reshape(len(x), -1)


def constant() -> Constant:
    torch.manual_seed(0)
    return zeroed(Constant(SIZES), 0.9)


@pytest.mark.slow
def test_a_program_for_one_batch_size_is_not_called_one_for_any(capsys):
    limit = "takes batches of 16 only, because forward, or what it calls, makes the batch size a constant"
    made = formats.sparse(saved(constant(), Digits()), "csr", 16, Path("net.csr.pt2"))
    assert made.load.endswith(".module()  # takes batches of 16 only")
    assert made.notes[-1].startswith(f"csr: net.csr.pt2 {limit}")
    shown = formats.sparse(saved(_network(0.9), Digits()), "csr", 16, Path("net.csr.pt2"))
    assert not any("batches" in line for line in [shown.load, *shown.notes])
    Path("model.pt2").write_text("of an earlier run")
    load, line = shrunk_table._programs(constant(), (torch.randn(16, 64),), Path())
    assert load == "without this package: torch.export.load('model.pt2').module()"
    assert line.startswith(f"model.pt2 {limit}")


@pytest.mark.slow
def test_a_fixed_batch_is_offered_and_taken(trained, capsys):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UsageError, match=r"write x.shape\[0\]; or write a file for one batch size with --fixed_batch"):
        formats.onnx(saved(constant(), Digits()), Path("net.onnx"))
    assert formats.onnx(saved(constant(), Digits()), Path("net.onnx"), 16).batch == 16
    words = ["--to", "csr", "onnx", "--out", "files", "--batch_size", "16", "--fixed_batch"]
    assert main(["export", str(trained), *words]) == 0
    shown = capsys.readouterr().out
    assert "latency at batch 16" in shown
    assert "latency at batch 32" not in shown
    for kind in ("csr.pt2", "onnx"):
        assert f"{trained.stem}.{kind} takes batches of 16 only, as asked for" in shown
    x = torch.randn(16, 64)
    torch.testing.assert_close(formats.onnx_file.session(f"files/{trained.stem}.onnx")(x), _network(0.9)(x).detach(), rtol=1e-4, atol=1e-5)


def test_an_export_says_in_one_line_which_layers_stay_dense_and_why():
    network = _network(0.9)
    torch.nn.init.ones_(network.layers[3].weight)
    made = formats.sparse(saved(network, Digits()), "csr", 1, None)
    assert made.notes == ["csr: 2 sparse layers: layers.1 (csr), layers.5 (csr)", "csr: dense stay layers.3.weight (only 0.0 % zeros)"]


@pytest.mark.slow
def test_the_report_of_a_checkpoint_names_a_command_that_runs(trained, capsys):
    assert main(["report", str(trained)]) == 0
    shown = capsys.readouterr().out
    zeros = sum(int((p == 0).sum()) for p in _network(0.9).parameters() if p.dim() > 1)
    assert f"{zeros:,} of 50,200 weights in 3 matrices" in shown
    assert "selected in training" not in shown  # because all were
    content = torch.load(trained, weights_only=True)
    (state,) = [one for one in content["callbacks"].values() if "taken" in one]
    del state["taken"]["layers.1.weight"]
    torch.save(content, trained.with_name("fewer.ckpt"))
    chosen = [p for name, p in _network(0.9).named_parameters() if name in ("layers.3.weight", "layers.5.weight")]
    share = sum(int((p == 0).sum()) for p in chosen) / sum(p.numel() for p in chosen)
    assert main(["report", str(trained.with_name("fewer.ckpt"))]) == 0
    assert f"({100 * share:.2f} % of those selected in training)" in capsys.readouterr().out
    (command,) = [line.partition("lightning-sparse ")[2] for line in shown.splitlines() if "for a small file" in line]
    command, _, note = command.partition("  ")
    assert main([*command.split(), "--out", "files"]) == 0
    (file,) = Path("files").iterdir()
    assert f"rounded to fp16 {file.stat().st_size:,}" in shown
    assert note == f"({file.stat().st_size:,} bytes, values rounded to fp16)"


@pytest.mark.slow
def test_wrong_checkpoints_are_refused_and_nothing_is_written(trained, capsys, tmp_path):
    def export_of(file, *more):
        return refused(capsys, "export", str(file), "--to", "csr", *more)

    content = torch.load(trained, weights_only=True)
    kept = tmp_path / "checkpoints"
    kept.mkdir()
    (tmp_path / "config.yaml").write_text((trained.parent.parent / "config.yaml").read_text())
    torch.save(content | {"state_dict": dict(MLP(SIZES).state_dict())}, kept / "dense.ckpt")
    assert "no matrix of this MLP is at least half zero" in export_of(kept / "dense.ckpt")
    torch.save(content | {"state_dict": dict(MLP([64, 10]).state_dict())}, kept / "other.ckpt")
    message = export_of(kept / "other.ckpt")
    assert "a checkpoint of another model: it lacks layers.3.bias" in message
    assert f"The model is that of {tmp_path / 'config.yaml'}; for another one give --config RECIPE or --script SCRIPT" in message
    (kept / "cut.ckpt").write_bytes(trained.read_bytes()[:5000])
    assert "cut.ckpt" in export_of(kept / "cut.ckpt")
    assert "no checkpoint" in export_of(kept / "absent.ckpt")
    elsewhere = tmp_path / "a" / "b" / "net.ckpt"
    elsewhere.parent.mkdir(parents=True)
    torch.save(content, elsewhere)
    assert "no config.yaml beside" in export_of(elsewhere)
    assert "--batch_size must be at least 1, got 0" in export_of(trained, "--batch_size", "0")
    assert "no layer has a 2:4 pattern" in refused(capsys, "export", str(trained), "--to", "2:4")


@pytest.mark.slow
def test_of_several_formats_those_that_can_be_written_are_and_the_others_are_named(trained, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    content = torch.load(trained, weights_only=True)
    torch.save(content | {"state_dict": dict(_network(-1.0).state_dict())}, tmp_path / "dense.ckpt")
    words = ["export", "dense.ckpt", "--config", "digits", "--to"]
    assert main([*words, "csr", "auto", "onnx"]) == 0
    shown = capsys.readouterr().out
    assert "csr not written: no matrix of this MLP is at least half zero" in shown
    assert "auto not written: no matrix of this MLP" in shown
    assert "onnxruntime.InferenceSession" in shown
    assert sorted(file.name for file in tmp_path.glob("dense.*")) == ["dense.ckpt", "dense.onnx"]
    said = refused(capsys, *words, "csr", "auto")
    assert said.startswith("error: csr not written: ")
    assert "\nauto not written: " in said


@pytest.mark.slow
def test_a_config_elsewhere_and_overrides_are_used(trained, tmp_path, capsys):
    moved = tmp_path / "net.ckpt"
    moved.write_bytes(trained.read_bytes())
    assert main(["export", str(moved), "--config", "digits", "--to", "compact", "--data.test", "0.3"]) == 0
    assert (tmp_path / "net.compact.safetensors").is_file()
    assert "of another model" in refused(
        capsys, "export", str(moved), "--config", "digits", "--to", "compact", "--model.sizes", "[64, 20, 10]"
    )


def known(monkeypatch, gain, faster, shrunk=None):
    """Replace measurements: every layer gains ``gain`` and the whole network is ``faster[batch]`` times faster; the same of shrink."""

    def shrink(module, inputs, round_to=8, groups=None):
        if shrunk is None:
            raise ValueError("nothing to remove")
        return module

    monkeypatch.setitem(vars(lightning_sparse), "shrink", shrink)
    monkeypatch.setattr(worth.coupling, "groups", lambda *_: [])
    monkeypatch.setattr(worth, "_SLOW", float("inf"))
    monkeypatch.setattr(worth._Spot, "_measure", lambda *_: Gain(gain, gain, 1.0))
    batches = iter([*(shrunk or []), *faster])

    def measure(arms, base, budget):
        times = next(batches)
        return {name: Timing(1.0, times if name not in (base, latency.AGAIN) else 1.0, times, 1.0) for name in [*arms, latency.AGAIN]}

    monkeypatch.setattr(worth.latency, "measure", measure)


def report(network):
    return worth.lines(saved(network, Digits()), ["--config", "digits"])


class Tokens(LightningModule):
    """An encoder of the rows of an image (batch, 1, length, width)."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x.squeeze(1)).mean(1))


@pytest.mark.parametrize(
    ("network", "shape", "rows"),
    [
        (Tokens(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)), (4, 1, 7, 16), 7),
        (Tokens(torch.nn.Identity()), (4, 1, 7, 16), 1),
        (torch.nn.Conv2d(1, 2, 3), (4, 1, 7, 16), 1),
    ],
)
def test_a_sample_counts_as_the_rows_that_it_gives_a_linear_layer(network, shape, rows):
    assert formats.rows_of_a_sample(network.eval(), (torch.randn(shape),)) == rows
    assert not any(part._forward_pre_hooks for part in network.modules())


def test_auto_is_chosen_for_the_rows_of_a_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(export.conversion.Table, "gain", lambda self, *given: asked.append(given[-1]) or Gain(2.0, 2.0, 1.0))
    network = zeroed(Tokens(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)), 0.9)
    network.example_input_array = torch.randn(4, 1, 7, 16)
    formats.sparse(saved(network), "auto", 8, None)
    assert set(asked) == {56}


def test_the_report_names_the_batch_size_that_gains_most(monkeypatch):
    known(monkeypatch, 3.0, [1.5, 4.0, 2.5])
    lines = report(_network(0.9))
    assert "  shrink:         nothing to remove" in lines
    command = "lightning-sparse export 'some folder/net.ckpt' --config digits"
    assert lines[-2] == f"  for the most speed:     {command} --to auto --batch_size 32  (4.0x at batch 32)"
    assert lines[-1].startswith(f"  for a small file:  {command} --to compact --fp16  (")
    assert "A/A: the given network against itself" in lines[0]
    (line,) = [line for line in lines if "sparse layers" in line]
    assert "batch 1: 1.50x (A/A" in line
    assert "batch 32: 4.00x (A/A" in line


def test_shrink_is_named_where_it_gains_more(monkeypatch):
    known(monkeypatch, 3.0, [1.5, 4.0, 2.5], shrunk=[2.0, 3.0, 5.0])
    lines = report(_network(0.9))
    (command,) = [line for line in lines if "for the most speed" in line]
    assert "shrink" in command
    assert "(5.0x at batch 256)" in command
    assert any("shrink:         50,610 -> 50,610 parameters; batch 1: 2.00x" in line for line in lines)


def test_a_smaller_network_whose_gain_is_within_the_noise_is_left_to_a_longer_measurement(monkeypatch):
    known(monkeypatch, 0.5, [], shrunk=[1.0, 1.04, 0.9])
    (line,) = [line for line in report(_network(0.9)) if "beyond the noise" in line]
    assert "lightning-sparse shrink 'some folder/net.ckpt' --config digits measures for longer. If that" in line
    assert line.endswith("train with structure=Channels() and shrink, or Linear layers to more zeros")


def test_the_largest_gain_within_the_noise_is_left_to_a_longer_measurement(monkeypatch):
    known(monkeypatch, 3.0, [1.06, 1.2, 1.1])
    noisy = worth.latency.measure

    def measure(arms, base, *more):  # no lower quartile is above the upper one of the dense network's own ratio
        found = noisy(arms, base, *more)
        return {name: dataclasses.replace(timing, low=0.9, high=1.3) for name, timing in found.items()}

    monkeypatch.setattr(worth.latency, "measure", measure)
    lines = report(_network(0.9))
    assert not any("most speed" in line for line in lines)
    (line,) = [line for line in lines if "beyond the noise" in line]
    command = "lightning-sparse export 'some folder/net.ckpt' --config digits --to auto --batch_size 32"
    assert f"its lower quartile above all of A/A: {command} measures for longer" in line


def test_no_gain_is_promised_that_was_not_measured(monkeypatch):
    known(monkeypatch, 3.0, [0.9, 0.8, 1.0])  # each layer gains, the network does not
    lines = report(_network(0.9))
    assert not any("most speed" in line for line in lines)
    assert lines[-2].startswith("  nothing is faster here with these zeros: for speed train with structure=Channels() and shrink")
    known(monkeypatch, 0.5, [])  # no layer gains, so nothing else is measured
    (line,) = [line for line in report(_network(0.9)) if "sparse layers" in line]
    assert line.count("none is faster") == 3
    monkeypatch.setattr(worth, "_SECONDS", -1.0)
    (line,) = [line for line in report(_network(0.9)) if "sparse layers" in line]
    assert "; 9 layers were not measured in the time" in line


@pytest.mark.parametrize(
    ("error", "line", "remedy"),
    [
        (ImportError("no package"), "not measured, no package", "pip install 'lightning-sparse[shrink]'"),
        (
            coupling.ForwardBranches("it branches"),
            "not measured, it branches. Give --allow_branches if the path is always the same",
            "lightning-sparse shrink 'some folder/net.ckpt' --config digits --allow_branches",
        ),
    ],
)
def test_a_shrink_that_was_not_measured_is_not_called_slow(monkeypatch, error, line, remedy):
    def groups(module, inputs):
        raise error

    known(monkeypatch, 0.5, [])
    monkeypatch.setattr(worth.coupling, "groups", groups)
    lines = report(_network(0.9))
    assert f"  shrink:         {line}" in lines
    assert lines[-2] == f"  sparse layers are not faster here with these zeros, and shrink was not measured: {remedy}"


def test_a_ratio_of_one_is_no_speed_up(monkeypatch):
    known(monkeypatch, 3.0, [1.01, 1.04, 1.02])
    assert report(_network(0.9))[-2].startswith("  nothing is faster here")


def test_inputs_that_nothing_reads_are_counted(monkeypatch):
    monkeypatch.setattr(worth, "_SECONDS", -1.0)
    network = rows_left(300)
    assert not any("columns:" in line for line in report(network))
    with torch.no_grad():
        network.layers[3].weight[:, :7] = 0
    assert "  columns:        7 of 464 input neurons and channels that nothing reads" in report(network)


def test_batch_sizes_with_slow_calls_are_left_to_export(monkeypatch):
    known(monkeypatch, 3.0, [2.0])
    monkeypatch.setattr(worth, "_SLOW", -1.0)
    (line,) = [line for line in report(_network(0.9)) if "sparse layers" in line]
    assert line.endswith("batch 32, 256: `export` measures it, one call is slow")


def test_the_report_of_a_dense_network_says_so():
    lines = "\n".join(report(_network(-1.0)))
    assert "0 of 50,200 weights" in lines
    assert "no matrix of this MLP is at least half zero" in lines
    assert "nothing is faster" not in lines


def rows_left(count):
    """Return a network whose first layer has so many neurons left of 300, and no other zeros."""
    torch.manual_seed(0)
    network = MLP(SIZES)
    with torch.no_grad():
        network.layers[1].weight[count:] = network.layers[1].bias[count:] = 0
    return network.eval()


@pytest.mark.parametrize(("left", "alone"), [(297, True), (97, False)])  # a multiple of 8 is 304, more than the 300 there are; 104
def test_shrink_without_rounding_is_measured_where_rounding_keeps_zero_neurons(monkeypatch, left, alone):
    monkeypatch.setattr(worth, "_SECONDS", -1.0)
    monkeypatch.setattr(worth, "_SLOW", float("inf"))

    def measure(arms, base, budget):
        rates = {name: 2.0 if name.endswith("--round_to 1") else 1.5 for name in arms if name != base}
        return {name: Timing(1.0, *[rates.get(name, 1.0)] * 3) for name in [*arms, latency.AGAIN]}

    monkeypatch.setattr(worth.latency, "measure", measure)
    lines = report(rows_left(left))
    (line,) = [line for line in lines if "  shrink: " in line]
    tight = 65 * left + (left + 1) * 100 + 1010
    assert f" {tight:,} parameters with --round_to 1; batch 1: 2.00x" in line
    assert ("-> 18,270 parameters; batch 1: 1.50x" in line) != alone
    (best,) = [line for line in lines if "for the most speed" in line]
    assert best.endswith("lightning-sparse shrink 'some folder/net.ckpt' --config digits --round_to 1  (2.0x at batch 256)")


def test_the_smallest_file_is_the_smallest_of_those_that_were_measured(monkeypatch):
    monkeypatch.setattr(worth, "_SECONDS", -1.0)
    for left, two_steps in ((40, True), (296, False)):  # zero rows leave zero columns behind, which a compact file keeps
        lines = report(rows_left(left))
        (line,) = [line for line in lines if "compact file" in line]
        (best,) = [line for line in lines if ("for a smaller one yet" if two_steps else "for a small file") in line]
        small = lightning_sparse.shrink(rows_left(left), torch.zeros(8, 64)) if two_steps else rows_left(left)
        size = export.save_compact(small, "small", "fp16").stat().st_size
        assert f"({size:,} bytes, values rounded to fp16)" in best
        assert ("lightning-sparse shrink" in best) == two_steps
        assert "; after shrink " in line
        assert any("for a smaller one yet" in line for line in lines) == two_steps


def test_a_note_says_how_many_sparse_layers_it_does_not_name():
    network = zeroed(MLP([64] * 8))
    (note,) = formats.sparse(saved(network), "csr", 1, None).notes
    assert note == "csr: 7 sparse layers: layers.1 (csr), layers.3 (csr), layers.5 (csr), layers.7 (csr) and 3 more"


class Convolved(LightningModule):
    """Convolutions that are nearly zero everywhere, and a Linear layer that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.example_input_array = torch.randn(2, 1, 8, 8)
        self.c1, self.c2, self.fc = torch.nn.Conv2d(1, 16, 3), torch.nn.Conv2d(16, 16, 3), torch.nn.Linear(256, 10)
        for layer in (self.c1, self.c2):
            with torch.no_grad():
                layer.weight[:, :, 1:] = 0

    def forward(self, x):
        return self.fc(self.c2(self.c1(x).relu()).relu().flatten(1))


def test_the_report_of_a_convolutional_network_names_the_remedy_in_full():
    lines = worth.lines(saved(Convolved()))
    assert any(line.lstrip().startswith("zeros:") and "in 3 tensors" in line for line in lines)
    (cut,) = [line for line in lines if line.lstrip().startswith("shrink:")]
    assert cut.endswith("train with structure=Channels(), or to a higher share of zeros")
    assert "Is this the sparse checkpoint" not in cut
    (layers,) = [line for line in lines if line.lstrip().startswith("sparse layers:")]
    assert "the zeros of c1, c2 are in convolutions" in layers
    assert layers.endswith("For speed train with structure=Channels(), then shrink")


class Wordless(LightningModule):
    """No example inputs and no data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)


def test_a_network_without_inputs_still_gets_its_sizes():
    lines = worth.lines(saved(zeroed(Wordless()), None))
    (line,) = [line for line in lines if "sparse layers" in line]
    assert "not measured, no example inputs: Wordless has no example_input_array" in line
    assert any("compact file" in line and "x smaller" in line for line in lines)


def test_the_end_of_a_fit_survives_a_report_that_fails(monkeypatch, capsys):
    monkeypatch.setattr(worth, "lines", lambda *_: [][1])
    worth.at_end(saved(_network(0.9)))
    assert "not measured: IndexError" in capsys.readouterr().out


def test_example_inputs_come_from_the_module_else_from_the_data():
    network = _network(0.9)
    (x,) = example_inputs(network, Digits())
    assert x.shape == (360, 64)
    network.example_input_array = torch.zeros(3, 64)
    assert example_inputs(network, Digits())[0].shape == (3, 64)


def test_inputs_are_repeated_and_cut_to_a_batch_size():
    x = torch.arange(6).reshape(3, 2)
    for batch in (1, 3, 7):
        (found,) = program.sized((x,), batch)
        assert torch.equal(found, x[torch.arange(batch) % 3])
    assert program.sized((2.5, torch.tensor(1)), 4)[0] == 2.5


def test_a_step_that_does_not_use_forward_has_no_figure_for_it():
    network = _network(0.9)
    network.forward_calls = []
    one = formats.Format("onnx", None, None, network)
    assert formats.metrics(saved(network, None), one) == {}
    network.forward_calls = [1]
    monkey = saved(network, None)
    object.__setattr__(monkey, "data", Digits())
    assert set(formats.metrics(monkey, one)) == {"test/loss", "test/accuracy"}
