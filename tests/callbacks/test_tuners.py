"""With callbacks that run trials, change accumulation or unfreeze parameters; and several sparsity callbacks in one run."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, LearningRateFinder, ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.model_summary import summarize
from torch import nn
from toys import Toy, data, hooks, trainer, weights

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.conformance._wandb_file import read_run
from lightning_sparse.conformance.neighbours import Backboned
from lightning_sparse.schedules import LinearWarmup

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
slow = pytest.mark.slow
LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": ReweightedPenalty,
    "prox": AdaptiveProx,
    "mask": AdaptiveMask,
    "mask, Bernoulli": lambda *a, **k: AdaptiveMask(*a, noise=noise.ScaledBernoulli(), **k),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
both_orders = pytest.mark.parametrize("first", [True, False], ids=["before", "after"])


def ordered(first, callback, *others):
    return [callback, *others] if first else [*others, callback]


def finder():
    return LearningRateFinder(num_training_steps=6, update_attr=False)


class Started(Toy):
    """Record the state when training starts."""

    def __init__(self, callback, **options):
        super().__init__(**options)
        self.callback, self.seen = callback, []

    def on_train_start(self):
        steps = sum(len(optimizer._optimizer_step_post_hooks) for optimizer in self.trainer.optimizers)
        self.seen.append((self.callback.step, hooks(self), steps, self.callback.lam, weights(self)))


def leaves_no_trace(folder):
    """Check that Lightning's own run ends the same with and without the trial."""
    ends = []
    for others in ([], [finder()]):
        module = Toy()
        trainer(*others, epochs=2, default_root_dir=folder).fit(module, data())
        ends.append(weights(module))
    return all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


@slow
@every_form
def test_a_trial_leaves_step_0_live_weights_and_single_hooks(form, tmp_path):
    def started(*others):
        callback = form(LOG_SUM, LinearWarmup(0.5, 0.5), freeze=0.25)
        module = Started(callback)
        trainer(callback, *others, epochs=2, default_root_dir=tmp_path).fit(module, data())
        return module.seen[-1], callback.step, weights(module)

    (alone, steps, ends), (beside, again, others) = started(), started(finder())
    assert beside[:4] == alone[:4]
    assert all(torch.equal(w, beside[4][name]) for name, w in alone[4].items())
    if not leaves_no_trace(tmp_path):
        pytest.skip("Lightning's own run differs after a trial")
    assert steps == again == 8
    assert all(torch.equal(w, others[name]) for name, w in ends.items())


class Again(LearningRateFinder):
    """A second trial at the start of the second epoch, as in Lightning's documentation."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@slow
@every_form
def test_a_trial_in_the_middle_of_a_run_is_without_the_callback_and_leaves_no_trace(form, tmp_path):
    steps = []

    class Looking(Toy):
        def on_train_batch_end(self, *args):
            if callback not in self.trainer.callbacks:
                steps.append(callback.step)

    ends = []
    for others in ([], [Again(num_training_steps=6, update_attr=False)]):
        callback, module = form(LOG_SUM, LinearWarmup(0.2, 0.5), freeze=0.25), Looking()
        trainer(callback, *others, epochs=3, default_root_dir=tmp_path).fit(module, data())
        ends.append(weights(module))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())
    assert steps == [4]  # because Lightning's trial ends with its first batch there


@slow
@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveMask])
def test_a_trial_before_a_resumed_run_gives_the_live_weights_and_the_step_back(form, tmp_path):
    live, rising = [], LinearWarmup(0.5, 1.0)

    class Noting(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            live.append(weights(pl_module))

    keeper = Noting(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(form(LOG_SUM, rising, tol=0.5), keeper, epochs=3, enable_checkpointing=True).fit(Toy(), data())
    file = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert any((file[name] == 0).any() and (w != 0).all() for name, w in live[1].items())
    callback = form(LOG_SUM, rising, tol=0.5)
    module = Started(callback, seed=1)
    trainer(callback, finder(), epochs=3, default_root_dir=tmp_path).fit(module, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    step, *_, started = module.seen[-1]
    assert step == 8
    assert all(torch.equal(started[name], w) for name, w in live[1].items())


@both_orders
def test_shares_follow_accumulation_that_changes(first):
    seen = []

    class Looking(Toy):
        def on_train_batch_end(self, *args):
            seen.append((callback.step, callback.lam, callback.frozen))

    callback = ReweightedPenalty(LOG_SUM, LinearWarmup(0.5, 0.5), freeze=0.25)
    run = trainer(*ordered(first, callback, GradientAccumulationScheduler({0: 2, 2: 4})), epochs=4)
    run.fit(Looking(), data())
    assert [step for step, *_ in seen] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6]  # 2 + 2 + 1 + 1 steps
    assert [lam for _, lam, _ in seen] == pytest.approx([0.5 * min(1, step / 3) for step, *_ in seen])
    assert [frozen for *_, frozen in seen] == [step >= 4 for step, *_ in seen]


def test_a_summary_counts_the_users_parameters():
    shown = []

    class Noting(ModelSummary):
        @staticmethod
        def summarize(summary_data, total_parameters, *args, **kwargs):
            shown.append(int(total_parameters))

    module = Toy()
    module.example_input_array = torch.zeros(2, 8)
    trainer(AdaptiveMask(LOG_SUM, 0.5), Noting(max_depth=-1), epochs=1).fit(module, data())
    assert shown == [summarize(Toy()).total_parameters]


class Thawing(BackboneFinetuning):
    """BackboneFinetuning with a backbone that trains again after a resume (Lightning's own stays frozen)."""

    def __init__(self):
        super().__init__(1, backbone_initial_ratio_lr=1.0)

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        if len(trainer.optimizers[0].param_groups) > 1:
            self.make_trainable(pl_module.backbone)


class Unfrozen(Backboned):
    def training_step(self, batch, index):
        self.__dict__.setdefault("used", []).append(self.backbone.weight.detach().clone())
        return super().training_step(batch, index)

    def on_train_epoch_start(self):
        self.__dict__.setdefault("noted", []).append(sorted(self.watched.parameters))


def thawed(callback, first, *more, seed=0, thaw=Thawing, **options):
    module = Unfrozen(seed=seed)
    torch.manual_seed(seed)
    module.backbone.reset_parameters()
    module.watched = callback
    checkpointing = {"enable_checkpointing": True} if more else {}
    run = trainer(*ordered(first, callback, thaw()), *more, epochs=4, **checkpointing)
    run.fit(module, data(), data(), **options)
    return module, run


@slow
@every_form
@both_orders
def test_unfrozen_parameters_are_added_and_a_resumed_run_is_exact(form, first, tmp_path):
    lam = 0.02 if form is AdaptiveProx else 0.2
    callback = form(LOG_SUM, lam)
    whole, run = thawed(callback, first, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert list(callback.parameters) == ["head.weight", "backbone.weight"]
    assert 0 < int((whole.backbone.weight == 0).sum()) < 128
    total = sum(int((w == 0).sum()) for w in (whole.backbone.weight, whole.head.weight)) / 176
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(total, abs=1e-7)
    for epoch in (0, 1, 2):
        file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert bool((file["backbone.weight"] == 0).any()) == (epoch > 0)
        resumed, _ = thawed(form(LOG_SUM, lam), first, seed=1, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(whole).items()), epoch


@slow
@both_orders
@pytest.mark.parametrize("select", [["backbone.*", "head.*"], ["backbone.weight", "head.weight"], ["backbone.*"]], ids=str)
def test_patterns_and_names_of_frozen_parameters_wait_for_them(select, first):
    callback = AdaptiveMask(LOG_SUM, 0.2, select=select, freeze=0.25)
    module, _ = thawed(callback, first)
    assert module.noted[0] == ["head.weight"][: len(select) - 1]
    assert sorted(callback.parameters) == [f"{name[:-2]}.weight" if name.endswith("*") else name for name in select]
    assert 0 < int((module.backbone.weight == 0).sum()) < 128
    assert callback.step == 16


@slow
@both_orders
@pytest.mark.parametrize("form", [ReweightedPenalty, FORMS["mask, Bernoulli"]], ids=["penalty", "mask"])
def test_a_resumed_run_whose_backbone_stays_frozen_keeps_its_live_values_and_ends_sparse(form, first, tmp_path):
    live = []

    class Noting(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            live.append(pl_module.backbone.weight.detach().clone())

    plain = lambda: BackboneFinetuning(1, backbone_initial_ratio_lr=1.0)  # noqa: E731
    thawed(form(LOG_SUM, 0.5), first, Noting(tmp_path, filename="{epoch}", save_top_k=-1), thaw=plain)
    resumed, _ = thawed(form(LOG_SUM, 0.5), first, seed=1, thaw=plain, ckpt_path=tmp_path / "epoch=2.ckpt")
    w = resumed.backbone.weight
    assert not w.requires_grad
    assert len(resumed.used) == 4
    assert all(torch.equal(used, live[2]) for used in resumed.used)  # frozen weights get no noise
    assert torch.equal(w[w != 0], live[2][w != 0])
    assert (w == 0).any()


@slow
@every_form
def test_parameters_added_after_the_freeze_are_frozen_too(form):
    seen = []

    class Late(Unfrozen):
        def on_train_batch_end(self, *args):
            seen.append((callback.frozen, self.backbone.weight == 0))

    callback, module = form(LOG_SUM, 0.5, freeze=0.75, threshold=0.05), Late()
    module.watched = callback
    trainer(callback, BackboneFinetuning(2, backbone_initial_ratio_lr=1.0), epochs=4).fit(module, data())
    assert [frozen for frozen, _ in seen] == [False] * 3 + [True] * 13
    assert not seen[7][1].any()
    assert seen[8][1].any()
    assert all(torch.equal(zeros, seen[8][1]) for _, zeros in seen[8:])
    assert torch.equal(module.backbone.weight == 0, seen[8][1])


@slow
@pytest.mark.parametrize("second", [ReweightedPenalty, AdaptiveMask])
def test_two_callbacks_keep_their_own_states_and_resume_exactly(second, tmp_path):
    def own():
        options = {"noise": noise.ScaledBernoulli()} if second is AdaptiveMask else {}
        first = second(LOG_SUM, 0.5, select=["network.0.*"], freeze=0.25, **options)
        return [first, second(LOG_SUM, LinearWarmup(0.2, 0.5), select=["network.2.*"])]

    whole, keeper = Toy(decay=True), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(*own(), keeper, epochs=4, enable_checkpointing=True).fit(whole, data())
    states = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert {key for key in states if "network" in key} == {callback.state_key for callback in own()}
    resumed = Toy(decay=True, seed=1)
    trainer(*own()[::-1], epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    if second is ReweightedPenalty:
        assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(whole).items())
    again = Toy(decay=True, seed=1)
    trainer(*own(), epochs=4).fit(again, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(whole).items())


class Tied(Toy):
    """Two layers with a tied weight."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)))
        self.network[2].weight = self.network[0].weight


def test_two_callbacks_on_one_weight_are_refused_under_any_of_its_names():
    callbacks = [ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.weight"]), AdaptiveProx(LOG_SUM, 0.5, select=["network.2.weight"])]
    with pytest.raises(ValueError, match=r"two sparsity callbacks select .*network"):
        trainer(*callbacks).fit(Tied(), data())


@slow
def test_the_recipes_of_several_callbacks_are_listed_in_wandbs_config(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    own = [ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"]), ReweightedPenalty(LOG_SUM, 0.1, select=["network.2.*"])]
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    trainer(*own, epochs=1, logger=logger).fit(Toy(), data())
    logger.experiment.finish()
    assert read_run(tmp_path).config["sparsify"] == [callback.recipe() for callback in own]
