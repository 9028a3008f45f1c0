"""target_sparsity: each form reaches it, freezes there, and goes on exactly after an interruption; what cannot be reached is refused."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import Toy, data, trainer, weights

from lightning_sparse import mask_rules, penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    PenaltyLoss,
    ReweightedPenalty,
    VariationalDropout,
)
from lightning_sparse.schedules import LinearWarmup

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": lambda **k: ReweightedPenalty(LOG_SUM, **k),
    "loss": lambda **k: PenaltyLoss(penalties.MCP(c=1.0), **k),
    "prox": lambda **k: AdaptiveProx(penalties.L1(), exact=True, **k),
    "mask": lambda **k: AdaptiveMask(LOG_SUM, **k),
    "joint": lambda **k: EtaTrick(LOG_SUM, learned_lr=0.05, **k),
    "VarDrop": lambda **k: VariationalDropout(prior="empirical_bayes", learned_lr=0.05, **k),
    "L0": lambda **k: HardConcrete(learned_lr=0.05, **k),
}
TARGET, EPOCHS = 0.8, 150


def wide(seed: int = 0) -> Toy:
    return Toy(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), seed=seed, decay=True)


def zeros(module: nn.Module) -> float:
    matrices = [w for w in weights(module).values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


class Watch(Callback):
    """(share of zeros as it is logged, lam, frozen) after each batch."""

    def __init__(self, form):
        self.form, self.seen = form, []

    def on_train_batch_end(self, *_):
        self.seen.append((self.form.share_of_zeros(), self.form.lam, self.form.frozen))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_reaches_its_target_by_the_ramps_end_and_stays_there(form):
    callback, module = form(target_sparsity=TARGET, freeze=0.2), wide()
    watch = Watch(callback)
    trainer(callback, watch, epochs=EPOCHS).fit(module, data())
    steps = 4 * EPOCHS
    assert 0.75 * 0.8 * steps <= [frozen for *_, frozen in watch.seen].index(True) + 1 <= 0.8 * steps
    assert zeros(module) == pytest.approx(TARGET, abs=0.002)
    assert len({share for share, _, frozen in watch.seen if frozen}) == 1
    assert len({lam for _, lam, frozen in watch.seen if frozen}) == 1


@pytest.mark.slow
def test_the_ramp_ends_where_the_support_is_frozen_and_lam_starts_where_it_is_told():
    callback, module = ReweightedPenalty(LOG_SUM, lam=1e-3, target_sparsity=0.6), wide()
    assert callback.lam == pytest.approx(1e-3)
    watch = Watch(callback)
    trainer(callback, watch, epochs=30).fit(module, data())
    assert 60 < [frozen for *_, frozen in watch.seen].index(True) <= 89  # a quarter of 120 steps is left by default
    assert zeros(module) == pytest.approx(0.6, abs=0.002)
    assert callback.lam != pytest.approx(1e-3)
    again = Watch(callback)
    trainer(callback, again, epochs=30).fit(wide(), data())
    assert again.seen[0][1] == pytest.approx(1e-3, rel=0.1)  # another fit starts anew


def test_the_other_forms_are_made_with_the_same_target():
    callback = AdaptiveMask(LOG_SUM, lam=1e-4, target_sparsity=0.9).to_penalty()
    assert (callback.target_sparsity, callback.freeze, callback.schedule.lam) == (0.9, 0.25, 1e-4)
    assert callback.to_prox().recipe()["init_args"]["target_sparsity"] == 0.9
    assert ReweightedPenalty(LOG_SUM, lam=1e-4).to_mask().ascent is None


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epochs - 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [12, 25], ids=["on the way", "frozen"])
def test_a_resumed_run_finds_the_same_lam_and_the_same_weights(epochs, tmp_path):
    whole, module = ReweightedPenalty(LOG_SUM, target_sparsity=0.7), wide()
    saver = StopAfter(epochs)
    saver.path = tmp_path / "half.ckpt"
    trainer(whole, saver, epochs=30).fit(module, data())
    again, resumed = ReweightedPenalty(LOG_SUM, target_sparsity=0.7), wide(seed=1)
    trainer(again, epochs=30).fit(resumed, data(), ckpt_path=saver.path)
    assert again.lam == whole.lam
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(module).items())


def test_a_damaged_ascent_is_refused():
    callback = ReweightedPenalty(LOG_SUM, target_sparsity=0.7)
    state = callback.state_dict()
    for broken in ({"log_lam": float("nan"), "error": 0.0, "t": 0.0}, {"log_lam": 1.0}, "high"):
        with pytest.raises(ValueError, match="'ascent' must be"):
            callback.load_state_dict(state | {"ascent": broken})


REFUSED = {
    "a schedule": (lambda: ReweightedPenalty(LOG_SUM, LinearWarmup(1e-3), target_sparsity=0.9), "finds lam itself"),
    "top-k": (lambda: AdaptiveMask(mask_rules.TopK(0.1), target_sparsity=0.9), "does not decide the zeros of TopK"),
    "all of them": (lambda: ReweightedPenalty(LOG_SUM, target_sparsity=1.0), "target_sparsity must lie in"),
    "only shrinks": (lambda: ReweightedPenalty(penalties.Ridge(1.0), target_sparsity=0.9), "only shrinks"),
    "too short": (lambda: ReweightedPenalty(LOG_SUM, target_sparsity=0.9), "at least 20 optimiser steps before .* frozen, got 6 of 8"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_reached_is_refused_before_training(make, said):
    module = wide()
    before = weights(module)
    with pytest.raises(ValueError, match=said):
        trainer(make(), epochs=2).fit(module, data())
    assert all(torch.equal(w, weights(module)[name]) for name, w in before.items())


def test_zeros_that_do_not_follow_in_time_are_taken_by_rank_with_a_warning():
    module = wide()
    callback = ReweightedPenalty(LOG_SUM, target_sparsity=0.9, lam=1e-8)
    callback.ascent.climb = lambda zeros, t: None
    with pytest.warns(UserWarning, match=r"had only .* zeros where its support was frozen; to meet target_sparsity=0.9 the weights of the"):
        trainer(callback, epochs=20).fit(module, data())
    assert zeros(module) == pytest.approx(0.9, abs=0.002)


def test_zeros_that_are_to_be_kept_may_be_too_many():
    module = wide()
    with torch.no_grad():
        for w in (module.network[0].weight, module.network[2].weight):
            w.view(-1)[: w.numel() // 2] = 0
    with pytest.raises(ValueError, match=r"50.00% of the selected weights are zero already and keep_zeros=True"):
        trainer(ReweightedPenalty(LOG_SUM, target_sparsity=0.3, keep_zeros=True), epochs=30).fit(module, data())


def test_weights_that_cannot_move_end_the_run_early():
    callback, module = ReweightedPenalty(LOG_SUM, target_sparsity=0.9), wide()
    module.make = lambda p: torch.optim.SGD(p, 1e-12)
    watch = Watch(callback)
    with pytest.raises(RuntimeError, match=r"target_sparsity=0.9 is out of reach: lam has risen .* raise the learning rate"):
        trainer(callback, watch, epochs=60).fit(module, data())
    assert len(watch.seen) < 240 * 0.75 * 0.7


def test_without_a_target_the_strength_is_required():
    with pytest.raises(TypeError, match="HardConcrete needs lam; or give target_sparsity"):
        HardConcrete()
    assert HardConcrete(target_sparsity=0.9).ascent.target == 0.9
    assert VariationalDropout(target_sparsity=0.9).ascent.target == 0.9  # without one it finds its own weight


def test_magnitude_pruning_has_its_own_share():
    with pytest.raises(TypeError, match="target_sparsity"):
        MagnitudePruning(sparsity=0.9, target_sparsity=0.9)
