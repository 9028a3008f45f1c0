"""The 2:4 pattern is recognised anywhere; the layers need CUDA, and say so."""

from __future__ import annotations

import pytest
import torch
from export_networks import mlp
from torch import nn

from lightning_sparse.export import is_semi_structured, semi_structured


def two_of_four(rows=64, columns=64):
    weight = torch.randn(rows, columns)
    smallest = weight.abs().unflatten(1, (-1, 4)).argsort(2)[..., :2]
    return weight.unflatten(1, (-1, 4)).scatter(2, smallest, 0.0).flatten(1)


def test_the_pattern_is_two_of_four_along_rows():
    weight = two_of_four()
    assert is_semi_structured(weight)
    weight[3, 8:12] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert not is_semi_structured(weight)
    assert is_semi_structured(torch.zeros(4, 4))
    assert not is_semi_structured(torch.ones(4, 4))
    assert not is_semi_structured(torch.zeros(4, 6))
    column = torch.ones(8, 8)
    column[::2] = 0  # two of four along the columns
    assert not is_semi_structured(column)


def test_a_cpu_is_refused_with_what_to_do():
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        network[0].weight.copy_(two_of_four())
    with pytest.raises(ValueError, match=r"needs a CUDA device.*on cpu, where 1 of 2 Linear layers have the pattern.*to_sparse"):
        semi_structured(network)


def test_networks_without_the_pattern_are_refused_layer_by_layer():
    with pytest.raises(ValueError, match=r"no layer has a 2:4 pattern: 0: a group of four .*; 4: its shape 10 x 32"):
        semi_structured(mlp(0.1))
    with pytest.raises(ValueError, match=r"there is no nn.Linear"):
        semi_structured(nn.ReLU())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_computes_the_same_on_a_gpu():
    network = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).cuda()
    with torch.no_grad():
        network[0].weight.copy_(two_of_four(256, 256))
    with pytest.raises(ValueError, match="float16 and bfloat16"):
        semi_structured(network)
    network = network.half()
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        torch.testing.assert_close(semi_structured(network)(x), network(x), rtol=1e-2, atol=1e-2)
