"""Coupled groups: what belongs to a channel, the proof that it can be removed, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from coupled import Branching, Decoder, Encoder, Residual, Tied, seeded
from torch import Tensor, nn
from toys import Toy

from lightning_sparse import surgery
from lightning_sparse.coupling import Entry, Group, groups, indices, kept, left_out
from lightning_sparse.examples.lenet5 import LeNet5
from lightning_sparse.examples.resnet import ResNet

PICTURES, TOKENS = torch.randn(3, 3, 8, 8), torch.randn(2, 5, 12)


def named(found: list[Group], name: str) -> Group:
    return next(group for group in found if group.name == name)


def places(group: Group) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(entry.name, entry.dim): entry.indices for entry in group.entries}


def axes(found: list[Group]) -> dict[str, str]:
    return {group.axis: group.kind for group in found if group.exact}


def test_a_channel_before_a_flatten_goes_with_its_columns() -> None:
    """The columns are those of the flattened input that the channel reaches, read off a forward."""
    model, x = LeNet5(), torch.randn(2, 1, 28, 28)
    found = groups(model, x)
    assert axes(found) == {"layers.0": "channel", "layers.2": "channel", "layers.5": "neuron"}
    group, seen = named(found, "layers.2[7]"), []
    hook = model.layers[5].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    with torch.no_grad():
        model.layers[2].bias[7] += 100.0
    model(x)
    hook.remove()
    moved = (seen[0] != seen[1]).any(0).nonzero().flatten()
    assert places(group) == {("layers.2.weight", 0): (7,), ("layers.2.bias", 0): (7,), ("layers.5.weight", 1): tuple(moved.tolist())}
    assert [entry.name for entry in group.parameters("consumer")] == ["layers.5.weight"]


@pytest.mark.slow
def test_a_residual_channel_joins_all_producers_norms_and_consumers() -> None:
    group = named(groups(seeded(Residual), PICTURES), "stem[4]")
    own = {(f"{norm}.{leaf}", 0) for norm in ("norm", "norm2") for leaf in ("weight", "bias", "running_mean", "running_var")}
    own |= {("stem.weight", 0), ("stem.bias", 0), ("second.weight", 0), ("first.weight", 1), ("depth.weight", 0), ("depth.bias", 0)}
    assert places(group) == dict.fromkeys(own, (4,)) | {("head.weight", 1): (16, 17, 18, 19)}
    assert {entry.name for entry in group.entries if entry.role == "statistic"} == {
        f"norm{i}.running_{s}" for i in ("", 2) for s in ("mean", "var")
    }


@pytest.mark.parametrize(
    ("network", "x", "expected"),
    [
        (Residual, PICTURES, {"stem": "channel", "first": "channel"}),
        (Encoder, TOKENS, {"": "head", "gate": "neuron"}),
    ],
)
def test_removed_equals_zeroed(network: type[nn.Module], x: Tensor, expected: dict[str, str]) -> None:
    model = seeded(network).eval()
    found = groups(model, x)
    kinds = axes(found)
    assert sorted(kinds.values()) == sorted(expected.values())
    removed = [group for group in found if group.exact and int(group.name.partition("[")[2][:-1]) % 3 == 1]
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for group in removed:
            for entry in group.parameters():
                parameters[entry.name].index_fill_(entry.dim, torch.tensor(entry.indices), 0.0)
        smaller = surgery.duplicate(model)
        surgery.cut_(smaller, *kept(model, removed))
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_heads_lower_the_number_of_heads_and_the_residual_stream_is_left_out() -> None:
    found = groups(seeded(Encoder), TOKENS)
    head = next(group for group in found if group.kind == "head")
    assert head.counts == (("num_heads", 1),)
    assert places(head)[("q.weight", 0)] == places(head)[("o.weight", 1)] == (0, 1, 2, 3)
    reasons = {axis: reason for axis, _, reason in left_out(found)}
    assert list(reasons) == ["o"]  # the axis of the tokens' features, through the skip connection to the input


@pytest.mark.slow
def test_a_single_head_stays() -> None:
    found = groups(seeded(Encoder, 12, 1), TOKENS)
    assert [(group.axis, group.reason) for group in found if group.kind == "head"] == [("heads", "it is the only group of heads")]
    assert axes(found) == {"gate": "neuron"}


@pytest.mark.slow
def test_the_module_is_left_as_it_was() -> None:
    model = Toy(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3)))
    model.network[0].requires_grad_(False)  # a frozen layer keeps its groups
    model.network[2].eval()
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    found = groups(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    assert sum(group.exact for group in found) == 16
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert (id(p), p.requires_grad) == before[name][:2]
        assert torch.equal(p, before[name][2])
        assert p.grad is None


def test_the_trainer_is_not_copied() -> None:
    model = Toy()
    marker = model.network.marker = torch.nn.Identity()
    vars(model)["_trainer"] = trainer = type("Uncopied", (), {"__deepcopy__": lambda self, memo: pytest.fail("copied")})()
    copied = surgery.duplicate(model)
    assert vars(copied)["_trainer"] is None
    assert vars(model)["_trainer"] is trainer
    assert copied.network.marker is not marker


def wrong_columns(group: Group) -> Group:
    return replace(
        group, entries=tuple(replace(e, indices=((e.indices[0] + 1) % 6,)) if e.role == "consumer" else e for e in group.entries)
    )


def no_consumer(group: Group) -> Group:
    return replace(group, entries=tuple(e for e in group.entries if e.role != "consumer"))


def no_bias(group: Group) -> Group:
    return replace(group, entries=tuple(e for e in group.entries if not e.name.endswith("bias")))


@pytest.mark.parametrize("mutant", [wrong_columns, no_consumer, no_bias])
@pytest.mark.parametrize("zero", [False, True], ids=["dense", "all zero"])
@pytest.mark.slow
def test_inexact_groups_are_rejected(mutant: Callable[[Group], Group], zero: bool) -> None:
    """Also in a network whose weights are zero, where wrong columns make no difference."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 4)
    if zero:
        for p in model.parameters():
            nn.init.zeros_(p)
    right = groups(model, x)[:6]
    assert all(group.exact for group in right)
    assert all(group.exact for group in groups(model, x, named=right, source=None))
    wrong = groups(model, x, named=[mutant(group) for group in right], source=None)
    assert not any(group.exact for group in wrong)
    assert all(group.reason for group in wrong)


@pytest.mark.slow
def test_channels_inside_heads_are_rejected() -> None:
    model = seeded(Encoder)
    columns = [Entry(f"{name}.weight", 0, (i,), "producer") for i in (0, 4, 8) for name in "qkv"]
    bias = [Entry(f"{name}.bias", 0, (i,), "producer") for i in (0, 4, 8) for name in "qkv"]
    across = [
        Group(
            f"own[{j}]",
            "own",
            "neuron",
            tuple(
                replace(e, indices=(e.indices[0] + j,))
                for e in [
                    *columns,
                    *bias,
                    Entry("o.weight", 1, (0,), "consumer"),
                    Entry("o.weight", 1, (4,), "consumer"),
                    Entry("o.weight", 1, (8,), "consumer"),
                ]
            ),
        )
        for j in range(4)
    ]
    found = groups(model, TOKENS, named=across, source=None)
    assert not any(group.exact for group in found)


@pytest.mark.slow
def test_grouped_convolutions_lose_the_same_channel_in_each_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    found = [group for group in groups(model, PICTURES) if group.exact]
    assert {group.axis: len(group.entries[0].indices) for group in found} == {"0": 2, "2": 2}
    assert len(found) == 8
    assert named(found, "0[1]").parameters("producer")[0].indices == (1, 5)


@pytest.mark.slow
def test_a_norm_over_channels_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    reasons = {axis: reason for axis, _, reason in left_out(groups(model, torch.randn(5, 4)))}
    assert "LayerNorm averages over its channels" in reasons["0"]


@pytest.mark.slow
def test_padded_channels_are_left_out_and_the_others_found() -> None:
    """Shortcuts of ResNet-8 pad channels with zeros, which the trace takes for the same channels."""
    found = groups(ResNet(depth=8, width=4), PICTURES)
    assert len([axis for axis, kind in axes(found).items() if kind == "channel"]) >= 3  # those inside of the blocks
    assert any("the trace misreads it" in reason for _, _, reason in left_out(found))


@pytest.mark.slow
def test_layers_that_cannot_be_cut_are_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.attention, self.head = (
                nn.GRU(12, 8, batch_first=True),
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(x)[0]
            scores: Tensor = self.head(self.attention(h, h, h)[0])
            return scores

    reasons = {axis: reason for axis, _, reason in left_out(groups(Recurrent(), TOKENS))}
    assert "GRU" in reasons["rnn"]
    assert "to remove heads, write it with nn.Linear and scaled_dot_product_attention" in reasons["attention"]


def test_grouped_query_heads_and_gated_neurons_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # not needed
    model = seeded(Decoder).eval()
    found = groups(model, TOKENS, source="names")
    assert axes(found) == {"heads": "head", "gate_proj": "neuron"}
    assert all(group.exact for group in found)
    head = named(found, "heads[1]")
    assert {name: len(taken) for (name, _), taken in places(head).items()} == dict.fromkeys(
        ("q_proj.weight", "o_proj.weight"), 8
    ) | dict.fromkeys(("k_proj.weight", "v_proj.weight"), 4)
    smaller = surgery.duplicate(model)
    surgery.cut_(smaller, *kept(model, [head, named(found, "gate_proj[3]")]))
    with torch.no_grad():
        model.o_proj.weight[:, 8:] = 0.0
        model.down_proj.weight[:, 3] = 0.0
        torch.testing.assert_close(smaller(TOKENS), model(TOKENS))
    assert smaller.num_key_value_heads == 1


def test_names_that_lie_are_left_out() -> None:
    class Mixed(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(-1)) + self.up_proj(x).mean(-1, keepdim=True)

    found = groups(seeded(Mixed), TOKENS, source="names")
    assert axes(found) == {"heads": "head"}


@pytest.mark.slow
def test_tied_matrices_are_left_out_by_name() -> None:
    found = groups(seeded(Tied), torch.randn(4, 6))
    reasons = {axis: reason for axis, _, reason in left_out(found)}
    assert "tied" in reasons["first"]


@pytest.mark.slow
def test_named_groups_replace_those_that_they_overlap_with() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 4)
    pairs = [
        Group(
            f"pair[{i}]",
            "pair",
            "neuron",
            (Entry("0.weight", 0, both, "producer"), Entry("0.bias", 0, both, "producer"), Entry("2.weight", 1, both, "consumer")),
        )
        for i, both in enumerate([(0, 1), (2, 3), (4, 5)])
    ]
    assert [group.name for group in groups(model, x, named=pairs) if group.exact] == ["pair[0]", "pair[1]", "pair[2]"]
    with pytest.raises(ValueError, match=r"no tensor '0.weights'; closest: '0.weight'"):
        groups(model, x, named=[replace(pairs[0], entries=(Entry("0.weights", 0, (0,), "producer"),))])
    with pytest.raises(ValueError, match="has shape"):
        groups(model, x, named=[replace(pairs[0], entries=(Entry("0.weight", 0, (6,), "producer"),))])


@pytest.mark.slow
def test_another_source_is_proved_too() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 4)
    right = [replace(group, axis="mine") for group in groups(model, x)[:6]]
    mixed = [[[wrong_columns(group) for group in right], right]]
    assert groups(model, x, source=lambda module, inputs, heads: mixed) == right


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)
    return model


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Tagger(nn.Module):
    """An embedding, an LSTM and a classifier: torch-pruning cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.words(x))[0][:, -1])
        return out


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (lambda: nn.Linear(4, 2), None, "example_inputs are missing"),
        (lambda: nn.Linear(4, 2), torch.randn(2, 5), "fails on the example inputs"),
        (Branching, torch.randn(2, 4), "control flow"),
        (quantised, torch.randn(2, 4), "0.weight is torch.int8"),
        (parametrised, torch.randn(2, 4), "remove_parametrizations"),
        (pruned, torch.randn(2, 4), "prune.remove"),
        (lambda: nn.LazyLinear(3), torch.randn(2, 4), "no shape yet"),
        (Tagger, torch.zeros(2, 6, dtype=torch.long), "because of its recurrent layers .lstm.*Single zeros.*onnx.*names.*by hand"),
        (lambda: Detached(4, 2), torch.randn(2, 4), "cannot be traced.*no output has a gradient.*names.*by hand"),
    ],
)
def test_refusals_say_what_to_do(make: Callable[[], nn.Module], inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups(make(), inputs)


@pytest.mark.slow
def test_a_fixed_branch_can_be_accepted() -> None:
    found = groups(Branching(), torch.ones(2, 4), allow_branches=True)
    assert {group.axis for group in found if group.exact} == {"a"}


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"lightning-sparse\[shrink\]"):
        groups(nn.Linear(4, 2), torch.randn(2, 4))


def test_overlapping_entries_are_joined() -> None:
    first = Group("a[0]", "a", "neuron", (Entry("w", 0, (1,), "producer"),))
    assert indices([first, replace(first, entries=(Entry("w", 0, (3,), "producer"), Entry("w", 1, (0,), "consumer")))]) == {
        "w": {0: {1, 3}, 1: {0}}
    }


class Narrow(nn.Module):
    """Attention as it is often written: the head size is the width of the input, divided by the heads."""

    def __init__(self, fused: bool = False, fixed: bool = False) -> None:
        super().__init__()
        self.n_head, self.fused, self.head_size = 4, fused, 4 if fixed else 0
        self.joined = nn.Linear(16, 48) if fused else nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        size = self.head_size or d // self.n_head
        parts = self.joined(x).chunk(3, -1) if self.fused else [part(x) for part in self.joined]
        q, k, v = (part.view(b, t, self.n_head, size).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.proj(mixed.reshape(b, t, self.n_head * size))
        return out


@pytest.mark.parametrize("fused", [False, True])
def test_attention_that_fails_without_a_head_is_told_how_to_fix_the_head_size(fused: bool) -> None:
    x = torch.randn(2, 3, 16)
    (reason,) = {group.reason for group in groups(Narrow(fused), x) if group.kind == "head"}
    assert reason.startswith("the network without it fails: RuntimeError: shape '[2, 3, 3, 5]' is invalid")
    assert "compute it once in __init__ (self.head_size = d // n_head), use view(b, t, self.n_head, self.head_size) and end with" in reason
    assert reason.endswith("reshape(b, t, self.n_head * self.head_size)")
    found = [group for group in groups(Narrow(fused, fixed=True), x) if group.kind == "head"]
    assert len(found) == 4
    assert all(group.exact for group in found)
