"""target_sparsity: each form reaches it, freezes there, and goes on exactly after an interruption; what cannot be reached is refused."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
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
    SparseCheckpoint,
    VariationalDropout,
)
from lightning_sparse.callbacks._target import advance
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
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_reached_is_refused_before_training(make, said):
    module = wide()
    before = weights(module)
    with pytest.raises(ValueError, match=said):
        trainer(make(), epochs=2).fit(module, data())
    assert all(torch.equal(w, weights(module)[name]) for name, w in before.items())


def test_zeros_that_do_not_follow_in_time_are_taken_by_rank_and_that_is_said(caplog):
    module = wide()
    callback = ReweightedPenalty(LOG_SUM, target_sparsity=0.9, lam=1e-8)
    callback.ascent.climb = lambda zeros, t, way: None
    with caplog.at_level(logging.INFO):
        trainer(callback, epochs=20).fit(module, data())
    assert "ReweightedPenalty removed 90.06% of the weights by rank, as pruning does, to meet target_sparsity=0.9" in caplog.text
    assert zeros(module) == pytest.approx(0.9, abs=0.002)


def test_zeros_that_are_to_be_kept_may_be_too_many():
    module = wide()
    with torch.no_grad():
        for w in (module.network[0].weight, module.network[2].weight):
            w.view(-1)[: w.numel() // 2] = 0
    with pytest.raises(ValueError, match=r"50.00% of the selected weights are zero already and keep_zeros=True"):
        trainer(ReweightedPenalty(LOG_SUM, target_sparsity=0.3, keep_zeros=True), epochs=30).fit(module, data())


def test_weights_that_lam_cannot_move_are_removed_along_a_ramp():
    callback, module = ReweightedPenalty(LOG_SUM, target_sparsity=0.9), wide()
    module.make = lambda p: torch.optim.SGD(p, 1e-12)
    watch = Watch(callback)
    trainer(callback, watch, epochs=30).fit(module, data())
    shares = [share for share, *_ in watch.seen]
    assert max(later - before for before, later in pairwise(shares)) < 0.1  # never at once
    assert shares[30] < 0.5 < shares[60]
    assert zeros(module) == pytest.approx(0.9, abs=0.002)
    assert all((w != 0).any() for w in weights(module).values() if w.dim() > 1)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_every_form_meets_its_target_in_a_run_of_a_few_steps(form, steps):
    module = wide()
    trainer(form(target_sparsity=0.9), epochs=-1, max_steps=steps).fit(module, data())
    assert zeros(module) == pytest.approx(0.9, abs=0.002)
    assert all(bool(torch.isfinite(w).all()) for w in weights(module).values())


def test_a_fast_dev_run_goes_through():
    module = wide()
    trainer(ReweightedPenalty(LOG_SUM, target_sparsity=0.9), fast_dev_run=True).fit(module, data(), data())
    assert zeros(module) == pytest.approx(0.9, abs=0.002)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_what_the_rank_removed_stays_zero_and_a_resumed_run_goes_on_exactly(form, tmp_path):
    make = lambda: form(target_sparsity=0.9, lam=1e-9) if form is not FORMS["VarDrop"] else form(target_sparsity=0.9, kl_weight=1e-9)  # noqa: E731
    whole, module, saver = make(), wide(), StopAfter(5)
    saver.path = tmp_path / "half.ckpt"
    watch = Watch(whole)
    trainer(whole, saver, watch, epochs=10).fit(module, data())
    assert any(0.1 < share < 0.8 for share, _, frozen in watch.seen if not frozen)
    again, resumed = make(), wide(seed=1)
    trainer(again, epochs=10).fit(resumed, data(), ckpt_path=saver.path)
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(module).items())


def test_without_a_target_the_strength_is_required():
    with pytest.raises(TypeError, match="HardConcrete needs lam; or give target_sparsity"):
        HardConcrete()
    assert HardConcrete(target_sparsity=0.9).ascent.target == 0.9
    assert VariationalDropout(target_sparsity=0.9).ascent.target == 0.9  # without one it finds its own weight


def test_the_target_has_one_name_and_its_old_ones():
    assert MagnitudePruning(target_sparsity=0.9).settings() == MagnitudePruning(0.9).settings() == MagnitudePruning(sparsity=0.9).settings()
    assert MagnitudePruning(0.9).target_sparsity == 0.9
    assert SparseCheckpoint(target_sparsity=0.9).state_key == SparseCheckpoint(0.9).state_key == SparseCheckpoint(target=0.9).state_key
    for kind, old in ((MagnitudePruning, "sparsity"), (SparseCheckpoint, "target")):
        with pytest.raises(TypeError, match=f"{kind.__name__} takes target_sparsity or its old name {old}, got both"):
            kind(**{old: 0.9, "target_sparsity": 0.8})
        with pytest.raises(TypeError, match=f"{kind.__name__} needs the share of zeros to reach, for example target_sparsity=0.9"):
            kind()
        with pytest.raises(ValueError, match=r"target_sparsity must lie in .0, 1., got 90"):
            kind(target_sparsity=90)


def test_the_share_asked_for_is_logged_by_every_form_with_a_target():
    for callback, asked in (
        (MagnitudePruning(0.6), 0.6),
        (ReweightedPenalty(LOG_SUM, target_sparsity=0.6), 0.6),
        (ReweightedPenalty(LOG_SUM, 0.1), None),
    ):
        fitted = trainer(callback, epochs=5)
        fitted.fit(wide(), data())
        logged = fitted.callback_metrics.get("sparsity/target")
        assert logged == asked if asked is None else float(logged) == pytest.approx(asked)
    assert float(trainer_metrics(MagnitudePruning(0.6, every=1), epoch=1)["sparsity/target"]) == pytest.approx(
        0.6 * (1 - (1 - 4 / 15) ** 3)
    )


def trainer_metrics(callback, epoch):
    """What is logged at an epoch's end of five."""
    seen = []
    look = LambdaCallback(on_train_epoch_end=lambda trainer, module: seen.append(dict(trainer.callback_metrics)))
    trainer(callback, look, epochs=5).fit(wide(), data())
    return seen[epoch - 1]


def test_two_callbacks_log_the_target_of_their_weights_together():
    first, second = MagnitudePruning(0.5, select=["network.0.*"]), MagnitudePruning(0.9, select=["network.2.*"])
    fitted = trainer(first, second, epochs=2)
    fitted.fit(wide(), data())
    assert float(fitted.callback_metrics["sparsity/target"]) == pytest.approx((0.5 * 512 + 0.9 * 192) / 704)
    assert float(fitted.callback_metrics["sparsity/total"]) == pytest.approx((0.5 * 512 + 0.9 * 192) / 704, abs=2e-3)


def test_weights_that_lam_brought_to_zero_are_not_counted_as_removed_by_rank():
    """The zeros lag behind the lower bound by a little at two cuts: that little is what the rank has removed."""
    callback, shares = ReweightedPenalty(LOG_SUM, target_sparsity=0.9), iter([0.50, 0.52, 0.70, 0.75])
    callback.total, callback.ascent.climb = 400, lambda zeros, t, way: None
    callback.ascent.least = lambda t: 0.51 if t < 0.5 else 0.75
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback, "share_of_zeros", lambda: next(shares))
        patch.setattr("lightning_sparse.callbacks._target.cut", lambda *_: None)
        for callback.step in (102, 201):
            assert not advance(callback)
    assert callback.ascent.ranked == pytest.approx(0.02 + 0.05)
