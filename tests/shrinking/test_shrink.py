"""Shrinking: what is removed, what is folded into biases, what stays, and that the outputs stay the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from coupled import Branching, Encoder, Residual, Tied, seeded
from torch import Tensor, nn
from toys import Toy, data, trainer

import lightning_sparse
from lightning_sparse import coupling, surgery
from lightning_sparse.export.latency import Timing
from lightning_sparse.shrinking import Report, Shrunk, dead, shrink_and_report
from lightning_sparse.shrinking.report import count_multiply_adds, count_samples
from lightning_sparse.shrinking.shrink import rounded

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
PICTURES, TOKENS = torch.randn(3, 3, 8, 8), torch.randn(2, 5, 12)


def small(module: nn.Module, x: Any, round_to: int = 1, **options: Any) -> Shrunk[Any]:
    return shrink_and_report(module, x, round_to, seconds=0, **options)


def network(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), activation or nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def same(first: nn.Module, second: nn.Module, x: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(first.eval()(x), second.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_constant_neuron_goes_into_the_next_bias() -> None:
    """Compared with the formula W2' = W2[:, live], b2' = b2 + W2[:, dead] f(b1[dead])."""
    model = network(nn.Sigmoid())
    model[0].weight.data[[1, 4]] = 0.0
    found = small(model, X)
    live, gone = [0, 2, 3, 5, 6, 7], [1, 4]
    w, b = model[2].weight.detach(), model[2].bias.detach()
    assert torch.equal(found.module[0].weight, model[0].weight[live])
    assert torch.equal(found.module[2].weight, w[:, live])
    torch.testing.assert_close(found.module[2].bias.detach(), b + w[:, gone] @ model[0].bias.detach()[gone].sigmoid())
    assert found.report.folded == 2
    assert found.report.widths == {"0": (8, 6, "neuron")}
    assert found.report.parameters == (8 * 6 + 6 * 9 + 2 * 7, 6 * 6 + 6 * 7 + 2 * 7)
    assert found.report.multiply_adds == (7 * (40 + 48 + 12), 7 * (30 + 36 + 12))
    same(model, found.module, X)


class Pooled(nn.Module):
    """One encoder layer of torch on (batch, 8, 32), and a Linear layer of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x).mean(1))
        return y


def test_multiply_adds_of_attention_and_encoder_layers_are_those_of_a_hand_count() -> None:
    """4 n d^2 of the projections, 2 n^2 d of the two products of attention, 2 n d h of the feed-forward; n = 8, d = 32."""
    batch, attention, feed, head = 16, 4 * 8 * 32**2 + 2 * 8**2 * 32, 2 * 8 * 32 * 64, 32 * 10
    x = torch.randn(batch, 8, 32)
    own = nn.MultiheadAttention(32, 4, batch_first=True)
    was = torch.backends.mha.get_fastpath_enabled()
    assert count_multiply_adds(own, (x, x, x)) == count_multiply_adds(own.double(), (x.double(),) * 3) == batch * attention
    assert count_multiply_adds(Pooled(), x) == batch * (attention + feed + head)
    assert count_multiply_adds(Residual().eval(), PICTURES) > 0
    assert torch.backends.mha.get_fastpath_enabled() == was

    class Scaled(nn.Module):  # attention without weights, of six heads that share two pairs of keys and values
        def forward(self, x: Tensor) -> Tensor:
            few = x[:, :2, :4]
            return nn.functional.scaled_dot_product_attention(x, few, few, enable_gqa=True)

    assert count_multiply_adds(Scaled(), torch.randn(batch, 6, 8, 32)) == batch * 6 * 2 * 8 * 4 * 32


@pytest.mark.slow
def test_a_narrower_encoder_layer_has_fewer_multiply_adds_of_one_sample() -> None:
    model = seeded(Pooled).eval()
    model.encoder.layers[0].linear1.weight.data[:32] = 0.0
    model.encoder.layers[0].linear1.bias.data[:32] = 0.0
    found = small(model, torch.randn(16, 8, 32), round_to=8)
    gone = 2 * 8 * 32 * 32
    assert found.report.multiply_adds[0] - found.report.multiply_adds[1] == 16 * gone
    (row,) = (row for row in found.report.rows() if row[0].startswith("multiply-adds"))
    before, after = (int(cell.replace(",", "")) for cell in row[1:3])
    assert row[0] == "multiply-adds of one sample"
    assert before - after == gone


def test_the_last_line_of_the_report_says_where_nothing_was_gained() -> None:
    slow, noisy = "no gain in speed here: keep the given network", "no gain in speed here is beyond the noise"
    for faster, low, expected in ((1.0, 0.97, slow), (1.1, 0.97, noisy), (1.2, 1.04, noisy), (1.2, 1.1, "")):
        timings = {"before": Timing(1, 1, 1, 1), "A/A": Timing(1, 1, 0.9, 1.05), "after": Timing(1, faster, low, 1.3)}
        for left in (9, 2):
            *_, row, difference, last = [
                "",
                *Report({}, (10, left), (40, 20), 0.0, timings=timings).lines(),
                *([""] if not expected else []),
            ]
            assert last.startswith(expected)
            assert ("structure=Channels()" in last) == (bool(expected) and left == 9)  # of which nothing is left to ask for where much went
            assert row.endswith(f"{faster:.2f}x ({low:.2f} to 1.30; A/A: the given network against itself, 0.90 to 1.05)")
            assert difference.startswith("largest difference")


def test_samples_are_counted_only_where_all_inputs_share_an_axis() -> None:
    assert count_samples((torch.zeros(7, 5), {"mask": torch.zeros(7, 2)}, 3)) == 7
    assert count_samples(torch.zeros(5)) is None
    assert count_samples((torch.zeros(7, 5), torch.zeros(2, 9))) is None  # nodes and edges of a graph
    rows = Report({}, (4, 2), (40, 20), 0.0).rows()
    assert rows[-1][:3] == ("multiply-adds of the example inputs", "40", "20")


@pytest.mark.slow
def test_a_neuron_that_nothing_reads_goes_and_then_what_only_it_read() -> None:
    model = network()
    model[4].weight.data[:, 3] = 0.0  # nothing reads neuron 3 of the second layer,
    model[2].weight.data[:, 5] = 0.0
    model[2].weight.data[3, 5] = 1.0  # which alone reads neuron 5 of the first
    found = small(model, X)
    assert found.report.widths == {"0": (8, 7, "neuron"), "2": (6, 5, "neuron")}
    assert torch.equal(found.module[0].bias, model[0].bias[[0, 1, 2, 3, 4, 6, 7]])
    same(model, found.module, X)


@pytest.mark.slow
def test_an_axis_that_is_all_zero_keeps_one_group() -> None:
    model = network()
    nn.init.zeros_(model[2].weight)
    found = small(model, X)
    assert found.module[2].weight.shape == (1, 1)
    same(model, found.module, X)


@pytest.mark.parametrize(("live", "unit", "expected"), [(1, 1, 1), (1, 4, 4), (5, 4, 8), (4, 4, 4), (7, 3, 9), (9, 8, 10), (10, 1, 10)])
def test_widths_are_rounded_up(live: int, unit: int, expected: int) -> None:
    groups = [coupling.Group(f"a[{i}]", "a", "neuron", ()) for i in range(10)]
    assert 10 - len(rounded(groups, groups[live:], unit)) == expected
    assert set(rounded(groups, groups[live:], unit)) <= set(groups[live:])


@pytest.mark.slow
def test_rounding_keeps_zero_neurons() -> None:
    model = network()
    model[0].weight.data[[0, 1, 2, 5, 6]] = 0.0
    found = small(model, X, round_to=4)  # three live ones of eight
    assert found.module[0].out_features == 4
    assert int((found.module[0].weight == 0).all(1).sum()) == 1
    same(model, found.module, X)
    assert found.report.stayed == {"0": (1, "neuron")}
    assert "1 zero neuron of 1 axis stays, because widths are rounded up to multiples of 4: round_to=1 removes it" in found.report.lines()
    assert not small(model, X).report.stayed
    with pytest.raises(ValueError, match=r"1 group of Sequential is zero, but none can go with round_to=8, .*: give round_to=1.*'fastest'"):
        small(network_with_zero_row(), X, round_to=8)


def test_zero_groups_that_rounding_keeps_are_counted() -> None:
    report = Report({}, (4, 2), (40, 20), 0.0, stayed={"a": (30, "channel"), "b": (2, "neuron")}, unit=8)
    said = "32 zero channels and neurons of 2 axes stay, because widths are rounded up to multiples of 8: round_to=1 removes them"
    assert report.notes() == [said]


def network_with_zero_row() -> nn.Sequential:
    model = network()
    model[0].weight.data[3] = 0.0
    return model


@pytest.mark.parametrize(
    ("padding", "mode", "goes"),
    [(0, "zeros", True), ("valid", "zeros", True), (1, "circular", True), (1, "zeros", False), ("same", "zeros", False)],
)
@pytest.mark.slow
def test_a_constant_channel_goes_only_where_the_next_convolution_sees_it_everywhere(padding: Any, mode: str, goes: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=True), nn.Sigmoid(), nn.Conv2d(6, 4, 3, padding=padding, padding_mode=mode))
    model.append(nn.Flatten()).append(nn.Linear(4 * (16 if padding in (0, "valid") else 36), 2))
    model[0].weight.data[2] = 0.0
    if not goes:
        with pytest.raises(ValueError, match=r"0\[2\] stays, because it is the constant .* pads with zeros"):
            small(model, PICTURES)
        return
    found = small(model, PICTURES)
    assert found.module[0].out_channels == found.module[2].in_channels == 5
    same(model, found.module, PICTURES)


@pytest.mark.slow
def test_a_constant_without_a_bias_to_go_into_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    model[0].weight.data[3] = 0.0
    with pytest.raises(ValueError, match="has no bias"):
        small(model, X)


def zero_norms(model: nn.Module, channels: list[int], *norms: str) -> None:
    for norm in norms:
        for tensor in (model.get_submodule(norm).weight, model.get_submodule(norm).bias):
            tensor.data[channels] = 0.0


@pytest.mark.slow
def test_a_residual_channel_goes_when_both_branches_and_the_depthwise_bias_are_zero() -> None:
    model = seeded(Residual).eval()
    zero_norms(model, [2, 7], "norm", "norm2")
    zero_norms(model, [4], "norm")
    model.depth.bias.data[2] = 0.0
    found = small(model, PICTURES)
    assert found.report.widths == {"stem": (12, 10, "channel")}
    assert found.report.folded == 1  # channel 7 is the depthwise convolution's bias, which the Linear layer takes
    kept = [i for i in range(12) if i not in (2, 7)]
    assert torch.equal(found.module.norm2.running_var, model.norm2.running_var[kept])
    assert found.module.depth.groups == found.module.depth.in_channels == 10
    same(model, found.module, PICTURES)


@pytest.mark.slow
def test_a_channel_that_is_dead_on_the_examples_only_stays() -> None:
    """Its first branch is zero, and its second is behind a ReLU that no example passes."""
    model = seeded(Residual).eval()
    zero_norms(model, [4], "norm")
    model.norm2.bias.data[4] = -1e3  # channel 4 is 0 on every example, and not with other weights
    zero_norms(model, [1], "norm", "norm2")
    found = small(model, PICTURES)
    assert found.report.widths == {"stem": (12, 11, "channel")}
    assert float(found.module.norm2.bias.detach().min()) == -1e3


@pytest.mark.slow
def test_heads_and_gated_neurons_go() -> None:
    model = seeded(Encoder).eval()
    model.v.weight.data[4:8] = 0.0  # the head is its value's bias, whatever it attends to
    model.up.weight.data[3] = 0.0
    model.up.bias.data[3] = 0.0
    found = small(model, TOKENS)
    assert found.report.widths == {"heads": (3, 2, "head"), "gate": (10, 9, "neuron")}
    assert found.module.num_heads == 2
    assert found.module.q.out_features == found.module.o.in_features == 8
    assert model.num_heads == 3
    same(model, found.module, TOKENS)


def test_a_bias_that_is_not_folded_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead, "_add_", lambda *args: None)
    with pytest.raises(ValueError, match="differs from the given one"):
        small(network_with_zero_row(), X)


@pytest.mark.slow
def test_a_group_with_wrong_columns_is_caught() -> None:
    model = network_with_zero_row()
    right = [group for group in coupling.groups(model, X) if group.axis == "0"]
    own = dict(zip("abcdefgh", right, strict=True))
    swapped = [
        coupling.Group(name, "0", "neuron", (*own[name].parameters("producer"), *other.parameters("consumer")))
        for name, other in zip(own, [*right[1:], right[0]], strict=True)
    ]
    model[2].weight.data[:, 2] = 0.0
    with pytest.raises(ValueError, match=r"differs from the given one|nothing to remove"):
        small(model, X, groups=swapped)


@pytest.mark.slow
def test_the_given_module_is_not_changed_and_the_copy_is_of_its_class() -> None:
    model = Toy(network_with_zero_row())
    model.network[4].requires_grad_(False)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    found = small(model, X)
    assert type(found.module) is Toy
    assert found.module.training
    assert [p.requires_grad for p in found.module.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert not {id(p) for p in found.module.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.slow
def test_a_shrunk_module_trains_on() -> None:
    model = Toy(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    model.network[0].weight.data[::2] = 0.0
    found = small(model, torch.randn(2, 8))
    start = {name: p.detach().clone() for name, p in found.module.named_parameters()}
    trainer(max_steps=4).fit(found.module, data())
    assert found.module.network[0].weight.shape == (8, 8)
    assert all(not torch.equal(p, start[name]) for name, p in found.module.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.slow
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = network_with_zero_row().to(dtype)
    found = small(model, X.to(dtype))
    assert {p.dtype for p in found.module.parameters()} == {dtype}
    assert found.module[0].out_features == 7


@pytest.mark.slow
def test_inputs_by_keyword_and_position() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network_with_zero_row()

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"scores": self.net(x) * scale}

    for inputs in ((X, torch.ones(7, 1)), {"x": X, "scale": torch.ones(7, 1)}):
        assert small(Two(), inputs).module.net[0].out_features == 7


def test_a_single_group_that_is_left_out_is_counted_in_the_singular() -> None:
    report = Report({}, (1, 1), (1, 1), 0.0, left_out=[("4", 1, "an output"), ("5", 2, "an output")])
    assert report.notes() == ["left out: 1 group of 4: an output", "left out: 2 groups of 5: an output"]


@pytest.mark.slow
def test_the_function_is_exported_and_prints_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    found = lightning_sparse.shrink(network_with_zero_row(), X, round_to=1, verbose=True)
    assert isinstance(found, nn.Sequential)
    text = capsys.readouterr().out
    for part in ("neurons of 0", "parameters", "multiply-adds", "latency", "A/A", "largest difference", "left out: 2 groups of 4"):
        assert part in text


@pytest.mark.slow
def test_export_script_and_compile_take_it() -> None:
    found = small(network_with_zero_row(), X).module.eval()
    exported = torch.export.export(found, (X,)).module()
    torch.testing.assert_close(exported(X), found(X))
    torch.testing.assert_close(torch.compile(found, backend="eager", fullgraph=True)(X), found(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.slow
def test_script_takes_it() -> None:
    found = small(network_with_zero_row(), X).module.eval()
    torch.testing.assert_close(torch.jit.script(found)(X), found(X))


def test_only_a_network_with_few_zeros_is_asked_whether_it_is_the_sparse_one() -> None:
    dense, sparse = network(), network()
    with torch.no_grad():
        for p in sparse.parameters():
            if p.dim() > 1:
                p[::2, ::2] = p[1::2, 1::2] = 0  # a chessboard: no row and no column is zero
    with pytest.raises(ValueError, match=r"0.0% of its weights are. Is this the sparse checkpoint\? .*structure=Channels\(\)"):
        small(dense, X)
    with pytest.raises(ValueError, match=r"Its zeros \((?:4|5)\d.\d%\) are spread .*: train with structure=Channels\(\)") as refusal:
        small(sparse, X)
    assert "Is this" not in str(refusal.value)


class Filled(nn.Module):
    """Zeros in the place of NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num(0.0)


class Summed(nn.Module):
    """A forward that gives a number for a batch without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network_with_zero_row()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x).sum(0)
        return out


def test_inputs_on_which_outputs_cannot_be_compared_are_refused() -> None:
    """Because NaN counts as equal to NaN, and nothing as equal to nothing."""
    partly = X.clone()
    partly[0] = torch.nan
    nan = r"example_inputs must hold numbers, got a tensor of the shape \(7, 5\) %s: .* give samples without NaN"
    empty = r"example_inputs must hold at least one sample, got a tensor of the shape \(0, 5\): .*, so give a batch, such as x\[:8\]"
    cases = (X * torch.nan, nan % "that is NaN throughout"), (partly, nan % "with NaN that reach the outputs"), (X[:0], empty)
    cases = (*cases, (X.to("meta"), r"must hold numbers, got a tensor of the shape \(7, 5\) on the meta device: give samples"))
    for x, said in cases:
        for module in (network_with_zero_row(), Summed()):
            with pytest.raises(ValueError, match=said):
                lightning_sparse.shrink(module, x)
        with pytest.raises(ValueError, match=said):
            coupling.groups(network_with_zero_row(), {"input": x})
    cures = {"hold no finite number, .*: give other example_inputs": (network_with_zero_row(), X * torch.inf)}
    diverged = network_with_zero_row()
    diverged[2].bias.data.fill_(torch.nan)
    cures["hold no finite number, .*: 2.bias is NaN or infinite"] = (diverged, X)
    for said, (module, x) in cures.items():
        with pytest.raises(ValueError, match=said):
            lightning_sparse.shrink(module, x)
    with pytest.raises(ValueError, match="the outputs of Sequential on the example inputs are empty"):
        surgery.refuse_void_outputs(diverged, X, [torch.zeros(0, 2)])
    model = nn.Sequential(Filled(), network_with_zero_row())
    assert small(model, partly).module[1][0].out_features == 7  # a forward may take NaN for values that are missing


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="none of its 14 channels, neurons and heads is zero"):
        small(network(), X)
    with pytest.raises(ValueError, match="example_inputs are missing"):
        small(network(), None)
    with pytest.raises(ValueError, match="control flow"):
        small(Branching(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="tied"):
        small(seeded(Tied), torch.randn(4, 6))
    with pytest.raises(ValueError, match="round_to must be a whole number >= 1"):
        small(network_with_zero_row(), X, round_to=0)


@pytest.mark.slow
def test_random_supports_of_a_deep_network() -> None:
    """Neurons left by an unstructured mask, compared with a search over paths of non-zero weights to the output."""
    for seed in range(5):
        torch.manual_seed(seed)
        sizes = [6, 12, 11, 10, 3]
        model = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Sigmoid())))[:-1]
        layers = [m for m in model if isinstance(m, nn.Linear)]
        for layer in layers:
            layer.weight.data *= torch.rand_like(layer.weight) > 0.85
        up, down = [torch.ones(6, dtype=torch.bool)], [torch.ones(3, dtype=torch.bool)]
        for layer in layers[:-1]:
            up.append((layer.weight != 0).float() @ up[-1].float() > 0)
        for layer in reversed(layers[1:]):
            down.append((layer.weight != 0).float().T @ down[-1].float() > 0)
        alive = [max(int((u & d).sum()), 1) for u, d in zip(up[1:], reversed(down[1:]), strict=True)]
        found = small(model, torch.randn(20, 6))
        assert [m.out_features for m in found.module if isinstance(m, nn.Linear)][:-1] == alive
        same(model, found.module, torch.randn(50, 6))


class Auxiliary(nn.Module):
    """Has a head that forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(5, 16), nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_a_layer_that_forward_does_not_reach_is_named_in_a_warning() -> None:
    module = Auxiliary()
    with torch.no_grad():
        module.body.weight[:4], module.body.bias[:4] = 0, 0
    with pytest.warns(UserWarning, match=r"the trace of forward does not reach aux, so it keeps its width: .* no longer fit"):
        smaller = small(module, X).module
    assert (smaller.body.out_features, smaller.aux.in_features) == (12, 16)


def test_zero_rows_of_channels_that_cannot_be_removed_are_named_with_the_reason() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2)]
    module = nn.Sequential(*layers)
    with torch.no_grad():
        module[0].weight[:3] = 0
    said = r"none of its 6 channels.* Whole rows are zero \(3 of 0.weight\), but of channels that cannot be removed: 0: GroupNorm averages"
    with pytest.raises(ValueError, match=said):
        small(module, PICTURES)
