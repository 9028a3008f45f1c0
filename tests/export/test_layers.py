"""Sparse layers compute what the dense ones do, in every mode in which a module for inference is used."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from export_networks import encoder, zeroed
from torch import nn

from lightning_sparse.export import SparseLinear, to_sparse


def pair(layout, bias=True, dtype=torch.float32, shape=(64, 96)):
    torch.manual_seed(0)
    dense = zeroed(nn.Linear(shape[1], shape[0], bias), 0.9).to(dtype)
    return dense, SparseLinear(dense.weight, dense.bias, layout, 16).eval()


@pytest.mark.parametrize("layout", ["csr", "bsr"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (5, 96), (2, 3, 96), (0, 96)])
def test_equals_the_dense_layer_for_every_shape_of_input(layout, bias, shape):
    dense, sparse = pair(layout, bias)
    x = torch.randn(shape)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(sparse(x), dense(x))


def test_a_matrix_of_zeros_gives_the_bias():
    dense = zeroed(nn.Linear(8, 4), 2.0)
    sparse = SparseLinear(dense.weight, dense.bias)
    for batch in (1, 3):
        assert torch.equal(sparse(torch.randn(batch, 8)), dense.bias.detach().expand(batch, 4))


def test_the_gradient_of_the_input_is_the_dense_one():
    dense, sparse = pair("csr", dtype=torch.float64)
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    found, expected = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (sparse, dense))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["csr", "bsr"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_after_use_in_inference_mode_compute_the_same(layout, copied):
    dense, sparse = pair(layout)
    x = torch.randn(3, 96)
    with torch.inference_mode():
        sparse(x)
    again = copied(sparse)
    torch.testing.assert_close(again(x), dense(x))
    again.entries.zero_()
    torch.testing.assert_close(sparse(x), dense(x))  # the original has its own memory


def test_follows_the_module_to_another_type():
    dense, sparse = pair("csr")
    x = torch.randn(3, 96)
    sparse(x)
    torch.testing.assert_close(sparse.double()(x.double()), dense.double()(x.double()))


def test_autocast_leaves_the_product_in_full_precision():
    dense, sparse = pair("csr")
    x = torch.randn(3, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, dense(x))


@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_state_dicts_are_exchanged_with_the_dense_layer(layout):
    dense, sparse = pair(layout)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    for name, tensor in dense.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], tensor)
    other = zeroed(nn.Linear(96, 64), 0.8, seed=1)
    x = torch.randn(3, 96)
    sparse(x)
    sparse.load_state_dict(other.state_dict())
    torch.testing.assert_close(sparse(x), other(x))
    assert sparse.nonzero() == int(other.weight.count_nonzero())


def test_a_state_dict_of_another_shape_is_refused():
    _, sparse = pair("csr")
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: the file has \(64, 95\), the module \(64, 96\)"):
        sparse.load_state_dict(nn.Linear(95, 64).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        sparse.load_state_dict({"weight": torch.zeros(64, 96)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        sparse.load_state_dict(nn.Linear(96, 64).state_dict() | {"other": torch.zeros(1)})


def test_what_a_layer_cannot_be_is_refused():
    dense, sparse = pair("csr")
    with pytest.raises(ValueError, match=r"takes \(..., 96\), got \(3, 95\)"):
        sparse(torch.randn(3, 95))
    with pytest.raises(ValueError, match="'csr' or 'bsr', got 'coo'"):
        SparseLinear(dense.weight, layout="coo")
    with pytest.raises(ValueError, match=r"multiples of its block, 17; got \(64, 96\)"):
        SparseLinear(dense.weight, layout="bsr", block=17)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_can_be_compiled_whole_and_exported(layout, tmp_path):
    dense, sparse = pair(layout)
    network, reference = nn.Sequential(sparse, nn.ReLU()).eval(), nn.Sequential(dense, nn.ReLU())
    x = torch.randn(5, 96)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), reference(x))
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "program.pt2")
    other = torch.randn(7, 96)
    torch.testing.assert_close(torch.export.load(tmp_path / "program.pt2").module()(other), reference(other))


def masks():
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    causal = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "causal": {"mask": causal, "is_causal": True},
        "float": {"mask": torch.randn(6, 6)},
        "both": {"mask": causal, "src_key_padding_mask": padding},
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_computes_the_same_under_masks(kind, batch_first):
    dense, given = encoder(batch_first), masks()[kind]
    sparse = to_sparse(dense, "csr")
    x = torch.randn(2, 6, 32)
    x = x if batch_first else x.transpose(0, 1)
    with torch.inference_mode():  # torch's fused path reads dense weights and must not be taken
        found = sparse(x, **given)
    torch.testing.assert_close(found, dense(x, **given), rtol=1e-4, atol=1e-5)  # torch's own fused path gives NaN for a mask of floats


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 32), (5, 32)])
def test_an_attention_gives_its_weights(average, shape):
    torch.manual_seed(0)
    dense = zeroed(nn.MultiheadAttention(32, 4, batch_first=True))
    sparse = to_sparse(dense, "csr")
    q, kv = torch.randn(shape), torch.randn((*shape[:-2], 7, 32))
    mask = torch.randn(*((8,) if len(shape) == 3 else (4,)), 5, 7)
    for options in ({}, {"attn_mask": mask}):
        found = sparse(q, kv, kv, average_attn_weights=average, **options)
        expected = dense(q, kv, kv, average_attn_weights=average, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is_causal"):
        sparse(q, kv, kv, is_causal=True)


def test_an_attentions_state_dict_is_that_of_torch():
    dense = encoder()
    sparse = to_sparse(dense, "csr")
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], tensor), name
    other = zeroed(encoder(), seed=5)
    sparse.load_state_dict(other.state_dict())
    x = torch.randn(2, 6, 32)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), other(x), rtol=1e-4, atol=1e-5)
    plain = encoder()
    plain.load_state_dict(sparse.state_dict())
    with torch.inference_mode():
        assert torch.equal(plain(x), other(x))
