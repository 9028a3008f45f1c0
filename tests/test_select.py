"""Selection by name: default, patterns, and parameters that are refused or left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

from lightning_sparse.select import countable, left_out, select


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([2, 2]), nn.Conv2d(1, 2, 3), nn.ConvTranspose1d(1, 2, 3))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.recurrent = nn.LSTM(4, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.free = nn.Parameter(torch.ones(3, 3))
        self.wave = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


DEFAULT = {
    "encoder.0.weight",
    "encoder.2.weight",
    "encoder.3.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "recurrent.weight_ih_l0",
    "recurrent.weight_hh_l0",
    "head.weight",
}


def test_default_selection_is_the_weight_matrices():
    assert set(select(Zoo())) == DEFAULT


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*", "!head.*"], (DEFAULT | {"free"}) - {"head.weight"}),
        (["!recurrent.*", "!attention.*"], {"encoder.0.weight", "encoder.2.weight", "encoder.3.weight", "head.weight"}),
        (["encoder.?.weight"], {"encoder.0.weight", "encoder.2.weight", "encoder.3.weight"}),
        (["free", "encoder.0.*"], {"free", "encoder.0.weight"}),
        (["encoder.1.weight"], {"encoder.1.weight"}),
        (["head.weight", "embedding.weight"], {"head.weight"}),
    ],
)
def test_patterns(patterns, expected):
    chosen = select(Zoo(), patterns)
    assert set(chosen) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([r"encoder\..*"], r"matches no selectable parameter; patterns are globs such as 'blocks.\*', not regular expressions; closest"),
        (["encodr.*"], r"select pattern 'encodr.\*' matches no selectable parameter; closest: 'encoder"),
        (["*.bias"], r"matches only \[.*'encoder.0.bias'.*which are not selected by default: name them in full"),
        (["encoder.2"], r"it names a module \(Conv2d\): for its weights \['encoder.2.weight'\] write 'encoder.2.\*'$"),
        (["encode?"], r"it names a module \(Sequential\): for its weights \['encoder.0.weight', .*\] write 'encode\?.\*'$"),
        (["encoder.1"], r"it names a module \(LayerNorm\); it matches only .*'encoder.1.weight'.*: name them in full"),
        (["frozen"], r"it names a module \(Linear\); it matches only \['frozen.weight', 'frozen.bias'\], of which .* is frozen"),
        (["*", "!encoder.2"], r"'!encoder.2' matches nothing; it names a module \(Conv2d\): .* write '!encoder.2.\*'$"),
        (["free.weight"], r"is not a parameter of Zoo; closest: .*'head.weight'"),
        (["haed.weight"], r"select name 'haed.weight' is not a parameter of Zoo; closest: 'head.weight'"),
        (["*", "!nothing.*"], r"select exclusion '!nothing.\*' matches nothing"),
        (["head.*", "!head.*"], r"leaves no parameter"),
        (["frozen.weight"], r"requires_grad=False; it must be trained: unfreeze it before the fit with requires_grad_\(True\)"),
        (["wave"], r"'wave' is complex; only real"),
    ],
)
def test_bad_patterns(patterns, message):
    with pytest.raises(ValueError, match=message):
        select(Zoo(), patterns)


def test_a_model_without_weights():
    with pytest.raises(ValueError, match="Embedding has no selectable weight"):
        select(nn.Embedding(2, 2))


def test_a_model_whose_weights_are_all_frozen():
    frozen = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).requires_grad_(False)
    wanted = r"Sequential has no selectable weight: all 2 weight matrices .* are frozen \(requires_grad=False\), such as '0.weight'"
    with pytest.raises(ValueError, match=wanted):
        select(frozen)


def test_frozen_weights_can_be_counted():
    assert "frozen.weight" in select(Zoo(), trainable=False)


def two(weight):
    """Make a weight with values in two parts, like quantised ones."""
    return nn.Parameter(TwoTensor(weight.detach(), weight.detach().clone()))


def unfit(kind):
    layer = nn.Linear(4, 4, dtype=torch.complex64 if kind == "complex" else None)
    if kind == "lazy":
        layer = nn.LazyLinear(4)
    if kind == "packed":
        layer.weight = two(layer.weight)
    if kind == "integer":
        layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer, nn.Linear(4, 4))


UNFIT = {
    "complex": "'0.weight' is complex; only real floating parameters can be sparsified; or exclude it",
    "lazy": "'0.weight' has no shape yet; run a batch through its lazy layer first",
    "packed": "'0.weight' is a TwoTensor; a quantised or otherwise packed tensor has no elements that could become zero",
    "integer": "'0.weight' is torch.int8; a quantised weight is not trained: sparsify first, then quantise",
}


@pytest.mark.parametrize(("kind", "message"), UNFIT.items(), ids=UNFIT.keys())
def test_unsupported_weights_are_refused_if_selected_by_name(kind, message):
    for patterns in (None, ["*"], ["0.weight"], ["0.*"]):
        with pytest.raises(ValueError, match=message):
            select(unfit(kind), patterns)
    for patterns in (["!0.weight"], ["1.*"], ["*", "!0.*"], ["1.weight"]):
        assert list(select(unfit(kind), patterns)) == ["1.weight"]


def test_a_frozen_complex_weight_is_left_out_like_other_frozen_ones():
    module = unfit("complex")
    module[0].requires_grad_(False)
    assert list(select(module)) == ["1.weight"]


@pytest.mark.slow
def test_torchaos_quantised_weights_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    module = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 2))
    quantization.quantize_(module[0], quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"'0.0.weight' is a \w+; a quantised or otherwise packed tensor"):
        select(module)
    assert list(select(module, ["!0.*"])) == ["1.weight"]


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, ["0.weight", "0.parametrizations.weight.original1"]),
    "spectral_norm": (parametrizations.spectral_norm, ["0.weight", "0.parametrizations.weight.original"]),
    "orthogonal": (parametrizations.orthogonal, ["0.weight", "0.parametrizations.weight.original"]),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), ["0.weight", "0.weight_orig"]),
    "older spectral_norm": (nn.utils.spectral_norm, ["0.weight", "0.weight_orig"]),
}


@pytest.mark.parametrize(("change", "names"), COMPUTED.values(), ids=COMPUTED.keys())
def test_sources_of_computed_weights_are_left_out_and_refused_by_name(change, names):
    module = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(select(module)) == list(select(module, ["!0.weight"])) == ["1.weight"]
    assert list(left_out(module)) == list(left_out(module, ["0.*"])) == ["0.weight"]
    assert left_out(module, ["!0.weight"]) == left_out(module, ["1.*"]) == {}
    for name in names:
        with pytest.raises(ValueError, match=rf"select name '{name}' cannot be sparsified: '0.weight' is computed by .* first with"):
            select(module, [name])
    with pytest.raises(ValueError, match=r"no selectable weight: its matrices are computed from other tensors .*'0.weight' is computed by"):
        select(module[:1])
    assert sorted(countable(module)) == ["0.weight", "1.weight"]


def test_weights_that_torch_prunes_are_refused_with_a_hint_at_model_pruning():
    module = nn.Sequential(nn.Linear(4, 4))
    nn.utils.prune.l1_unstructured(module[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"'0.weight' is computed by .*Lightning's ModelPruning does that .* keep one of the two"):
        select(module)


def test_lists_of_names_say_how_many_more_there_are():
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(11)))
    with pytest.raises(ValueError, match=r"selectable: \[.*\] and 14 more$"):
        select(many, ["xyz"])
    with pytest.raises(ValueError, match=r"it matches only \['0.bias', .*\] and 6 more, which are not selected by default"):
        select(many, ["*.bias"])
    two = nn.Sequential(unfit("complex")[0], unfit("complex")[0], nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\(1 more weight is refused\)$"):
        select(two)
