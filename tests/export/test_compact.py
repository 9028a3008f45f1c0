"""Compact files give back what was saved, and nothing else: cut files and flipped bits are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_networks import encoder, mlp, zeroed
from torch import nn

from lightning_sparse.export import load_compact, save_compact, to_sparse

pytest.importorskip("safetensors")

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.complex64)


def tensors():
    torch.manual_seed(0)
    found = {str(dtype): (torch.randn(7, 11) * 3 * (torch.rand(7, 11) < 0.2)).to(dtype) for dtype in TYPES[:-1]}
    odd = torch.zeros(5, 9)
    odd[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-40])
    found |= {"complex": torch.randn(4, dtype=torch.complex64), "odd": odd, "dense": torch.randn(13), "scalar": torch.tensor(3.0)}
    return found | {"empty": torch.zeros(0, 4), "all zero": torch.zeros(40, 40), "a view": torch.randn(6, 8).t()[::2]}


def test_every_type_comes_back_exactly(tmp_path):
    state = tensors()
    found = load_compact(save_compact(state, tmp_path / "file"))
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_negative_zero_is_a_zero(tmp_path):
    found = load_compact(save_compact({"w": torch.tensor([-0.0, 0.0] * 40)}, tmp_path / "file"))["w"]
    assert not found.signbit().any()


def test_sixteen_bits_round_to_the_nearest_and_come_back_in_the_old_type(tmp_path):
    state = {"w": mlp()[0].weight.detach(), "count": torch.tensor([70000])}
    found = load_compact(save_compact(state, tmp_path / "file", dtype="fp16"))
    assert found["w"].dtype == torch.float32
    assert torch.equal(found["w"], state["w"].half().float())
    assert not torch.equal(found["w"], state["w"])
    assert torch.equal(found["count"], state["count"])


def test_size_is_a_bit_for_each_weight_and_the_values(tmp_path):
    weight = zeroed(nn.Linear(512, 512, bias=False), 0.95).weight
    kept = int(weight.count_nonzero())
    for dtype, width in ((None, 4), ("fp16", 2)):
        size = save_compact({"w": weight}, tmp_path / "file", dtype).stat().st_size
        assert 0 <= size - (weight.numel() / 8 + width * kept) < 1000


def test_sparse_modules_give_the_dense_keys(tmp_path):
    network = encoder()
    save_compact(to_sparse(network, "csr"), tmp_path / "file")
    other = encoder()
    other.load_state_dict(load_compact(tmp_path / "file"))
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    network = nn.Sequential(nn.Embedding(500, 32), nn.Linear(32, 500, bias=False))
    network[1].weight = network[0].weight
    size = save_compact(network, tmp_path / "file").stat().st_size
    assert size < 1.1 * 4 * 500 * 32
    found = load_compact(tmp_path / "file")
    assert found["0.weight"].data_ptr() == found["1.weight"].data_ptr()
    weight = torch.randn(4, 4)
    found = load_compact(save_compact({"w": weight, "transposed": weight.t()}, tmp_path / "file"))
    assert torch.equal(found["transposed"], weight.t())  # the same memory, but another tensor


@pytest.mark.slow  # reads the file two thousand times
def test_no_flipped_bit_passes(tmp_path):
    state = {"w": torch.tensor([[0.0, 1.5], [0.0, 0.0]] * 8), "b": torch.tensor([1.0, -2.0])}
    path = save_compact(state, tmp_path / "file")
    good, refused = path.read_bytes(), 0
    for place in range(len(good)):
        for bit in (0, 5):
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
            try:
                found = load_compact(path)
            except ValueError:
                refused += 1
                continue
            assert all(torch.equal(found[name], state[name]) for name in state), place  # for instance a space as another white space
            assert found.keys() == state.keys()
    assert refused > 1.95 * len(good)


def test_no_cut_file_passes(tmp_path):
    path = save_compact(mlp(), tmp_path / "file")
    good = path.read_bytes()
    for length in [0, 1, 7, 8, 9, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="file is damaged or cut"):
            load_compact(path)
    path.write_bytes(good + b"x")
    with pytest.raises(ValueError, match="file is damaged or cut"):
        load_compact(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"no file '.*absent'"):
        load_compact(tmp_path / "absent")
    save_file({"w": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="plain is not a compact file of save_compact"):
        load_compact(tmp_path / "plain")


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(tmp_path):
    quantised = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    cases = {
        "quantised layer": (quantised, None),
        "before quantisation": (quantised.state_dict(), None),
        "sparse_csr or quantised tensor": ({"w": torch.eye(3).to_sparse_csr()}, None),
        "65504, but 'w' has 1e\\+06": ({"w": torch.tensor([1e6, 0.0])}, "fp16"),
        "dtype must be None .equal values. or 'fp16', got 'int8'": ({}, "int8"),
    }
    for message, (state, dtype) in cases.items():
        with pytest.raises(ValueError, match=message):
            save_compact(state, tmp_path / "file", dtype)
    with pytest.raises(ValueError, match=r"path of save_compact must be a file, got the folder '(.*)': .*'\1.model.safetensors'"):
        save_compact(mlp(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_state_dict_within_a_checkpoint_is_named(tmp_path):
    weights = dict(mlp().state_dict())
    for key, others in (("state_dict", {"loops": {"a": torch.zeros(1)}}), ("model", {"args": {"lr": 0.1}})):
        with pytest.raises(ValueError, match=rf"'epoch' is of type int: this is a checkpoint, give checkpoint\['{key}'\]$"):
            save_compact({"epoch": 3, **others, key: weights}, tmp_path / "file")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_compact(mlp(), tmp_path / "file")
    good = path.read_bytes()

    def full(file, packed):
        file.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        save_compact(mlp(0.5), path)
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]
