"""A target that the groups of a structure cannot reach is refused before training; no line claims a share that was not measured."""

from __future__ import annotations

import logging
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from toys import Toy, data, trainer, weights

from lightning_sparse.callbacks import MagnitudePruning, Sparsify
from lightning_sparse.scores import Magnitude
from lightning_sparse.structure import Blocks, Channels, Heads, Rows, Structure

pytestmark = pytest.mark.filterwarnings("ignore:.*has left one group of each of")  # targets at the limit of a toy


class Attention(nn.Module):
    """Attention whose head size is fixed at the start."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, width // heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, self.heads, self.head_size).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, t, self.heads * self.head_size))
        return out


class Layer(nn.Module):
    """Attention and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """Two layers on four parts of the input."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.inputs, self.head = nn.Linear(2, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Layer(width, heads) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inputs(x.unflatten(-1, (4, 2)))
        for block in self.blocks:
            y = block(y)
        out: Tensor = self.head(y.mean(1))
        return out


def refusal(network: nn.Module, callback: Any) -> str:
    module = Toy(network)
    before = weights(module)
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        trainer(callback).fit(module, data())
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())
    return str(caught.value)


@pytest.mark.parametrize("form", [Sparsify, MagnitudePruning])
def test_channels_cannot_remove_attention(form: Any) -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    network = Transformer()
    said = refusal(network, form(target_sparsity=0.9, structure=Channels()))
    mlp, attention = sum(p.numel() for p in network.blocks[0].mlp.parameters()) - 16, 4 * 16 * 16  # without the last bias
    size = 2 * (mlp + attention) + 2 * 16 + 3 * 16
    most = 2 * mlp * 63 / 64
    share = int(1000 * most / size) / 10
    assert said.startswith(f"target_sparsity=0.9 cannot be reached: Channels() can make at most {share:g} % of the {size:,} selected")
    assert "network.blocks.0.attn.q.weight (and 9 more) lie in no group, and one group of each axis stays" in said
    assert "add a callback with structure=Heads() for them" in said
    assert f"give at most {int(share) / 100:g}" in said
    excluded = eval(re.search(r"select=(\[.*\])", said)[1])  # type: ignore[index] # the advice works
    reached = float(re.search(r"at most ([\d.]+) % of the others", said)[1])  # type: ignore[index]
    assert reached == pytest.approx(100 * 63 / 64, abs=0.1)
    callback = form(target_sparsity=0.9, structure=Channels(), select=excluded)
    trainer(callback, epochs=10).fit(Toy(network), data())
    assert callback.share_of_zeros() >= 0.9
    assert callback.unreached() == []


def test_heads_cannot_remove_perceptrons() -> None:
    pytest.importorskip("torch_pruning")
    said = refusal(Transformer(), Sparsify(0.8, structure=Heads()))
    assert "network.blocks.0.mlp.0.weight" in said
    assert "add a callback with structure=Channels() for them" in said


WITHIN: dict[str, tuple[Structure, float, str]] = {
    "rows": (Rows(), 0.93, r"Rows\(\) can make at most 86.3 % of the 176 selected .* axis stays. Give at most 0.86$"),
    "blocks": (Blocks((8, 8)), 0.8, r"one group of each axis stays. Give at most 0.\d+$"),
}


@pytest.mark.parametrize(("structure", "target", "message"), WITHIN.values(), ids=WITHIN.keys())
def test_groups_within_parameters(structure: Structure, target: float, message: str) -> None:
    assert re.search(message, refusal(Toy().network, MagnitudePruning(target, every=1, structure=structure)))


def test_least_kept_is_named() -> None:
    said = refusal(Toy().network, MagnitudePruning(0.8, every=1, structure=Rows(), least_kept=0.19))
    assert "one group of each axis stays, and least_kept=0.19 of them" in said


@pytest.mark.parametrize("form", [Sparsify, partial(MagnitudePruning, every=1)])
def test_what_is_promised_is_reached(form: Any) -> None:
    for structure in (Rows(), Blocks((4, 4))):
        said = refusal(Toy().network, form(target_sparsity=0.99, structure=structure))
        most = float(re.search(r"[Gg]ive at most ([\d.]+)", said)[1])  # type: ignore[index]
        callback = form(target_sparsity=most, structure=structure)
        trainer(callback, epochs=10).fit(Toy(), data())
        assert callback.share_of_zeros() >= most - 1 / 176


def test_zeros_that_are_kept_count() -> None:
    network = Toy().network
    with torch.no_grad():
        network[0].weight[:, :7] = 0
        network[2].weight[:, :14] = 0
    callback = Sparsify(0.9, structure=Rows(), keep_zeros=True)
    trainer(callback, epochs=10).fit(Toy(network), data())
    assert callback.share_of_zeros() >= 0.9 - 1 / 176  # rows alone make 86 %
    assert not network[0].weight[:, :7].any()  # also in the rows that stay


@pytest.mark.parametrize("target", [0.5, 0.6])
@pytest.mark.parametrize("form", [Sparsify, partial(MagnitudePruning, every=2)], ids=["Sparsify", "pruning"])
def test_zeros_that_are_kept_in_groups_that_stay_are_part_of_the_target(form, target) -> None:
    torch.manual_seed(0)
    network = Toy().network
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.weight *= torch.rand_like(layer.weight) > 0.5
    callback = form(target, structure=Rows(), keep_zeros=True)
    trainer(callback, epochs=10).fit(Toy(network), data())
    assert target <= callback.share_of_zeros() <= target + 16 / 176  # the longest row has 16 weights


class Thawed(BaseFinetuning):
    """Unfreezes a layer in the course of the run."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network[2])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[2], optimizer, lr=1e-2)


def test_where_it_is_not_known_before_the_measured_share_is_told(caplog: Any) -> None:
    callback = Sparsify(0.93, structure=Rows())
    module = Toy(optimizer=lambda p: torch.optim.Adam([w for w in p if w.requires_grad], 1e-2))
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match=r"does not meet target_sparsity=0.93 .*, 8\d.\d\d% in all"):
        trainer(callback, Thawed(), epochs=8).fit(module, data())
    assert "meets target_sparsity" not in caplog.text
    (said,) = callback.unreached()
    assert said == f"{callback.share_of_zeros():.2%} of the selected weights are zero and can be, target_sparsity is 0.93"


def test_the_line_of_a_met_target_states_the_measured_share(caplog: Any) -> None:
    callback = Sparsify(0.4, structure=Rows())
    with caplog.at_level(logging.INFO):
        trainer(callback, epochs=8).fit(Toy(), data())
    (said,) = re.findall(r"meets target_sparsity=0.4 at step \d+: .*, (.*)% in all", caplog.text)
    assert float(said) == pytest.approx(100 * callback.share_of_zeros(), abs=0.005)
    assert float(said) != 40.0  # whole rows


def test_layers_with_one_group_left_are_named() -> None:
    pytest.importorskip("torch_pruning")
    callback = Sparsify(0.65, structure=Channels())  # nearly all that channels can remove
    with pytest.warns(UserWarning, match=r"has left one group of each of network.blocks.\d.mlp.0 \(64\).*least_kept=0.05"):
        trainer(callback, epochs=10).fit(Toy(Transformer()), data())
    assert callback.share_of_zeros() >= 0.65


def test_the_least_kept_that_the_warning_names_keeps_two_groups() -> None:
    def left(**more: float) -> tuple[int, int]:
        torch.manual_seed(0)
        module = Toy(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)))
        with torch.no_grad():
            module.network[0].weight.mul_(0.01)
        form = Sparsify(0.6, structure=Rows(), score=Magnitude(), select=["network.0.weight", "network.2.weight"], **more)
        trainer(form, epochs=5).fit(module, data())
        return form.groups_left()["network.0.weight"]

    with pytest.warns(UserWarning, match="has left one group of each of") as said:
        assert left() == (1, 24)
    (named,) = {
        found[1] for one in said if (found := re.search(r"Give least_kept=([\d.]+), which keeps two groups of each", str(one.message)))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has left one group of each of")
        assert left(least_kept=float(named)) == (2, 24)


def test_a_network_with_one_group_of_each_axis_is_reported_whatever_the_target() -> None:
    with pytest.warns(UserWarning, match=r"has left one group of each of network.0.weight \(16\).*next to nothing. Give a smaller target"):
        trainer(Sparsify(0.93, structure=Rows(), select=["network.0.weight"]), epochs=5).fit(Toy(), data())
