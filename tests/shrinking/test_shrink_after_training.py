"""Networks that callbacks of this package trained become as small as their live groups, with the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Toy, trainer

from lightning_sparse import penalties, shrink
from lightning_sparse.callbacks import AdaptiveProx, ReweightedPenalty
from lightning_sparse.examples.digits import Digits
from lightning_sparse.examples.vit import ViT
from lightning_sparse.structure import Channels, Heads, Rows

pytestmark = pytest.mark.slow
LOG_SUM = penalties.LogSum(eps=2.0)


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    data = Digits()
    data.setup("fit")
    x, y = data.parts["training"]
    return x.view(-1, 1, 8, 8)[:512], y[:512]


def fit(network: nn.Module, callback: object, pictures: tuple[Tensor, Tensor]) -> Toy:
    module = Toy(network, decay=True)
    module.example_input_array = pictures[0][:4]
    trainer(callback, epochs=3).fit(module, DataLoader(TensorDataset(*pictures), batch_size=64))
    return module.eval()


@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveProx])
def test_channels(form: type[ReweightedPenalty], pictures: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    features = (nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU())
    module = fit(
        nn.Sequential(*features, nn.Flatten(), nn.Linear(12 * 16, 10)), form(LOG_SUM, target_sparsity=0.5, structure=Channels()), pictures
    )
    norm, second = module.network[1], module.network[3]
    live = int(((norm.weight != 0) | (norm.bias != 0)).sum()), int((second.weight.flatten(1).any(1) | (second.bias != 0)).sum())
    small = shrink(module, pictures[0][:16], round_to=1)
    assert (small.network[0].out_channels, small.network[3].out_channels) == live
    assert sum(live) < 28
    torch.testing.assert_close(small(pictures[0]), module(pictures[0]), rtol=1e-4, atol=1e-5)


def test_rows_of_a_linear_layer(pictures: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    callback = ReweightedPenalty(LOG_SUM, target_sparsity=0.5, structure=Rows(), select=["network.1.weight"])
    module = fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), callback, pictures)
    live = int(module.network[1].weight.any(1).sum())
    small = shrink(module, pictures[0][:16], round_to=1)
    assert small.network[1].out_features == live == 16
    torch.testing.assert_close(small(pictures[0]), module(pictures[0]), rtol=1e-4, atol=1e-5)


def test_heads(pictures: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    network = ViT(image=8, patch=2, width=16, depth=1, heads=4)
    callback = ReweightedPenalty(LOG_SUM, target_sparsity=0.5, structure=Heads(), select=["*.attention.*"])
    module = fit(network, callback, pictures)
    attention = module.network.layers[1].attention[1]
    live = int(attention.o.weight.unflatten(1, (4, -1)).any(2).any(0).sum())
    small = shrink(module, pictures[0][:16])
    assert small.network.layers[1].attention[1].heads == live < 4
    torch.testing.assert_close(small(pictures[0]), module(pictures[0]), rtol=1e-4, atol=1e-5)
