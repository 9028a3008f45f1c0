"""An ONNX file appears only if ONNX Runtime computes what the module does."""

from __future__ import annotations

import gc

import pytest
import torch
from export_networks import encoder, mlp
from torch import Tensor, nn

from lightning_sparse.export import _extra, onnx_file, to_onnx, to_sparse
from lightning_sparse.export.program import relative_difference

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.slow  # torch's exporter takes seconds
def test_a_sparse_network_runs_at_any_batch_size(tmp_path):
    network = mlp()
    sparse = to_sparse(network, "csr")
    path = tmp_path / "folder" / "net.onnx"
    assert to_onnx(sparse, path, torch.randn(1, 64)) < 1e-5
    assert type(sparse[0]).__name__ == "SparseLinear"
    running = onnx_file.session(path)
    for batch in (1, 2, 9):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(running(x), network(x).detach(), rtol=1e-4, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]  # weights inside, no half-written file beside


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_runs(tmp_path):
    assert to_onnx(encoder(), tmp_path / "net.onnx", torch.randn(2, 6, 32)) < 1e-4


class Two(nn.Module):
    """Two inputs, and an example of them."""

    example_input_array = (torch.randn(3, 4), torch.randn(3, 4))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": x + y, "product": x * y}


@pytest.mark.slow
def test_the_modules_own_example_and_several_outputs(tmp_path):
    assert to_onnx(Two(), tmp_path / "net.onnx") < 1e-6
    first, second = onnx_file.session(tmp_path / "net.onnx")(torch.ones(5, 4), torch.full((5, 4), 2.0))
    assert (first[0, 0].item(), second[0, 0].item()) == (3, 2)


class Branching(nn.Module):
    """Control flow that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class FixedBatch(nn.Module):
    """A batch of 4 and no other."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(4.0).unsqueeze(1)


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_in_words(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"cannot export Branching.forward: its control flow depends on values.*torch.where"):
        to_onnx(Branching(), path, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"Sequential.forward fails for inputs of the shapes \(2, 63\).*Give example_inputs"):
        to_onnx(mlp(), path, torch.randn(2, 63))
    with pytest.raises(ValueError, match=r"FixedBatch.forward fails for inputs of the shapes \(8, 8\).*dynamic_batch=False"):
        to_onnx(FixedBatch(), path, torch.randn(4, 8))
    assert list(tmp_path.iterdir()) == []
    assert to_onnx(FixedBatch(), path, torch.randn(4, 8), dynamic_batch=False) < 1e-6


class Lengths(nn.Module):
    """``len(x)`` in forward; ``opaque`` adds a call that torch's second tracer does not know."""

    def __init__(self, opaque: bool = False) -> None:
        super().__init__()
        self.encoder, self.opaque = encoder(), opaque

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque:
            gc.isenabled()
        return self.encoder(x.view(len(x), 6, 32)).reshape(len(x), -1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_batch_size_that_tracing_makes_a_constant(tmp_path, capfd):
    path, x = tmp_path / "net.onnx", torch.randn(4, 6 * 32)
    assert to_onnx(Lengths().eval(), path, x[:2]) < 1e-4
    running = onnx_file.session(path)
    for batch in (1, 3, 4):
        torch.testing.assert_close(running(x[:batch]), Lengths().eval()(x[:batch]).detach(), rtol=1e-4, atol=1e-5)
    path.unlink()
    said = r"makes the batch size a constant \(len\(x\), .*write x.shape\[0\]; or write a file for one batch size with dynamic_batch=False"
    with pytest.raises(ValueError, match=said):
        to_onnx(Lengths(opaque=True).eval(), path, x)
    assert not path.exists()
    assert capfd.readouterr() == ("", "")  # no line of ONNX Runtime's log
    assert to_onnx(Lengths(opaque=True).eval(), path, x, dynamic_batch=False) < 1e-4


@pytest.mark.slow
def test_a_file_that_computes_something_else_does_not_appear(tmp_path, monkeypatch):
    network = mlp()
    with pytest.raises(ValueError, match=r"outputs differ from the module's by .* more than -1"):
        to_onnx(network, tmp_path / "net.onnx", torch.randn(3, 64), tolerance=-1.0)
    monkeypatch.setattr(onnx_file, "session", lambda path: lambda x: network(x).detach() + 1)
    with pytest.raises(ValueError, match="outputs differ"):
        to_onnx(network, tmp_path / "net.onnx", torch.randn(3, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_refused_before_the_export(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no example inputs: give example_inputs .* Sequential.forward.*example_input_array"):
        to_onnx(mlp(), tmp_path / "net.onnx")
    quantised = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    with pytest.raises(ValueError, match="quantised layer"):
        to_onnx(quantised, tmp_path / "net.onnx", torch.randn(2, 64))
    monkeypatch.setattr(onnx_file, "_export", lambda *_: pytest.fail("exported"))
    for x, said in ((torch.full((2, 64), torch.nan), "NaN throughout"), (torch.zeros(0, 64), "at least one sample")):
        with pytest.raises(ValueError, match=f"example_inputs must hold .*{said}"):
            to_onnx(mlp(), tmp_path / "net.onnx", x)
    with pytest.raises(ValueError, match="the outputs of Sequential on the example inputs hold no finite number"):
        to_onnx(mlp(), tmp_path / "net.onnx", torch.full((2, 64), torch.inf))
    with pytest.raises(ValueError, match=r"path of to_onnx must be a file, got the folder '(.*)': give .*, such as '\1.model.onnx'"):
        to_onnx(mlp(), tmp_path, torch.randn(2, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r"to_onnx needs the package no_such_package: pip install 'lightning-sparse\[export\]'"):
        _extra.load("no_such_package", "to_onnx")


def test_differences_are_relative_to_the_largest_output():
    a = torch.tensor([100.0, 1.0])
    assert relative_difference(a, a + torch.tensor([0.0, 0.5])) == pytest.approx(0.005)
    assert relative_difference([a, a], [a]) == float("inf")
    assert relative_difference(a[:1], a) == float("inf")
    assert relative_difference(torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])) == float("inf")
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
