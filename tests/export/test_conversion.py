"""to_sparse replaces what the table says pays, and nothing else."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from export_networks import Known, encoder, mlp, zeroed
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.utils import prune

from lightning_sparse.conformance.toys import Toy
from lightning_sparse.export import Gain, SparseAttention, SparseLinear, Table, gains, plan, sparse_layers, to_dense, to_sparse


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_layers_that_pay_are_replaced_and_others_stay():
    network = mlp()
    before, table = bits(network), Known(csr_96=3.0, csr_32=1.05, csr_10=0.5)
    with pytest.warns(UserWarning, match="leaves dense") as said:
        sparse = to_sparse(network, batch_size=32, table=table)
    assert [str(one.message) for one in said] == [
        "to_sparse leaves dense: 2.weight (csr is 1.05 times as fast for 32 rows (noise 1.00)); "
        "4.weight (csr is 0.50 times as fast for 32 rows (noise 1.00))"
    ]
    assert said[0].filename == __file__
    assert list(sparse_layers(sparse)) == ["0"]
    assert [choice.layout for choice in plan(network, batch_size=32, table=table)] == ["csr", "dense", "dense"]
    x = torch.randn(5, 64)
    torch.testing.assert_close(sparse(x), network(x))
    assert type(network[0]) is nn.Linear  # the given module is not changed
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_plan_gives_reasons_in_words():
    network = mlp()
    with torch.no_grad():
        network[4].weight.fill_(1)
    reasons = [choice.why for choice in plan(network, batch_size=7, table=Known(csr_96=3.0))]
    assert reasons == ["3.0 times faster for 7 rows", "csr is 0.50 times as fast for 7 rows (noise 1.00)", "only 0.0 % zeros"]


def test_the_faster_of_two_layouts_is_taken():
    network = mlp(0.6)
    with torch.no_grad():
        network[0].weight[:64].zero_()  # two thirds of the blocks of 32 x 32
    for faster, other in (("csr", "bsr"), ("bsr", "csr")):
        (choice, *_) = plan(network, table=Known(**{faster: 4.0, other: 2.0}))
        assert choice.layout == faster
        assert choice.block == (1 if faster == "csr" else 32)


def test_blocks_are_asked_for_only_where_they_are_empty():
    network = mlp(0.9)
    assert all(choice.layout == "dense" and "blocks" in choice.why for choice in plan(network, "bsr"))
    with torch.no_grad():
        network[0].weight[16:].zero_()
    with pytest.warns(UserWarning, match=r"dense: 2.weight, 4.weight \(less than half of its blocks of 32 or 16 are all zero\)$"):
        sparse = to_sparse(network, "bsr")
    assert sparse_layers(sparse)["0"].layout == "bsr"
    assert len(sparse_layers(sparse)) == 1
    x = torch.randn(3, 64)
    torch.testing.assert_close(sparse(x), network(x))


def test_a_gain_within_the_noise_does_not_pay():
    assert Gain(1.5, 1.4, 1.3).pays
    assert not Gain(1.5, 1.4, 1.45).pays
    assert not Gain(1.2, 1.05, 1.0).pays


def test_layers_used_twice_and_tied_weights():
    shared = zeroed(nn.Linear(32, 32))
    twice = nn.Sequential(shared, nn.ReLU(), shared).eval()
    sparse = to_sparse(twice, "csr")
    assert isinstance(sparse[0], SparseLinear)
    assert sparse[0] is sparse[2]
    tied = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50), nn.Linear(50, 50)).eval()
    tied[1].weight = tied[0].weight
    zeroed(tied)
    tied[1].weight = tied[0].weight
    first, second = plan(tied, "csr")
    assert (first.layout, second.layout) == ("dense", "csr")
    assert "tied" in first.why
    x = torch.arange(4)
    with pytest.warns(UserWarning, match="tied to another"):
        sparse = to_sparse(tied, "csr")
    torch.testing.assert_close(sparse(x), tied(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_the_result_can_be_copied_and_keeps_the_keys(copied):
    network, x = encoder(), torch.randn(2, 6, 32)
    sparse = to_sparse(network, "csr")
    assert {type(layer) for layer in sparse.modules()} >= {SparseAttention, SparseLinear}
    with torch.inference_mode():
        expected = sparse(x)
        torch.testing.assert_close(copied(sparse)(x), expected)
    assert sparse.state_dict().keys() == network.state_dict().keys()


def test_to_dense_is_the_inverse():
    for network, x in ((mlp(), torch.randn(3, 64)), (encoder(), torch.randn(2, 6, 32)), (zeroed(nn.Linear(8, 8)), torch.randn(2, 8))):
        back = to_dense(to_sparse(network, "csr"))
        assert [type(layer) for layer in back.modules()] == [type(layer) for layer in network.modules()]
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
        torch.testing.assert_close(back(x), network(x))
    assert back(x).requires_grad  # its weights are parameters again
    kinds = [layer.activation_relu_or_gelu for layer in to_dense(to_sparse(encoder(), "csr")).layers]
    assert kinds == [layer.activation_relu_or_gelu for layer in encoder().layers]


def test_a_lightning_module_in_a_trainer_keeps_its_class_and_drops_the_trainer():
    module = Toy()
    zeroed(module)
    module.trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    sparse = to_sparse(module, "csr")
    assert type(sparse) is Toy
    assert sparse._trainer is None
    assert module._trainer is not None


def test_hooked_and_half_precision_layers_stay():
    network = mlp()
    network[0].register_forward_hook(lambda *_: None)
    network[2].bfloat16()
    assert [choice.why[:13] for choice in plan(network, "csr")] == ["it has hooks", "sparse produc", "asked for"]


def test_a_layout_that_no_matrix_can_have_is_refused_with_reasons():
    with pytest.raises(ValueError, match=r"can be csr: 0.weight: sparse products are in float32 and float64, not in float16"):
        to_sparse(mlp().half(), "csr")
    with pytest.raises(ValueError, match=r"can be bsr: 0.weight: less than half of its blocks of 32 or 16 are all zero"):
        to_sparse(mlp(), "bsr")
    pruned = nn.Sequential(nn.Linear(64, 64))
    prune.l1_unstructured(pruned[0], "weight", 0.9)
    with pytest.raises(ValueError, match=r"can be csr: 0.weight: it has hooks"):
        to_sparse(pruned, "csr")
    prune.remove(pruned[0], "weight")
    assert sparse_layers(to_sparse(pruned, "csr"))["0"].nonzero() == round(0.1 * 64 * 64)


class Own(nn.Linear):
    """A layer of someone's own, which may do other things than nn.Linear."""


def test_layers_of_other_classes_are_left_alone():
    network = nn.Sequential(zeroed(Own(32, 32)), zeroed(nn.Linear(32, 32)), zeroed(nn.Conv2d(4, 4, 3)), nn.Linear(32, 32))
    with pytest.warns(UserWarning, match="leaves dense") as said:
        assert list(sparse_layers(to_sparse(network, "csr"))) == ["1"]
    (one,) = said
    reasons = "3.weight (only 0.0 % zeros); 0.weight (there is no sparse Own); 2.weight (there is no sparse Conv2d)"
    assert str(one.message) == f"to_sparse leaves dense: {reasons}"
    assert list(sparse_layers(to_sparse(network[1::2], "csr"))) == ["1"]  # no warning, because no zeros are left unused


def test_networks_that_cannot_gain_are_refused_in_words():
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(
        ValueError, match=r"no matrix of this Sequential is at least half zero \(the most zeros: 0.0 % in 0.weight\).*train"
    ):
        to_sparse(dense)
    with pytest.raises(ValueError, match=r"no nn.Linear and no nn.MultiheadAttention"):
        to_sparse(nn.Sequential(nn.Conv2d(3, 8, 3)))
    sparse = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    for convolution in (sparse[0], sparse[1]):
        nn.init.zeros_(convolution.weight)
    remedy = r"the zeros of 0, 1 are in convolutions, which have no sparse kernel here. For speed train with structure=Channels\(\)"
    with pytest.raises(
        ValueError, match=rf"^no Linear matrix of this Sequential is half zero \(the most zeros: 0.0 % in 3.weight\); {remedy}"
    ):
        to_sparse(sparse, "csr")
    with pytest.raises(ValueError, match=rf"no nn.MultiheadAttention, so there is no matrix to make sparse; {remedy}"):
        to_sparse(sparse[:2])
    words = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    nn.init.zeros_(words[0].weight)
    with pytest.raises(ValueError, match=r"the zeros of 0 are in Embedding layers, .*Train the Linear layers to more zeros$"):
        to_sparse(words)
    recurrent = nn.Sequential(nn.GRU(4, 8, num_layers=2))
    for weight in recurrent.parameters():
        nn.init.zeros_(weight)
    with pytest.raises(ValueError, match=r"the zeros of 0 are in GRU layers"):
        to_sparse(recurrent)
    with pytest.raises(ValueError, match="layout must be 'auto', 'csr' or 'bsr', got 'crs'; closest: 'csr'"):
        to_sparse(mlp(), "crs")
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        to_sparse(mlp(), batch_size=0)


@pytest.mark.filterwarnings("ignore")
def test_quantised_networks_are_refused():
    quantised = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    with pytest.raises(ValueError, match=r"0 is a quantised layer .*give the module before quantisation"):
        to_sparse(quantised)


def test_gains_are_measured_once_and_kept_between_processes(tmp_path):
    network = mlp()
    first = Known(tmp_path, csr=3.0)
    plan(network, batch_size=4, table=first)
    plan(network, batch_size=4, table=first)
    assert first.measured == 3
    again = Known(tmp_path)
    assert [choice.gain.times_faster for choice in plan(network, batch_size=4, table=again)] == [3.0] * 3
    assert again.measured == 0
    plan(network, batch_size=8, table=again)  # another batch size is another entry
    assert again.measured == 3


def test_a_damaged_table_is_measured_again(tmp_path):
    first = Known(tmp_path, csr=3.0)
    plan(mlp(), table=first)
    for text in ("{", "[1]", json.dumps({"key": {"other": 1}})):
        first.file.write_text(text)
        assert Table(tmp_path).entries == {}
    plan(mlp(), table=Known(tmp_path, csr=3.0))
    assert len(Table(tmp_path).entries) == 3


def test_a_folder_without_write_access_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    table = Known(tmp_path / "file", csr=3.0)
    assert plan(mlp(), table=table)[0].layout == "csr"


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIGHTNING_SPARSE_CACHE", raising=False)
    assert gains.cache_folder() == tmp_path / "lightning-sparse"
    monkeypatch.setenv("LIGHTNING_SPARSE_CACHE", str(tmp_path / "own"))
    assert gains.cache_folder() == tmp_path / "own"


def test_a_real_measurement_has_all_figures():
    weight = zeroed(nn.Linear(256, 256), 0.99).weight
    found = Table(budget=0.01).gain(weight, None, "csr", 1, 4)
    assert 0 < found.low <= found.times_faster
    assert found.noise > 0
