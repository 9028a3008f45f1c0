"""MagnitudePruning: the share of zeros at each step, the ranking, and that pruned weights stay zero."""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.nn.utils import prune
from toys import Repeated, Toy, data, trainer, weights

from lightning_sparse import mask_rules, penalties, schedules
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, MagnitudePruning, ReweightedPenalty
from lightning_sparse.conformance.neighbours import Backboned
from lightning_sparse.mask_rules.ranked import prune_smallest
from lightning_sparse.support import Support

SIZE, STEPS = 176, 40  # weights in the toy's matrices; optimiser steps in ten epochs
OPTIMIZERS = {
    "Adam with decay": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
}


def matrices(module):
    return {name: w for name, w in weights(module).items() if w.dim() > 1}


class Watch(Callback):
    """Record the matrices and the logged target before training and after each batch."""

    def __init__(self, pruning):
        self.pruning, self.seen, self.targets = pruning, [], []

    def on_train_start(self, trainer, pl_module):
        self._look(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self._look(pl_module)

    def _look(self, module):
        self.seen.append(matrices(module))
        self.targets.append(self.pruning.figures()["sparsity/lam"])

    @property
    def zeros(self):
        return [sum(int((w == 0).sum()) for w in shown.values()) for shown in self.seen]


class SaveAt(Callback):
    """Save a file after a given number of epochs."""

    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epochs - 1:
            trainer.save_checkpoint(self.path)


def run(pruning, *others, epochs=10, module=None, **options):
    """Fit with 4 batches per epoch and return the records."""
    watch = Watch(pruning)
    trainer(pruning, watch, *others, epochs=epochs, **options).fit(module or Toy(), data())
    return watch


def by_hand(step, total, final, start, begin, end):
    """Equation 1 of Zhu and Gupta: s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 for t from t_0 to t_0 + n dt."""
    t = min(max(step, begin * total), end * total)
    return final + (start - final) * (1 - (t - begin * total) / ((end - begin) * total)) ** 3


RAMPS = [(0.9, 0.0, 0.0, 0.75, 1), (0.5, 0.1, 0.0, 1.0, 7), (0.99, 0.3, 0.4, 0.45, 1)]


@pytest.mark.parametrize(
    ("sparsity", "start", "begin", "end", "every"),
    [(0.8, 0.25, 0.2, 0.7, 3), *(pytest.param(*ramp, marks=pytest.mark.slow) for ramp in RAMPS)],
)
def test_the_share_of_zeros_follows_the_papers_schedule(sparsity, start, begin, end, every):
    watch = run(MagnitudePruning(sparsity, begin=begin, end=end, every=every, start=start))
    expected = 0
    for step, (zeros, target) in enumerate(zip(watch.zeros, watch.targets, strict=True)):
        share = by_hand(step, STEPS, sparsity, start, begin, end)
        if step >= begin * STEPS and ((step - round(begin * STEPS)) % every == 0 or step == end * STEPS):
            expected = round(SIZE * share)
        assert zeros == expected, f"after step {step}"
        assert target == pytest.approx(share, abs=1e-12)


def cuts(pruning, epochs, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(pruning, epochs=epochs, **options)
    return [str(one.message) for one in said if " cut" in str(one.message)]


def test_a_ramp_of_few_cuts_gives_a_warning_that_suggests_every():
    said = cuts(MagnitudePruning(0.8, every=100), 30)
    assert len(said) == 1
    assert "reaches 80.0% zeros in 1 cut: its ramp is 90 optimiser steps long and it prunes every 100" in said[0]
    assert said[0].endswith("give every=3")
    assert cuts(MagnitudePruning(0.8, every=3), 30) == []


@pytest.mark.parametrize(("epochs", "every"), [(30, 9), pytest.param(335, 100, marks=pytest.mark.slow)])  # ramps of 90 and 1,005 steps
def test_by_default_a_ramp_holds_at_least_ten_prunings_a_hundred_steps_apart(epochs, every):
    zeros = run(MagnitudePruning(0.8), epochs=epochs).zeros
    changed = [step for step, (before, now) in enumerate(pairwise(zeros), start=1) if now != before]
    assert changed == [*range(every, 10 * every, every)]  # the tenth pruning finds the share of the end, 141 of 176, already there
    assert cuts(MagnitudePruning(0.8), epochs) == []


def test_no_warning_about_a_trial_of_few_cuts(caplog):
    with caplog.at_level(logging.INFO):
        assert cuts(MagnitudePruning(0.8, every=10), 5) == []
    assert "in 2 cuts: its ramp is 15 optimiser steps long" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert cuts(MagnitudePruning(0.8), 1, fast_dev_run=True) == []
    assert "cut" not in caplog.text


def test_weights_are_ranked_no_more_after_the_ramp(monkeypatch):
    ranked, own = [], Support.keep_highest
    monkeypatch.setattr(Support, "keep_highest", lambda support, alive, share: ranked.append(share) or own(support, alive, share))
    run(MagnitudePruning(0.8, end=0.5, every=3))
    assert ranked == pytest.approx([by_hand(step, STEPS, 0.8, 0.0, 0.0, 0.5) for step in [*range(0, STEPS // 2, 3), STEPS // 2]])


def test_parameters_added_after_the_ramp_are_pruned_with_the_others():
    pruning, module = MagnitudePruning(0.75, end=0.25, every=3), Backboned()
    trainer(pruning, BackboneFinetuning(2, backbone_initial_ratio_lr=1.0), epochs=4).fit(module, data())
    assert sum(int((w == 0).sum()) for w in (module.backbone.weight, module.head.weight)) == round(0.75 * SIZE)
    assert (module.backbone.weight == 0).any()


def test_the_schedule_at_steps_worked_out_by_hand():
    ramp = schedules.Cubic(0.9, 0.2, 0.6, start=0.1)
    assert [ramp(step, 100) for step in (0, 20, 40, 50, 60, 100)] == pytest.approx([0.1, 0.1, 0.8, 0.8875, 0.9, 0.9], abs=1e-12)
    assert ramp(60, 100) == 0.9
    with pytest.raises(ValueError, match=r"start must lie in \[0, 0.5\), got 0.6"):
        schedules.Cubic(0.5, start=0.6)


@pytest.mark.parametrize("sparsity", [0.9, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.003, 0.5, 0.987))])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_share_at_the_end_is_exact(sparsity, scope):
    module = Toy()
    fitted = trainer(MagnitudePruning(sparsity, every=100, scope=scope), epochs=3)
    fitted.fit(module, data())
    zeros = {name: int((w == 0).sum()) for name, w in matrices(module).items()}
    if scope == "layer":
        assert zeros == {name: min(round(sparsity * w.numel()), w.numel() - 1) for name, w in matrices(module).items()}
    else:
        assert sum(zeros.values()) == round(sparsity * SIZE)
    assert float(fitted.callback_metrics["sparsity/total"]) == pytest.approx(sum(zeros.values()) / SIZE, abs=1e-6)
    assert float(fitted.callback_metrics["sparsity/lam"]) == pytest.approx(sparsity)
    assert float(fitted.callback_metrics["sparsity/keep_probability"]) == pytest.approx(1 - sum(zeros.values()) / SIZE, abs=1e-6)
    assert float(fitted.callback_metrics["sparsity/penalty"]) == 0.0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_equal_those_of_torch_pruning(scope):
    """At learning rate 0 the smallest initial weights are pruned, globally or per layer, as by torch.nn.utils.prune."""
    module, twin = Toy(optimizer=lambda p: torch.optim.SGD(p, 0.0)), Toy()
    layers = [(twin.network[0], "weight"), (twin.network[2], "weight")]
    if scope == "global":
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    else:
        for layer, name in layers:
            prune.l1_unstructured(layer, name, amount=0.5)
    run(MagnitudePruning(0.5, every=5, scope=scope), module=module)
    for mine, (layer, _) in zip(matrices(module).values(), layers, strict=True):
        assert torch.equal(mine != 0, layer.weight_mask.bool())
    shares = [float((w == 0).float().mean()) for w in matrices(module).values()]
    assert (shares == [0.5, 0.5]) == (scope == "layer")


def test_one_layer_cut_once_equals_torch_pruning_of_it():
    """The arguments are those of docs/guide/migrate.md."""
    module, twin = Toy(optimizer=lambda p: torch.optim.SGD(p, 0.0)), Toy()
    prune.l1_unstructured(twin.network[2], "weight", amount=0.5)
    run(MagnitudePruning(target_sparsity=0.5, begin=0, end=0.01, select=["network.2.weight"]), module=module)
    assert torch.equal(module.network[2].weight != 0, twin.network[2].weight_mask.bool())
    assert (module.network[0].weight != 0).all()


@pytest.mark.parametrize("name", ["Adam with decay", *(pytest.param(name, marks=pytest.mark.slow) for name in list(OPTIMIZERS)[1:])])
def test_pruned_weights_stay_zero_whatever_the_optimiser_does(name):
    watch = run(MagnitudePruning(0.8, end=0.6, every=2), module=Toy(optimizer=OPTIMIZERS[name]))
    for before, after in zip(watch.seen, watch.seen[1:], strict=False):
        assert not any(bool(((w == 0) & (after[name] != 0)).any()) for name, w in before.items())
    assert watch.zeros[25:] == [round(0.8 * SIZE)] * 16
    last, tuned = watch.seen[25], watch.seen[-1]
    assert any(not torch.equal(w, tuned[name]) for name, w in last.items())  # the remaining weights are still trained


BY_LAYER, FROZEN = {"scope": "layer", "start": 0.2, "begin": 0.1}, {"freeze": 0.25}
SLOWER = [(epochs, options) for options in ({}, BY_LAYER, FROZEN) for epochs in (1, 3, 5, 8)]


@pytest.mark.parametrize(("epochs", "options"), [(4, {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWER)], ids=str)
def test_a_run_resumed_on_the_ramp_or_after_it_equals_the_uninterrupted_one(epochs, options, tmp_path):
    make = lambda: MagnitudePruning(0.8, every=3, **options)  # noqa: E731
    whole, again = Toy(decay=STEPS), Toy(decay=STEPS, seed=1)

    watch = run(make(), SaveAt(epochs, tmp_path / "part.ckpt"), module=whole)
    resumed = Watch(make())
    trainer(resumed.pruning, resumed, epochs=10).fit(again, data(), ckpt_path=tmp_path / "part.ckpt")
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(whole).items())
    assert resumed.zeros == watch.zeros[4 * epochs :]


class Late(Toy):
    """A toy whose last layer is zero in the first epoch, so that nothing moves."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_an_unpruned_zero_weight_trains_on_after_a_resume(tmp_path):
    """The file's masks distinguish initial zeros from pruned weights."""
    ends = []
    for seed, path in ((0, None), (1, tmp_path / "part.ckpt")):
        module = Late(seed=seed)
        module.network[2].weight.data.zero_()
        trainer(MagnitudePruning(0.1, every=3), SaveAt(1, tmp_path / "part.ckpt")).fit(module, data(), ckpt_path=path)
        ends.append(module.network[2].weight.detach())
    assert 0 < int((ends[0] == 0).sum()) < 48
    assert torch.equal(*ends)


def test_tied_weights_are_ranked_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.second(self.first(x).relu()).relu())

    module = Toy(Tied())
    trainer(MagnitudePruning(0.5, every=2), epochs=2).fit(module, data())
    assert sum(int((p == 0).sum()) for p in module.parameters() if p.dim() > 1) == (64 + 24) / 2


class TwoByHand(Toy):
    """Manual optimisation with one optimiser per layer; the second steps only at every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers()[: 1 + index % 2]:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers()[: 1 + index % 2]:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.network[at].parameters(), 1e-2, weight_decay=0.1) for at in (0, 2)]


def test_manual_optimisation_with_two_optimisers_counts_batches():
    watch = run(MagnitudePruning(0.8, every=4), module=TwoByHand())
    assert watch.zeros[::4] == [round(SIZE * by_hand(step, STEPS, 0.8, 0, 0, 0.75)) for step in range(0, 29, 4)] + [
        round(0.8 * SIZE) for step in range(32, 41, 4)
    ]


def test_accumulated_batches_are_one_step():
    watch = run(MagnitudePruning(0.8, every=2), accumulate_grad_batches=4)
    expected = [round(SIZE * by_hand(step - step % 2 if step < 8 else 10, 10, 0.8, 0, 0, 0.75)) for step in range(11)]
    assert watch.zeros[::4] == expected


def test_zeros_that_are_kept_count_among_the_pruned():
    sparse = Toy()
    sparse.network[0].weight.data[:, :4] = 0  # 64 of 176 weights, no complete unit
    kept, free, beyond = (copy.deepcopy(sparse) for _ in range(3))
    pruning = {"sparsity": 0.4, "begin": 0.5, "every": 2}
    zeros = run(MagnitudePruning(**pruning, keep_zeros=True), module=kept, epochs=3).zeros
    assert zeros[:7] == [64] * 7
    assert zeros[-1] == round(0.4 * SIZE)
    assert not kept.network[0].weight[:, :4].any()
    assert run(MagnitudePruning(**pruning), module=free, epochs=3).zeros[-1] == round(0.4 * SIZE)
    assert free.network[0].weight[:, :4].any()
    with pytest.raises(ValueError, match=r"^target_sparsity=0.2 is out of reach: 36.36% of the selected weights are zero already"):
        run(MagnitudePruning(0.2, keep_zeros=True), module=beyond, epochs=3)


def test_a_run_stopped_on_the_ramp_gives_a_warning():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"ended at step 4 of 40, .* has reached 27.9% zeros, not 80.0%; .* Train to step 30 at least"):
        run(MagnitudePruning(0.8), Stop())


# -- conversion and refusals ---------------------------------------------------------------------------------------------


def test_its_mask_form_is_top_k_with_the_same_selection():
    mask = MagnitudePruning(0.9, select=["network.0.*"], freeze=0.1, keep_zeros=True).to_mask(curvature=None)
    assert isinstance(mask, AdaptiveMask)
    assert (mask.given, mask.lam, mask.curvature) == (mask_rules.TopK(density=0.1), 1.0, None)
    assert (mask.select, mask.freeze, mask.keep_zeros) == (["network.0.*"], 0.1, True)
    module = Toy()
    trainer(mask).fit(module, data())
    assert int((module.network[0].weight == 0).sum()) == 128 - 13


@pytest.mark.parametrize("way", ["to_penalty", "to_prox"])
def test_forms_that_need_a_slope_are_refused_with_one_that_works(way):
    with pytest.raises(ValueError, match=r"indicator of 'at most k non-zeros'.* use to_mask\(\), or") as refusal:
        getattr(MagnitudePruning(0.9), way)()
    names = {"penalties": penalties, "ReweightedPenalty": ReweightedPenalty, "AdaptiveProx": AdaptiveProx}
    named = eval(str(refusal.value).partition("such as ")[2], names)
    trainer(named).fit(Toy(), data())


BAD = {
    "no sparsity": ({"sparsity": 0.0}, r"sparsity must lie in \(0, 1\), got 0.0"),
    "all of it": ({"sparsity": 1}, r"sparsity must lie in \(0, 1\), got 1"),
    "percent": ({"sparsity": 90}, r"sparsity must lie in \(0, 1\), got 90"),
    "NaN": ({"sparsity": math.nan}, r"sparsity must lie in \(0, 1\), got nan"),
    "begin after end": ({"begin": 0.8}, r"begin=0.8 is not below end=0.75, its default"),
    "begin at end": ({"begin": 0.5, "end": 0.5}, r"end must lie in \(0.5, 1\], got 0.5"),
    "end": ({"end": 1.5}, r"end must lie in \(0, 1\], got 1.5"),
    "never": ({"every": 0}, r"every must be a whole number >= 1, got 0"),
    "half a step": ({"every": 2.5}, r"every must be a whole number >= 1, got 2.5"),
    "true": ({"every": True}, r"every must be a whole number >= 1, got True"),
    "scope": ({"scope": "globl"}, r"scope must be 'global' or 'layer', got 'globl'; closest: 'global'"),
    "scope's type": ({"scope": 3}, r"scope must be 'global' or 'layer', got 3"),
    "start": ({"start": 0.9}, r"start must lie in \[0, 0.9\), got 0.9"),
    "freeze": ({"freeze": 0.5}, r"end must be at most 0.5 with freeze=0.5, got 0.75; or set freeze=0"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as refusal:
        MagnitudePruning(**({"sparsity": 0.9} | given))
    assert "\n" not in str(refusal.value)


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"needs the length of the run.* give the Trainer max_epochs, such as max_epochs=20, or max_steps"):
        trainer(MagnitudePruning(0.9), epochs=-1).fit(Toy(), data())


@pytest.mark.parametrize("damage", ["all", "one"])
def test_a_file_without_its_masks_is_refused(damage, tmp_path):
    fitted = trainer(MagnitudePruning(0.5), epochs=1)
    fitted.fit(Toy(), data())
    fitted.save_checkpoint(tmp_path / "whole.ckpt")
    content = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    state = next(iter(content["callbacks"].values()))
    if damage == "all":
        del state["held"]
    else:
        del state["held"]["network.0.weight"]
    file = io.BytesIO()
    torch.save(content, file)
    (tmp_path / "cut.ckpt").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="'held' must be a mask for each of the weights taken"):
        trainer(MagnitudePruning(0.5), epochs=2).fit(Toy(), Repeated(next(iter(data()))), ckpt_path=tmp_path / "cut.ckpt")


# -- the ranking ------------------------------------------------------------------------------------------------------------


def test_among_equal_weights_the_last_go_first_and_pruned_ones_never_return():
    w = {"a": torch.tensor([[1.0, -1.0]]), "b": torch.tensor([1.0, 5.0])}
    everything = {name: torch.ones_like(part, dtype=torch.bool) for name, part in w.items()}
    first = prune_smallest(w, everything, 0.25)
    assert [first["a"].tolist(), first["b"].tolist()] == [[[True, True]], [False, True]]
    grown = w | {"b": torch.tensor([9.0, 5.0])}
    later = prune_smallest(grown, first, 0.5)
    assert [later["a"].tolist(), later["b"].tolist()] == [[[True, False]], [False, True]]
    assert all(torch.equal(kept, later[name]) for name, kept in prune_smallest(grown, later, 0.1).items())
    assert sum(int(kept.sum()) for kept in prune_smallest(w, everything, 0.99).values()) == 1
    assert prune_smallest({}, {}, 0.5) == {}


def test_what_is_asked_for_follows_the_ramp_and_stays_after_the_freeze():
    seen = []

    class Asked(Callback):
        def on_train_batch_end(self, *_):
            seen.append((callback.step, callback.total, callback.frozen, callback.asked))

    callback = MagnitudePruning(0.8, end=0.5, every=1, freeze=0.25)
    trainer(callback, Asked(), epochs=8).fit(Toy(), data())
    ramp = schedules.Cubic(0.8, 0.0, 0.5)
    assert [asked for *_, asked in seen] == pytest.approx([ramp(step, total) for step, total, *_ in seen])
    assert seen[0][3] < 0.5
    assert [frozen for *_, frozen, _ in seen][-1]
    assert seen[-1][3] == 0.8
