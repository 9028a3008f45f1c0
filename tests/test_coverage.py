"""Selection: weights that the default omits, wildcards, and exact names that override patterns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sparse import coverage
from lightning_sparse.conformance import _networks
from lightning_sparse.conformance._networks import Conv1D, Experts
from lightning_sparse.select import countable, left_out, select, skipped_matrices


class RowNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 4))


class Vit(nn.Module):
    """A module with a transformer's parameters besides matrices: positions, tokens, scales, norms."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv1d(3, 8, 2, 2)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.prompt_tokens, self.posEmb = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(3, 8))
        self.scale, self.norm = nn.Parameter(torch.ones(8, 1, 1)), nn.LayerNorm([2, 4])
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.positions = nn.ParameterList([nn.Parameter(torch.zeros(4, 4))])
        self.words = nn.Embedding(7, 8)
        self.inner = RowNorm()
        self.head = nn.Linear(8, 3)


def own(*layers):
    return nn.Sequential(*layers, nn.Linear(8, 2))


def said(module, patterns=None):
    names = [name for name, _ in module.named_parameters()]
    return coverage.skipped_message(coverage.measure(module, select(module, patterns), patterns), "It selects", patterns, names)


# -- matrices of custom layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [Conv1D(4, 8), Experts(8), nn.ParameterDict({"w": torch.ones(4, 8)})], ids=["Conv1D", "3-D", "dict"])
def test_matrices_of_own_layers_are_passed_over_and_wildcards_reach_them(layer):
    module = own(layer)
    (name,) = [f"0.{key}" for key, p in layer.named_parameters() if p.dim() > 1]
    assert (list(select(module)), list(skipped_matrices(module))) == (["1.weight"], [name])
    assert sorted(select(module, ["*"])) == sorted(countable(module, ["*"])) == sorted([name, "1.weight"])
    assert list(select(module, ["0.*"])) == list(select(module, [name])) == [name]
    assert list(select(module, ["*", "!0.*"])) == list(select(module, ["!0.*"])) == ["1.weight"]
    assert skipped_matrices(module, ["*"]) == skipped_matrices(module, ["!0.*"]) == {}


def test_embeddings_norms_biases_positions_and_tokens_are_not_passed_over_and_no_wildcard_reaches_them():
    module = Vit()
    assert skipped_matrices(module) == {}
    assert sorted(select(module, ["*"])) == sorted(select(module)) == ["head.weight", "patch.weight"]
    assert list(select(module, ["pos_embed"])) == ["pos_embed"]


@pytest.mark.parametrize(
    "make", [_networks.Attention, _networks.Recurrent, _networks.SparseEmbedding, _networks.plain, _networks.generator]
)
def test_ordinary_networks_get_no_message(make):
    module = make()
    found = coverage.measure(module, select(module))
    assert (said(module), coverage.tied_message(found, "", None), coverage.frozen_message(found, "")) == ("", "", "")


@pytest.mark.parametrize("name", ["vit_b_16", "swin_v2_t", "convnext_tiny", "maxvit_t"])
def test_all_matrices_of_torchvision_networks_are_selected(name):
    import torchvision

    with torch.device("meta"):
        module = torchvision.models.get_model(name, weights=None)
    assert skipped_matrices(module, trainable=False) == {}


def test_frozen_packed_and_integer_matrices_are_not_reported():
    layer = Conv1D(4, 8).requires_grad_(False)
    layer.table = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    module = own(layer)
    assert skipped_matrices(module) == {}
    assert list(select(module, ["*"])) == ["1.weight"]
    assert list(skipped_matrices(module, trainable=False)) == ["0.weight"]


def test_a_matrix_tied_to_an_embedding_or_a_torch_layer_is_none():
    module = own(nn.Embedding(4, 8), Conv1D(4, 8), Conv1D(2, 8))
    module[1].weight, module[2].weight = module[0].weight, module[3].weight
    assert skipped_matrices(module) == {}


def test_own_matrices_without_a_shape_are_named_and_refused_where_they_are_picked():
    layer = Conv1D(4, 8)
    layer.weight = nn.UninitializedParameter()
    module = own(layer)
    assert "'0.weight' (Conv1D)" in said(module)
    assert coverage.measure(module, select(module)).is_partial
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        select(module, ["*"])


def test_sources_of_computed_custom_weights_are_left_out_with_a_reason():
    module = own(parametrizations.weight_norm(Conv1D(4, 8)))
    assert list(select(module, ["*"])) == ["1.weight"]
    assert (list(left_out(module)), skipped_matrices(module)) == (["0.weight"], {})


def test_a_module_of_own_matrices_alone_says_how_to_select_them():
    with pytest.raises(ValueError, match=r"no selectable weight.*other layers have the matrices \['0.weight'\]: select=\['\*'\]"):
        select(nn.Sequential(Conv1D(4, 8)))


# -- messages -------------------------------------------------------------------------------------------------------------


def test_the_sentence_names_the_matrices_their_share_and_both_remedies():
    module = own(Conv1D(4, 8), Conv1D(8, 8))
    text, total = said(module), 32 + 8 + 64 + 8 + 16 + 2
    assert f"It selects 1 of 3 weight matrices, {16 / total:.1%} of the parameters" in text
    assert f"'0.weight' (Conv1D), '1.weight' (Conv1D) with {96 / total:.1%} of the parameters" in text
    for patterns in (["*"], ["!0.weight", "!1.weight"]):
        assert f"select={patterns}" in text
        assert said(module, patterns) == ""
    assert "select=['*', '!0.weight']" in said(module, ["!0.weight"])
    assert said(module, ["2.*"]) == ""


def test_many_matrices_are_named_by_patterns_that_match_nothing_else():
    blocks = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"attn": Conv1D(4, 4), "mlp": Conv1D(4, 4)}) for _ in range(12))})
    module = nn.ModuleDict({"body": blocks, "head": nn.Linear(4, 4)})
    text = said(module)
    assert "'body.h.*.attn.weight' (Conv1D, 12 matrices), 'body.h.*.mlp.weight' (Conv1D, 12 matrices)" in text
    assert said(module, ["!body.h.*.attn.weight", "!body.h.*.mlp.weight"]) == ""
    mixed = said(nn.Sequential(*(Conv1D(4, 4) for _ in range(9)), nn.Linear(4, 4)))  # because '*.weight' would also match the last one
    assert "'4.weight' (Conv1D) and 4 more" in mixed
    assert "'5.weight'" not in mixed


@pytest.mark.parametrize(("width", "partial"), [(2, False), (20, True)])
def test_only_a_share_that_moves_the_total_counts_as_partial(width, partial):
    module = nn.Sequential(Conv1D(2, width), nn.Linear(50, 50))
    assert coverage.measure(module, select(module)).is_partial is partial


def test_tied_embeddings_are_named_unless_they_are_asked_for_by_name():
    module = _networks.Tied()
    text = coverage.tied_message(coverage.measure(module, select(module)), "It selects", None)
    assert "'head.weight' (52.6% of the parameters) is the embedding 'embedding.weight' too" in text
    assert "select=['!head.weight']" in text
    for patterns in (["!head.weight"], ["!embedding.weight"], ["!embedding.*"]):
        assert list(select(module, patterns)) == ["body.weight"]
    assert coverage.measure(module, select(module, ["*", "head.weight"]), ["*", "head.weight"]).tied == {}


def test_fewer_frozen_weights_than_selected_are_noted_and_not_warned_of():
    module = nn.Sequential(nn.Linear(10, 9), nn.Linear(9, 5, bias=False).requires_grad_(False), nn.Linear(5, 20, bias=False))
    found = coverage.measure(module, select(module))
    note = coverage.frozen_note(found, "It selects")
    assert f"It selects {190 / 244:.1%} of the module's parameters; {45 / 244:.1%} are matrices that are frozen" in note
    assert coverage.frozen_message(found, "It selects") == ""
    named = ["0.*", "2.*"]
    assert coverage.frozen_note(coverage.measure(module, select(module, named), named), "It selects") == ""


def test_a_mostly_frozen_module_says_what_share_is_selected():
    module = nn.Sequential(nn.Linear(8, 90).requires_grad_(False), nn.Linear(90, 1))
    text = coverage.frozen_message(coverage.measure(module, select(module)), "It selects")
    assert f"It selects 1 weight matrix, {90 / 901:.1%} of the module's parameters; {720 / 901:.1%} are matrices that are frozen" in text
    assert "adapters" not in text


class BaseTunerLayer:
    """A class named like PEFT's."""


class Lora(nn.Module, BaseTunerLayer):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(32, 32).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)


def test_a_warning_that_zeros_of_adapters_vanish_when_merged():
    module = nn.Sequential(Lora())
    text = coverage.frozen_message(coverage.measure(module, select(module)), "It selects")
    assert "It selects 2 weight matrices, 10.8% of the module's parameters" in text
    assert "'0.lora_A.weight' and others are adapters: when merged, their product is added to a frozen weight" in text


# -- patterns and names ---------------------------------------------------------------------------------------------------


def test_frozen_matches_are_not_advised_to_be_named_in_full():
    module = nn.Sequential(Lora())
    with pytest.raises(ValueError, match=r"'0.base_layer.weight' is frozen: .* requires_grad_\(True\)") as error:
        select(module, ["*base*"])
    assert "name them in full" not in str(error.value)


def test_sources_of_a_computed_weight_are_not_advised_to_be_named_in_full():
    module = own(parametrizations.weight_norm(nn.Linear(4, 8)))
    with pytest.raises(ValueError, match=r"original0' is not a weight itself: '0.weight' is computed by") as error:
        select(module, ["*original?"])
    assert "name them in full" not in str(error.value)


@pytest.fixture
def bracketed():
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("a[0]", "a0", "b[x]", "!c", "*")})


@pytest.mark.parametrize("name", ["a[0].weight", "b[x].weight", "*.weight", "a[0].bias"])
def test_exact_names_win_over_patterns(bracketed, name):
    assert list(select(bracketed, [name])) == [name]
    every = {f"{key}.weight" for key in bracketed}
    assert set(select(bracketed, ["!" + name])) == every - {name}


def test_exact_names_win_in_what_is_left_out_and_passed_over():
    computed = nn.ModuleDict({"a[0]": parametrizations.weight_norm(nn.Linear(2, 2)), "a0": parametrizations.weight_norm(nn.Linear(2, 2))})
    assert list(left_out(computed, ["!a[0].weight"])) == ["a0.weight"]
    rows = nn.ModuleDict({"a[0]": Conv1D(2, 2), "a0": Conv1D(2, 2)})
    assert list(skipped_matrices(rows, ["!a[0].weight"])) == ["a0.weight"]


def test_suggested_exclusions_of_names_with_brackets_can_be_pasted():
    module = nn.ModuleDict({"a[0]": nn.ModuleList([Conv1D(2, 2), Conv1D(2, 2)]), "head": nn.Linear(2, 2)})
    text = said(module)
    assert "select=['!a[[]0].*.weight']" in text
    assert said(module, ["!a[[]0].*.weight"]) == ""


def test_a_pattern_with_unmatched_brackets_suggests_how_to_write_them(bracketed):
    with pytest.raises(ValueError, match=r"a \[ begins a set of characters in a pattern: write 'b\[\[\]x\]\.\*'"):
        select(bracketed, ["b[x].*"])
    assert list(select(bracketed, ["b[[]x].*"])) == ["b[x].weight"]


@pytest.mark.parametrize("pattern", ["!*bias", "!embedding.*", "!*norm*", "!frozen.weight"])
def test_exclusions_may_match_what_is_not_selected_anyway(pattern):
    module = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "norm": nn.LayerNorm(2), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    module["head"] = nn.Linear(2, 2)
    assert list(select(module, [pattern])) == ["head.weight"]
    with pytest.raises(ValueError, match="matches nothing"):
        select(module, ["!nothing.*"])
