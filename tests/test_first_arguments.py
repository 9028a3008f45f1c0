"""Functions on modules, files and tensors name what was given and the call to write where arguments are wrong or swapped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_sparse import _coupled, coupling, export, load_shrunk, metrics, plots, save_shrunk, shrink
from lightning_sparse.cli import budget
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.structure import Channels

NET, X = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
CASES = {
    "a class": (
        lambda: shrink(nn.Flatten, X),
        "shrink takes an instance of nn.Module first, got the class Flatten: create it first: Flatten",
    ),
    "a file": (lambda: shrink("a.ckpt", X), "got 'a.ckpt' of type str: build the module first.*load_from_checkpoint"),
    "shrink, swapped": (lambda: shrink(X, NET), r"got a tensor of the shape \(2, 4\): the call is shrink\(module, example_inputs\)"),
    "groups, swapped": (lambda: coupling.groups(X, NET), r"the call is groups\(module, example_inputs\)"),
    "save_shrunk, swapped": (lambda: save_shrunk("a", NET), "folder of save_shrunk must be a path, got the module Sequential"),
    "save_shrunk": (lambda: save_shrunk("a", "b"), r"save_shrunk takes an instance of nn.Module first"),
    "load_shrunk, swapped": (lambda: load_shrunk(NET, "a"), r"folder of load_shrunk must be a path.*load_shrunk\(folder, make\)"),
    "load_shrunk": (lambda: load_shrunk("a", "b"), "takes a module, its class or a function that builds it second, got 'b'"),
    "save_compact, swapped": (lambda: export.save_compact("a", NET), r"path of save_compact must be a path.*save_compact\(state, path\)"),
    "save_compact": (lambda: export.save_compact(3, "a"), "takes an instance of nn.Module or a state dict first, got 3 of type int"),
    "load_compact": (lambda: export.load_compact(NET), "path of load_compact must be a path"),
    "to_onnx, swapped": (lambda: export.to_onnx(NET, X, "a"), r"path of to_onnx must be a path.*to_onnx\(module, path, example_inputs\)"),
    "to_onnx": (lambda: export.to_onnx(X, "a"), "to_onnx takes an instance of nn.Module first"),
    "to_sparse": (lambda: export.to_sparse(X), "to_sparse takes an instance of nn.Module first"),
    "to_dense": (lambda: export.to_dense(X), "to_dense takes an instance of nn.Module first"),
    "semi_structured": (lambda: export.semi_structured(X), "semi_structured takes an instance of nn.Module first"),
    "a metric of a module": (lambda: metrics.Sparsity()(NET), r"got the module Sequential: give select.select\(module, None\)"),
    "a metric": (lambda: metrics.Compression()(3), "takes a mapping of names to tensors, an iterable of tensors or one tensor, got 3"),
    "masks": (lambda: plots.masks(3), "masks takes a mapping of names to tensors, got 3 of type int"),
    "masks of a module": (lambda: plots.masks(NET), r"or dict\(module.named_parameters\(\)\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_and_swapped_arguments(case):
    call, message = CASES[case]
    if case.startswith("to_onnx"):
        pytest.importorskip("onnxruntime")
    with pytest.raises(TypeError, match=message):
        call()


def test_a_metric_still_takes_parameters_and_lists_of_them():
    assert metrics.Sparsity()(nn.ParameterList([nn.Parameter(torch.eye(2))])) == 0.5
    assert metrics.Sparsity()(p for p in [torch.eye(4)]) == 0.75


class Branching(nn.Sequential):
    """A path that depends on values."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def test_a_structure_names_the_remedy_that_it_has():
    with pytest.raises(
        ValueError, match=r"Channels\(\) traces the network, but .*Write the choice with torch.where, or use Rows\(\)"
    ) as said:
        _coupled.find(Channels(), Branching(nn.Linear(4, 3), nn.Linear(3, 2)), ["0.weight"], X)
    assert "Pass allow_branches" not in str(said.value)
    with pytest.raises(ValueError, match="Pass allow_branches=True if the path is always the same"):
        shrink(Branching(nn.Linear(4, 3), nn.Linear(3, 2)), X)


def test_the_command_that_cuts_to_a_budget_names_its_flag():
    network = Branching(nn.Linear(4, 3), nn.Linear(3, 2))
    for allowed in (False, True):
        run = SimpleNamespace(inputs=X, args=SimpleNamespace(allow_branches=allowed))
        if allowed:
            assert any(group.exact for group in budget._Run._groups(run, network))
        else:
            with pytest.raises(UsageError, match="Give --allow_branches if the path is always the same"):
                budget._Run._groups(run, network)
    assert budget.parser().parse_args(["--config", "x", "--allow_branches"]).allow_branches


class Recurrent(nn.Module):
    """Two recurrent layers over more steps than torch-pruning follows."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(8, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


@pytest.mark.slow
def test_a_recurrent_network_brings_no_warning_of_the_tracer():
    found = coupling.groups(Recurrent(), torch.randn(2, 20, 8))  # warnings are errors here
    assert not any(group.exact for group in found)
