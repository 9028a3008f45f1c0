"""Truncated, corrupted and foreign files are refused before training; saved files load with weights_only=True."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from every_form import FORMS, LOG_SUM
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Toy, data, hooks, trainer, weights

from lightning_sparse import archive, conformance, mask_rules
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, SparseCheckpoint


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    run = trainer(FORMS["mask"](), epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(path := tmp_path_factory.mktemp("files") / "whole.ckpt")
    return path


def refused(path: Path, own_weights: bool) -> str:
    module = Toy(seed=1)
    before, count = weights(module), hooks(module)
    module.training_step = lambda *args: pytest.fail("training began")
    with pytest.raises(Exception) as error:  # noqa: PT011 - torch's own, of many kinds
        trainer(FORMS["mask"](), epochs=3).fit(module, data(), ckpt_path=path)
    assert hooks(module) == count
    assert not own_weights or all(torch.equal(w, before[name]) for name, w in weights(module).items())
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("share", [i / 20 for i in range(20)])
def test_a_file_cut_at_any_place_is_refused_and_nothing_is_loaded(share, file, tmp_path):
    raw = file.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(raw[: int(share * len(raw))])
    refused(tmp_path / "cut.ckpt", own_weights=True)
    assert torch.load(file, weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_flipped_bits_are_told_by_their_checksum(file, tmp_path):
    """For flips that change what torch loads."""
    raw, whole, silent = file.read_bytes(), torch.load(file, weights_only=True), 0
    path, places = tmp_path / "flipped.ckpt", random.Random(0)
    for _ in range(300):
        flipped, place = bytearray(raw), places.randrange(len(raw))
        flipped[place] ^= 1 << places.randrange(8)
        path.write_bytes(bytes(flipped))
        try:
            read = torch.load(path, weights_only=True)
        except Exception:
            continue
        if conformance.resume.first_difference(read, whole):
            silent += 1
            with pytest.raises(ValueError, match=r"flipped.ckpt is damaged"):
                archive.check(path)
    assert silent > 30


def test_a_flipped_bit_in_a_weight_stops_the_trainer_before_training(file, tmp_path):
    raw = bytearray(file.read_bytes())
    weight = torch.load(file, weights_only=True)["state_dict"]["network.0.weight"]
    place = raw.find(weight.numpy().tobytes())
    raw[place + 2] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(bytes(raw))
    assert not torch.equal(torch.load(tmp_path / "flipped.ckpt", weights_only=True)["state_dict"]["network.0.weight"], weight)
    assert "flipped.ckpt is damaged: its entry" in refused(tmp_path / "flipped.ckpt", own_weights=False)


def test_files_without_checksums_and_what_is_no_file_pass(file, tmp_path):
    content = torch.load(file, weights_only=True)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "bare.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    for path in (file, tmp_path / "old.ckpt", tmp_path / "bare.ckpt", tmp_path, tmp_path / "none.ckpt", "s3://bucket/a.ckpt", None):
        archive.check(path)
    assert torch.load(tmp_path / "bare.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_a_file_of_another_form_model_or_selection(file, tmp_path):
    other = AdaptiveProx(LOG_SUM, 0.2, select=["network.0.weight"])  # another state key: the run starts without a state
    with pytest.warns(UserWarning, match="Be aware that when using"), pytest.warns(UserWarning, match="state of .* was not used"):
        trainer(other, epochs=2).fit(Toy(), data(), ckpt_path=file)
    assert list(other.parameters) == ["network.0.weight"]
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"model": Toy().state_dict()}, foreign)
    assert refused(foreign, own_weights=True)
    shutil.copy(file, tmp_path / "wide.ckpt")
    wide = Toy(torch.nn.Sequential(torch.nn.Linear(8, 17), torch.nn.ReLU(), torch.nn.Linear(17, 3)))
    with pytest.raises(RuntimeError, match=r"size mismatch for network.0.weight"):
        trainer(FORMS["mask"](), epochs=2).fit(wide, data(), ckpt_path=tmp_path / "wide.ckpt")
    assert hooks(wide) == 0


OPTIONS = {
    "threshold": partial(ReweightedPenalty, LOG_SUM, 0.5, threshold=0.01),
    "keep_zeros": partial(ReweightedPenalty, LOG_SUM, 0.5, keep_zeros=True),
    "a rule of one's own": partial(ReweightedPenalty, mask_rules.LinearRamp(0.5)),
    "gap": partial(AdaptiveMask, LOG_SUM, 0.5, gap_samples=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMS, *OPTIONS])
def test_every_file_that_is_saved_loads_with_weights_only(name, tmp_path):
    make = (FORMS | OPTIONS)[name]
    keeper = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    run = trainer(make(), keeper, epochs=2, enable_checkpointing=True)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        state = torch.load(path, weights_only=True)["callbacks"][make().state_key]
        assert state["taken"].keys() == {"network.0.weight", "network.2.weight"}


@pytest.mark.slow
def test_the_file_of_a_sparse_checkpoint_loads_with_weights_only(tmp_path):
    keeper = SparseCheckpoint(target=0.05, dirpath=tmp_path, filename="best", monitor="val/loss")
    trainer(FORMS["exact prox"](), keeper, epochs=3, enable_checkpointing=True).fit(Toy(), data(), data(seed=1))
    states = torch.load(tmp_path / "best.ckpt", weights_only=True)["callbacks"]
    assert {key.split("{")[0] for key in states} == {"AdaptiveProx", "SparseCheckpoint"}


@pytest.mark.slow
def test_two_callbacks_in_one_file_load_with_weights_only(tmp_path):
    first, second = ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"]), AdaptiveMask(LOG_SUM, 0.5, select=["network.2.*"])
    run = trainer(first, second, epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert [*states[first.state_key]["taken"], *states[second.state_key]["taken"]] == ["network.0.weight", "network.2.weight"]
