"""A network that was trained before gets a shorter ramp to its target, and a resumed run keeps the ramp that it began with."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import Toy, data, trainer

from lightning_sparse import _roles, penalties
from lightning_sparse.callbacks import AdaptiveMask, MagnitudePruning, ReweightedPenalty, Sparsify
from lightning_sparse.scores import LAMP

STEPS = 60  # of a run of 15 epochs


class FrozenAt(Callback):
    """Records the step at which the support of a callback freezes."""

    def __init__(self, form):
        self.form, self.step = form, None

    def on_train_batch_end(self, run, *_):
        if self.step is None and self.form.frozen:
            self.step = run.global_step


class SaveEarly(Callback):
    """Saves a checkpoint after the third epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, run, module):
        if run.current_epoch == 2:
            run.save_checkpoint(self.path)


def normed(trained):
    torch.manual_seed(0)
    module = Toy(nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 3)))
    if trained:
        with torch.no_grad():
            module.network[1].bias += 0.01 * torch.arange(64)
    return module


def frozen_at(form, module, *others, **how):
    watch = FrozenAt(form)
    run = trainer(form, watch, *others, epochs=15)
    run.fit(module, data(), **how)
    assert run.global_step == STEPS
    return watch.step


@pytest.mark.parametrize(
    "make",
    [Sparsify, lambda t, **o: ReweightedPenalty(penalties.LogSum(2.0), target_sparsity=t, **o),
     lambda t, **o: AdaptiveMask(penalties.LogSum(2.0), target_sparsity=t, **o)], ids=["Sparsify", "penalty", "mask"]
)  # fmt: skip
def test_the_ramp_ends_earlier_in_a_network_that_was_trained_before(make):
    assert frozen_at(make(0.8), normed(trained=False)) == pytest.approx(0.75 * STEPS, abs=1)
    assert frozen_at(make(0.8), normed(trained=True)) == pytest.approx(0.3 * STEPS, abs=1)
    assert frozen_at(make(0.8, freeze=0.5), normed(trained=True)) == pytest.approx(0.5 * STEPS, abs=1)


def test_the_shorter_ramp_is_logged_with_the_way_back(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):  # because other tests silence it
        frozen_at(Sparsify(0.8), normed(trained=False))
        assert "was trained before" not in caplog.text
        frozen_at(Sparsify(0.8), normed(trained=True))
    assert "the ramp to target_sparsity=0.8 takes the first 30% of the run and the rest fine-tunes. freeze=0.25 gives 75%" in caplog.text


def test_pruning_names_the_shorter_ramp_for_a_network_that_was_trained_before(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer(MagnitudePruning(0.8, every=1, score=LAMP()), epochs=2).fit(normed(trained=False), data())
        trainer(MagnitudePruning(0.8, every=1, score=LAMP(), end=0.3), epochs=2).fit(normed(trained=True), data())
        assert "end=0.3" not in caplog.text
        trainer(MagnitudePruning(0.8, every=1, score=LAMP()), epochs=2).fit(normed(trained=True), data())
    assert "its ramp takes the first 75% of the run. end=0.3 leaves more steps for fine-tuning" in caplog.text


@pytest.mark.parametrize("trained", [False, True])
def test_a_resumed_run_keeps_its_ramp_whatever_the_new_module_looks_like(tmp_path, trained):
    early = tmp_path / "early.ckpt"
    whole = frozen_at(Sparsify(0.8), normed(trained), SaveEarly(early))
    assert frozen_at(Sparsify(0.8), normed(not trained), ckpt_path=early) == whole


def test_norms_that_learned_are_told_from_those_that_did_not():
    def gan(norm):  # a usual initialisation of GANs
        nn.init.normal_(norm.weight, 1.0, 0.02)
        return norm

    fresh = [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), gan(nn.BatchNorm1d(4)), nn.LayerNorm(4, bias=False)]
    nn.init.zeros_(fresh[0].weight)  # as the last norm of a residual block

    class NormalisedLinear(nn.Linear):
        """A layer whose name only sounds like a norm's."""

    class NormalisedTable(nn.Embedding):
        """Another one, without a bias."""

    assert not _roles.is_trained(nn.Sequential(NormalisedLinear(4, 4), NormalisedTable(4, 4)))
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.LazyBatchNorm1d())
    assert not any(map(_roles.is_trained, [*fresh, plain, nn.Sequential(*fresh)]))
    for norm in fresh:
        with torch.no_grad():
            (norm.weight if getattr(norm, "bias", None) is None else norm.bias)[1] += 0.1
        assert _roles.is_trained(nn.Sequential(nn.Linear(4, 4), norm))
        assert not _roles.is_trained(norm.requires_grad_(False))  # as in a teacher beside a new network


@pytest.mark.parametrize("zero", [0.9, 0.0])
def test_a_run_that_keeps_its_zeros_is_told_nothing_about_cuts_that_it_does_not_make(zero, caplog):
    module = normed(trained=True)
    with torch.no_grad():
        for w in (module.network[0].weight, module.network[3].weight):
            w.view(-1)[: int(zero * w.numel()) + 1] = 0
    with caplog.at_level(logging.INFO):
        trainer(Sparsify(0.9, keep_zeros=True), epochs=15).fit(module, data())
    for said in ("takes the first 30% of the run", "steps are few"):
        assert (said in caplog.text) == (zero == 0.0)
