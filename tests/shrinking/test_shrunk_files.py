"""Saved shrunk networks: loaded again into the user's class, refused when damaged or of another class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coupled import Encoder, Residual, seeded
from torch import nn

from lightning_sparse import load_shrunk, save_shrunk
from lightning_sparse.examples.mlp import MLP
from lightning_sparse.shrinking import shrink

X = torch.randn(4, 6)


def dead_mlp(rows: int = 3, sizes: list[int] | None = None) -> MLP:
    torch.manual_seed(0)
    model = MLP(sizes or [6, 10, 8, 3])
    model.layers[1].weight.data[:rows] = 0.0
    return model


def small(model: nn.Module, x: Any = X) -> Any:
    return shrink(model, x, 1)


def test_a_class_with_hyperparameters_is_built_from_the_file(tmp_path: Path) -> None:
    module = small(dead_mlp())
    assert sorted(path.name for path in save_shrunk(module, tmp_path / "small").iterdir()) == ["model.pt", "shape.json"]
    loaded = load_shrunk(tmp_path / "small", MLP)
    assert type(loaded) is MLP
    assert loaded.layers[1].out_features == 7
    assert torch.equal(loaded(X), module(X))
    plain = torch.load(tmp_path / "small" / "model.pt", weights_only=True)  # without this package
    assert plain["layers.1.weight"].shape == (7, 6)


@pytest.mark.slow
def test_a_network_with_norms_and_heads_comes_back(tmp_path: Path) -> None:
    residual, encoder = seeded(Residual).eval(), seeded(Encoder).eval()
    for norm in (residual.norm, residual.norm2):
        norm.weight.data[3] = norm.bias.data[3] = 0.0
    encoder.o.weight.data[:, :4] = 0.0
    for number, (model, x) in enumerate([(residual, torch.randn(2, 3, 8, 8)), (encoder, torch.randn(2, 5, 12))]):
        module = small(model, x)
        folder = save_shrunk(module, tmp_path / str(number))
        loaded = load_shrunk(folder, type(model)).eval()
        assert torch.equal(loaded(x), module.eval()(x))
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(load_shrunk(folder, model).eval()(x), loaded(x))
    assert loaded.num_heads == 2
    assert encoder.num_heads == 3


@pytest.mark.slow
def test_trained_on_and_shrunk_again(tmp_path: Path) -> None:
    first = small(dead_mlp())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn_like(parameter))
    first.layers[3].weight.data[2] = 0.0
    first.layers[1].weight.data[[0, 6]] = 0.0  # of those that are left
    second = small(load_shrunk(save_shrunk(first, tmp_path / "first"), MLP))
    loaded = load_shrunk(save_shrunk(second, tmp_path / "second"), MLP)
    assert [loaded.layers[i].out_features for i in (1, 3)] == [5, 7]
    assert torch.equal(loaded(X), second(X))
    torch.testing.assert_close(loaded(X), first(X), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "second" / "shape.json").read_text())["kept"]["layers.1.weight"]["0"] == [4, 5, 6, 7, 8]


def test_a_module_that_was_not_shrunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not shrunk"):
        save_shrunk(dead_mlp(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Other(MLP):
    """The same tensors under another class."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Other, "holds a lightning_sparse.examples.mlp.MLP, got a .*Other"),
        (lambda: MLP([6, 11, 8, 3]), r"another MLP: layers.1.bias had shape \[10\], here \[11\]"),
        (lambda: nn.Linear(6, 3), "got a torch.nn.modules.linear.Linear"),
        (Residual, r"the folder holds a lightning_sparse.examples.mlp.MLP, got the class Residual: give MLP"),
    ],
)
@pytest.mark.slow
def test_another_class_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    folder = save_shrunk(small(dead_mlp()), tmp_path / "small")
    with pytest.raises(ValueError, match=message):
        load_shrunk(folder, make)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.pt", cut, "damaged"),
        ("model.pt", flip, "damaged"),
        ("model.pt", Path.unlink, "holds no model.pt"),
        ("shape.json", cut, "damaged"),
        ("shape.json", Path.unlink, "holds no shape.json"),
        ("shape.json", lambda path: path.write_text('{"format": 9}'), "format 9, this version reads 1"),
        ("shape.json", lambda path: path.write_text("[]"), "damaged"),
        ("shape.json", lambda path: path.write_text(path.read_text().replace(" 99\n", " 9999\n")), "do not belong together"),
        ("model.pt", lambda path: torch.save({"layers.1.weight": torch.ones(3)}, path), "do not belong together"),
    ],
)
@pytest.mark.slow
def test_damaged_files_are_refused(file: str, damage: Any, message: str, tmp_path: Path) -> None:
    folder = save_shrunk(small(dead_mlp(sizes=[6, 100, 80, 3])), tmp_path / "small")
    damage(folder / file)
    with pytest.raises(ValueError, match=message):
        load_shrunk(folder, MLP)
