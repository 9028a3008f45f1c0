"""The residual networks: sizes, shortcuts, weights from files, optimisers, and a tiny fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_sparse import shrink
from lightning_sparse.callbacks import Sparsify
from lightning_sparse.examples.batches import ShuffledBatches
from lightning_sparse.examples.resnet import Block, ResNet
from lightning_sparse.structure import Channels

FEW = {"max_epochs": 2, "logger": False, "accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False}


def test_the_depth_counts_layers_with_weights() -> None:
    for depth in (8, 20, 56):
        layers = [layer for layer in ResNet(depth, width=4).modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth


def test_resnet_20_has_the_published_number_of_parameters() -> None:
    assert round(sum(parameter.numel() for parameter in ResNet(20).parameters()) / 1e6, 2) == 0.27  # table 6 of arXiv 1512.03385
    assert round(sum(parameter.numel() for parameter in ResNet(56).parameters()) / 1e6, 2) == 0.85


def test_a_shortcut_keeps_every_second_pixel_between_zero_channels() -> None:
    block = Block(4, 8).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("prefix", ["", "module.", "layers.", "module.layers."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_come_from_a_file(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    given = ResNet(8, width=4).eval()
    state = {prefix + name: tensor for name, tensor in given.layers.state_dict().items() if not name.endswith("tracked")}
    torch.save({"state_dict": state, "best": 1.0} if wrapped else state, tmp_path / "w.th")
    found, other = (ResNet(8, width=4, weights=file).eval() for file in (str(tmp_path / "w.th"), None))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(x), given(x))
    assert not torch.equal(other(x), given(x))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    state = dict(ResNet(8, width=4).layers.state_dict())
    if change == "missing":
        del state["conv1.weight"]
    elif change == "unknown":
        state["fc.weight"] = torch.zeros(1)
    else:
        state["conv1.weight"] = torch.zeros(5, 3, 3, 3)
    torch.save(state, tmp_path / "w.th")
    with pytest.raises(ValueError, match=r"does not fit: 1 entries are .*(conv1|fc)\.weight"):
        ResNet(8, width=4, weights=str(tmp_path / "w.th"))


def test_a_file_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    torch.save(ResNet(8, width=4).layers, tmp_path / "w.th")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        ResNet(8, width=4, weights=str(tmp_path / "w.th"))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights in .*none\.th; give --model\.weights"):
        ResNet(weights=str(tmp_path / "none.th"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": 18}, "depth must be 6 n \\+ 2"),
        ({"optimizer": "sdg"}, "optimizer must be 'sgd' or 'adamw', got 'sdg'"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"weight_decay": -1.0}, "weight_decay must lie in"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ResNet(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_a_fit_uses_the_optimiser_and_a_checkpoint_opens_without_the_weights_file(tmp_path: Path, name: str, kind: type) -> None:
    torch.save(ResNet(8, width=4).layers.state_dict(), tmp_path / "w.th")
    net = ResNet(8, width=4, weights=str(tmp_path / "w.th"), optimizer=name, lr=0.01, weight_decay=3e-4)
    loader = ShuffledBatches(torch.randn(16, 3, 32, 32), torch.arange(16) % 10, 4, seed=0)
    trainer = Trainer(callbacks=[Sparsify(0.5)], enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0, **FEW)
    trainer.fit(net, loader)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["weight_decay"] == 3e-4
    assert optimizer.param_groups[0].get("momentum", 0.9) == 0.9
    weights = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pytest.approx(0.5, abs=1e-3)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    (tmp_path / "w.th").unlink()
    again = ResNet.load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Channels.. makes groups zero on 3 axes and leaves out 1")  # those between blocks: padded shortcuts
def test_channels_inside_of_blocks_are_removed_without_a_change() -> None:
    net = ResNet(8, width=8, lr=0.01)
    trainer = Trainer(callbacks=[Sparsify(0.5, structure=Channels())], enable_model_summary=False, log_every_n_steps=1, **FEW)
    trainer.fit(net, ShuffledBatches(torch.randn(16, 3, 32, 32), torch.arange(16) % 10, 2, seed=0))
    x = torch.randn(2, 3, 32, 32)
    small = shrink(net.eval(), (x,), round_to=1)
    assert torch.allclose(small(x), net(x), atol=1e-5)
    weights = [sum(p.numel() for p in one.parameters() if p.dim() > 1) for one in (small, net)]
    assert weights[0] == pytest.approx(0.5 * weights[1], rel=0.05)
    outputs = [[block.conv2.out_channels for block in one.modules() if isinstance(block, Block)] for one in (small, net)]
    assert outputs[0] == outputs[1]
