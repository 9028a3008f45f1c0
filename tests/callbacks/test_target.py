"""target_sparsity: every callback reaches it, freezes the support and resumes exactly; unreachable targets are refused."""

from __future__ import annotations

import logging
import re
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from toys import Toy, data, several, trainer, weights

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
    Sparsify,
    VariationalDropout,
)
from lightning_sparse.examples.digits import Digits
from lightning_sparse.schedules import RISE, Cubic, LinearWarmup, rounds

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


SIZE = 8 * 64 + 64 * 3  # selected weights of the wide toy


def count(module: nn.Module) -> int:
    return sum(int((w == 0).sum()) for w in weights(module).values() if w.dim() > 1)


def zeros(module: nn.Module) -> float:
    matrices = [w for w in weights(module).values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


class Watch(Callback):
    """Record (logged share of zeros, lam, frozen) after each batch."""

    def __init__(self, form):
        self.form, self.seen = form, []

    def on_train_batch_end(self, *_):
        self.seen.append((self.form.share_of_zeros(), self.form.lam, self.form.frozen))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_follows_the_ramp_meets_its_target_exactly_and_stays_there(form):
    callback, module = form(target_sparsity=TARGET, freeze=0.2), wide()
    watch = Watch(callback)
    trainer(callback, watch, epochs=EPOCHS).fit(module, data())
    steps = 4 * EPOCHS
    end = [frozen for *_, frozen in watch.seen].index(True) + 1
    assert end == pytest.approx(RISE * 0.8 * steps, rel=0.05)
    ramp = Cubic(TARGET, 0.0, RISE)
    for at in range(end // 2, end - 1):  # never in one blow at the end
        assert watch.seen[at][0] >= ramp((at - 0.8 * steps / rounds(0.8 * steps)) / (0.8 * steps), 1.0) - 0.02
    assert count(module) == round(TARGET * SIZE)
    assert len({share for share, _, frozen in watch.seen if frozen}) == 1
    assert len({lam for _, lam, frozen in watch.seen if frozen}) == 1


@pytest.mark.slow
def test_the_ramp_ends_where_the_support_is_frozen_and_lam_starts_where_it_is_told():
    callback, module = ReweightedPenalty(LOG_SUM, lam=1e-7, target_sparsity=0.6), wide()
    assert callback.lam == pytest.approx(1e-7)
    watch = Watch(callback)
    trainer(callback, watch, epochs=30).fit(module, data())
    assert [frozen for *_, frozen in watch.seen].index(True) == pytest.approx(90, abs=1)  # a quarter of 120 steps remains
    assert count(module) == round(0.6 * SIZE)
    assert callback.lam > 1e-6
    again = Watch(callback)
    trainer(callback, again, epochs=30).fit(wide(), data())
    assert again.seen[0][1] <= 4e-7  # because a new fit starts from the beginning


def test_the_other_forms_are_made_with_the_same_target():
    callback = AdaptiveMask(LOG_SUM, lam=1e-4, target_sparsity=0.9).to_penalty()
    assert (callback.target_sparsity, callback.freeze, callback.schedule.lam) == (0.9, 0.0, 1e-4)
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
def test_a_resumed_run_has_the_same_lam_and_weights(epochs, tmp_path):
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
def test_unreachable_targets_are_refused_before_training(make, said):
    module = wide()
    before = weights(module)
    with pytest.raises(ValueError, match=said):
        trainer(make(), epochs=2).fit(module, data())
    assert all(torch.equal(w, weights(module)[name]) for name, w in before.items())


def test_one_line_says_how_much_lam_did_and_how_much_the_rank(caplog):
    module, callback = wide(), ReweightedPenalty(LOG_SUM, target_sparsity=0.9)
    module.make = lambda p: torch.optim.SGD(p, 1e-12)  # nothing moves, and lam is bounded
    with caplog.at_level(logging.INFO):
        trainer(callback, epochs=20).fit(module, data())
    said = re.findall(r"meets target_sparsity=0.9 at step \d+: lam \(now .*\) brought (.*)% of .*, (.*)% were removed by rank", caplog.text)
    assert len(said) == 1
    by_lam, by_rank = map(float, said[0])
    assert by_lam + by_rank == pytest.approx(100 * callback.share_of_zeros(), abs=0.011)
    assert by_rank > 85
    assert count(module) == round(0.9 * SIZE)


@pytest.mark.parametrize("select", [None, ["network.*.weight"]])
def test_zeros_at_the_start_are_not_counted_as_brought_by_lam(select, caplog):
    module, callback = wide(), Sparsify(0.7, keep_zeros=True, select=select)
    with torch.no_grad():
        for w in (module.network[0].weight, module.network[2].weight):
            w.view(-1)[: w.numel() // 2] = 0
    with caplog.at_level(logging.INFO):
        trainer(callback, epochs=20).fit(module, data())
    form = "Sparsify" if select is None else r"Sparsify \(select=\['network.\*.weight'\]\)"  # which of several
    found = (
        rf"{form} meets target_sparsity=0.7 at step \d+: 50.00% of the weights have been zero from the start on, lam .* brought (.*)% of"
    )
    (said,) = re.findall(found + r" the weights to zero, (.*)% were removed by rank along the ramp .*, (.*)% in all", caplog.text)
    by_lam, by_rank, share = map(float, said)
    assert by_lam + by_rank == pytest.approx(share - 50, abs=0.011)
    assert share == pytest.approx(70, abs=0.1)


def test_the_zeros_at_the_start_are_resumed(tmp_path, caplog):
    module, callback, saver = wide(), Sparsify(0.7, keep_zeros=True), StopAfter(5)
    saver.path = tmp_path / "half.ckpt"
    with torch.no_grad():
        module.network[0].weight.view(-1)[:352] = 0
    trainer(callback, saver, epochs=10).fit(module, data())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        trainer(Sparsify(0.7, keep_zeros=True), epochs=10).fit(wide(), data(), ckpt_path=saver.path)
    assert "50.00% of the weights have been zero from the start on" in caplog.text


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
    # never immediately: a cubic ramp over 72 steps with a point at every fifth
    assert max(later - before for before, later in pairwise(shares)) <= 0.9 * (1 - (1 - 5 / 72) ** 3) + 1 / 704
    assert shares[5] < 0.3 < 0.85 < shares[60]
    assert zeros(module) == pytest.approx(0.9, abs=0.002)
    assert all((w != 0).any() for w in weights(module).values() if w.dim() > 1)


@pytest.mark.parametrize("form", ["penalty", "mask"])
def test_the_first_cut_of_a_short_run_is_as_small_as_the_ramp_says(form):
    module = wide()
    module.make = lambda p: torch.optim.Adam(p, 1e-2)
    with torch.no_grad():  # so small that the lam of the first step, which is not solved for yet, would hold most at zero
        for w in module.parameters():
            w.mul_(0.05)
    callback = FORMS[form](target_sparsity=0.95)
    watch = Watch(callback)
    trainer(callback, watch, epochs=-1, max_steps=20).fit(module, data())
    ramp = Cubic(0.95, 0.0, 1.0)
    for step, (share, *_) in enumerate(watch.seen[:15], start=1):
        assert share <= ramp(step, 15) + 0.02
    assert zeros(module) == pytest.approx(0.95, abs=0.002)


@pytest.mark.parametrize("form", several(FORMS, "penalty", "mask", "L0"))
@pytest.mark.parametrize("steps", several({"1": 1, "3": 3, "20": 20}, "1", "20"))
def test_every_form_meets_its_target_in_a_run_of_a_few_steps(form, steps):
    module = wide()
    trainer(form(target_sparsity=0.9), epochs=-1, max_steps=steps).fit(module, data())
    assert zeros(module) == pytest.approx(0.9, abs=0.002)
    assert all(bool(torch.isfinite(w).all()) for w in weights(module).values())


def test_a_fast_dev_run_completes():
    module = wide()
    trainer(ReweightedPenalty(LOG_SUM, target_sparsity=0.9), fast_dev_run=True).fit(module, data(), data())
    assert zeros(module) == pytest.approx(0.9, abs=0.002)


@pytest.mark.parametrize("form", several(FORMS, "penalty", "mask", "L0"))
def test_weights_removed_by_rank_stay_zero_and_a_resumed_run_is_exact(form, tmp_path):
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
    with pytest.raises(TypeError, match=r"HardConcrete needs lam, its strength.*or give target_sparsity=0.95"):
        HardConcrete()
    assert HardConcrete(target_sparsity=0.9).ascent.target == 0.9
    assert VariationalDropout(target_sparsity=0.9).ascent.target == 0.9  # without kl_weight it computes its own


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
    """Return the figures logged at the end of each of five epochs."""
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


def test_weights_that_lam_brought_to_zero_are_not_counted_as_removed_by_rank(caplog):
    callback, module = AdaptiveProx(penalties.L1(), exact=True, target_sparsity=0.5), wide()
    module.make = lambda p: torch.optim.SGD([{"params": [*p], "lr": 1.0}], 1.0)
    with torch.no_grad():
        for w in module.parameters():
            w.mul_(1e-3)  # within reach of a bounded lam
    with caplog.at_level(logging.INFO):
        trainer(callback, epochs=30).fit(module, data())
    by_lam = float(re.search(r"brought ([0-9.]+)% of the weights to zero", caplog.text).group(1)) / 100
    assert by_lam > 0.02
    assert count(module) == round(0.5 * SIZE)


@pytest.mark.parametrize("rate", [1e-5, 0.1])
@pytest.mark.parametrize("steps", [20, 120])
@pytest.mark.parametrize("form", several(FORMS, "penalty", "mask"))
def test_a_target_is_met_under_sgd_and_at_the_rates_of_fine_tuning(form, steps, rate):
    module = wide()
    module.make = (lambda p: torch.optim.SGD(p, rate, momentum=0.9)) if rate > 0.01 else (lambda p: torch.optim.AdamW(p, rate))
    callback = form(target_sparsity=0.9)
    watch = Watch(callback)
    trainer(callback, watch, epochs=-1, max_steps=steps).fit(module, data())
    assert count(module) == round(0.9 * SIZE)
    shares = [share for share, *_ in watch.seen]
    assert max(later - before for before, later in pairwise(shares)) < 0.35  # along the ramp, which is steep in 20 steps
    assert all(bool(torch.isfinite(w).all()) for w in weights(module).values())


@pytest.mark.slow
def test_under_sgd_the_target_costs_no_more_than_pruning_does():
    """If lam alone had to produce all zeros within 60 epochs, it would also shrink the remaining weights."""
    data, losses = Digits(batch_size=64), {}
    data.setup("fit")
    (x, y), sgd = data.parts["validation"], lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4)
    for form in (ReweightedPenalty(LOG_SUM, target_sparsity=0.9), MagnitudePruning(target_sparsity=0.9)):
        torch.manual_seed(0)
        hidden = [(nn.Linear(n, m), nn.BatchNorm1d(m), nn.ReLU()) for n, m in pairwise((64, 300, 100))]
        module = Toy(nn.Sequential(*hidden[0], *hidden[1], nn.Linear(100, 10)), optimizer=sgd, decay=True)
        trainer(form, epochs=60).fit(module, data.train_dataloader())
        module.eval()
        losses[type(form).__name__] = float(nn.functional.cross_entropy(module.network(x), y).detach())
    assert losses["ReweightedPenalty"] < 1.15 * losses["MagnitudePruning"]


def test_layers_that_start_at_zero_are_not_removed_before_they_have_learned():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    for layer in (network[2], network[4]):
        nn.init.zeros_(layer.weight)
    form = VariationalDropout(target_sparsity=0.8)
    trainer(form, epochs=30).fit(Toy(network, optimizer=lambda p: torch.optim.Adam(p, 3e-4)), data())
    assert form.share_of_zeros() == pytest.approx(0.8, abs=1e-3)
    assert int((network[2].weight != 0).sum()) > 40  # of 1,024


@pytest.mark.parametrize("lam", [1.0, 10.0])
def test_a_given_lam_far_above_the_bound_falls_to_it_at_once(lam):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    form = AdaptiveProx(penalties.LogSum(2.0), lam, target_sparsity=0.3, exact=True)
    trainer(form, epochs=15).fit(Toy(network, optimizer=lambda p: torch.optim.Adam(p, 2e-3)), data())
    assert form.share_of_zeros() == pytest.approx(0.3, abs=1e-3)
    assert all(int((layer.weight != 0).sum()) > 0.2 * layer.weight.numel() for layer in network[::2])


@pytest.mark.parametrize(
    "form", [lambda: VariationalDropout(target_sparsity=0.5), lambda: HardConcrete(target_sparsity=0.5)], ids=["VarDrop", "L0"]
)
def test_the_price_of_learned_noise_stays_at_its_start_with_a_target(form):
    callback, seen = form(), []
    watch = LambdaCallback(on_train_batch_end=lambda *_: seen.append(callback.lam))
    first = callback.strength.target.lam
    module = wide()
    module.make = lambda p: torch.optim.SGD(p, 1e-3)
    trainer(callback, watch, epochs=5).fit(module, data())
    assert set(seen) == {first}
