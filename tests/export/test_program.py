"""Programs of torch.export take any batch size where that can be; where not, it is said which one and why."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from export_networks import mlp
from torch import Tensor, nn

from lightning_sparse.export import program, to_sparse


class Lengths(nn.Module):
    """``len(x)`` in forward, as in ``x.view(len(x), -1)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(len(x), -1)).reshape(len(x), 5, 2)


class Constant(Lengths):
    """``len(x)`` beside a call that torch's second tracer does not know."""

    def forward(self, x: Tensor) -> Tensor:
        gc.isenabled()
        return super().forward(x)


class OnlyFour(Lengths):
    """A batch of 4 and no other."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 4:
            raise ValueError("four")
        return super().forward(x)


def loaded(path):
    return torch.export.load(path).module()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_forward_with_len_gives_a_program_for_any_batch(tmp_path, batch):
    network, example = to_sparse(Lengths().eval(), "csr"), torch.randn(batch, 8, 8)
    assert program.save(network, (example,), tmp_path / "net.pt2").limit == ""
    for size in (1, 2, 3, 7, 100):
        x = torch.randn(size, 8, 8)
        torch.testing.assert_close(loaded(tmp_path / "net.pt2")(x), network(x))
    assert torch.export.load(tmp_path / "net.pt2").example_inputs is None


def test_a_program_for_one_batch_size_says_so_and_names_the_cause(tmp_path):
    network, path, x = Constant().eval(), tmp_path / "net.pt2", torch.randn(6, 8, 8)
    limit = program.save(network, (x,), path).limit
    assert limit.startswith("takes batches of 6 only, because forward, or what it calls, makes the batch size a constant")
    assert "write x.shape[0]" in limit
    torch.testing.assert_close(loaded(path)(x), network(x))
    with pytest.raises((AssertionError, RuntimeError)):
        loaded(path)(x[:1])
    assert program.save(OnlyFour().eval(), (x[:4],), path).limit == "takes batches of 4 only, as forward does"
    assert program.save(Lengths().eval(), (x,), path, fixed_batch=True).limit == "takes batches of 6 only, as asked for"


class Squeezed(Lengths):
    """Another way through forward at batch 1."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x.flatten(1))
        return y[0] if x.shape[0] == 1 else y


def test_a_program_that_fails_for_one_sample_alone_still_takes_the_others(tmp_path):
    network, x = Squeezed().eval(), torch.randn(6, 8, 8)
    assert program.save(network, (x,), tmp_path / "net.pt2").limit.startswith("does not take batches of 1 (")
    torch.testing.assert_close(loaded(tmp_path / "net.pt2")(x[:5]), network(x[:5]))


class Mode(nn.Module):
    """Another result while torch traces."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_compiling() else x


def test_a_program_that_computes_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the program is not the module: its outputs differ by"):
        program.save(Mode(), (torch.ones(2, 3),), tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


@pytest.mark.slow
def test_a_loaded_program_of_sparse_layers_prints_no_notice_of_torch(tmp_path):
    path = tmp_path / "net.pt2"
    program.save(to_sparse(mlp(), "csr"), (torch.randn(2, 64),), path)
    code = f"import torch, lightning_sparse.export; torch.export.load({str(path)!r}).module()(torch.ones(3, 64))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "beta state" not in done.stderr
