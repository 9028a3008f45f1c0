"""VariationalDropout without kl_weight: 1 / number of training labels, computed at the first step."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import Toy, data, trainer

from lightning_sparse.callbacks import HardConcrete, VariationalDropout
from lightning_sparse.schedules import Constant, LinearWarmup

NOISE = ("additive", "local", "weight")


class Tokens(Toy):
    """A toy with one label per token; negative labels are ignored."""

    def training_step(self, batch, index):
        return functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-1)


def tokens(ignored=False):
    x, y = torch.randn(48, 6, 8), torch.randint(0, 3, (48, 6))
    if ignored:
        y[:, 4:] = -1
    return DataLoader(TensorDataset(x, y), 16)


CASES = {
    "samples": (Toy, data, {}, 64),
    "samples, a last batch of half the size": (Toy, lambda: data(56), {}, 64),
    "tokens": (Tokens, tokens, {}, 48 * 6),
    "tokens, some of them padding": (Tokens, lambda: tokens(True), {}, 48 * 4),
    "an accumulation": (Tokens, tokens, {"accumulate_grad_batches": 2}, 48 * 6),
    "a part of the batches": (Toy, data, {"limit_train_batches": 2}, 32),
}


@pytest.mark.parametrize(("kind", "loader", "options", "labels"), CASES.values(), ids=CASES.keys())
def test_it_is_one_over_the_labels_of_the_training_set(kind, loader, options, labels):
    callback = VariationalDropout()
    run = trainer(callback, epochs=1, **options)
    run.fit(kind(), loader())
    assert callback.lam == pytest.approx(1 / labels, rel=1e-6)
    assert run.callback_metrics["sparsity/lam"].item() == pytest.approx(1 / labels, rel=1e-6)


@pytest.mark.parametrize("noise", NOISE)
def test_the_run_is_that_of_a_weight_that_was_given(noise):
    ends = []
    for weight in (None, LinearWarmup(1 / 64, 0.5)):
        torch.manual_seed(0)
        module = Toy()
        callback = VariationalDropout(weight, noise=noise)
        trainer(callback).fit(module, data())
        ends.append((module.state_dict(), callback.schedule, callback.penalty))
    assert all(torch.equal(w, ends[1][0][name]) for name, w in ends[0][0].items())
    assert ends[0][1:] == ends[1][1:]


def test_each_fit_finds_its_own_and_the_setting_stays_none():
    callback = VariationalDropout()
    trainer(callback, epochs=1).fit(Toy(), data())
    assert callback.settings()["kl_weight"] is None
    assert callback.recipe()["init_args"]["kl_weight"] is None
    assert copy.deepcopy(callback).lam == callback.lam == 1 / 64
    trainer(callback, epochs=1).fit(Toy(), data(32))
    assert callback.lam == 1 / 32
    assert VariationalDropout(1e-3).settings()["kl_weight"] == Constant(1e-3)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_resumed_run_keeps_the_computed_kl_weight(tmp_path):
    ends = []
    for path in (None, tmp_path / "half.ckpt"):
        keeper = [] if path else [ModelCheckpoint(tmp_path, filename="half", save_top_k=-1, every_n_train_steps=4, save_last=False)]
        torch.manual_seed(1 if path else 0)
        module, callback = Toy(), VariationalDropout()
        run = trainer(callback, *keeper, epochs=2, enable_checkpointing=bool(keeper))
        run.fit(module, data(), ckpt_path=path)
        ends.append((module.state_dict(), callback.lam))
    states = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert [state["kl_weight"] for key, state in states.items() if key.startswith("VariationalDropout")] == [1 / 64]
    assert all(torch.equal(w, ends[1][0][name]) for name, w in ends[0][0].items())
    assert ends[0][1] == ends[1][1] == 1 / 64


def test_another_form_needs_it_first():
    callback = VariationalDropout()
    with pytest.raises(
        ValueError, match="VariationalDropout finds its kl_weight at the first training step, so that ReweightedPenalty has no"
    ):
        callback.to_penalty()
    assert callback.to_penalty(lam=1e-3).lam == 1e-3
    trainer(callback, epochs=1).fit(Toy(), data())
    assert callback.to_penalty().lam == 1 / 64
    assert callback.to_penalty().penalty == VariationalDropout(1 / 64).to_penalty().penalty


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            x = torch.randn(8, generator=generator)
            yield x, (x[0] > 0).long()


def test_a_stream_is_counted_by_the_length_of_the_run_or_asked_for():
    callback = VariationalDropout()
    trainer(callback, epochs=-1, max_steps=6).fit(Toy(), DataLoader(Stream(), 16))
    assert callback.lam == 1 / (6 * 16)
    with pytest.raises(ValueError, match="VariationalDropout needs kl_weight: the loader has no length and the run no end"):
        trainer(VariationalDropout(), epochs=-1).fit(Toy(), DataLoader(Stream(), 16))


class Bare(Toy):
    automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.optimizers().zero_grad()
        loss.backward()
        self.optimizers().step()


def test_after_a_bare_backward_the_samples_are_counted():
    callback = VariationalDropout()
    trainer(callback, epochs=1).fit(Bare(), data())
    assert callback.lam == 1 / 64


class BareTokens(Bare):
    def training_step(self, batch, index):
        functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        self.optimizers().step()


def test_an_uncertain_count_gives_a_warning():
    callback = VariationalDropout()
    with pytest.warns(
        UserWarning, match="VariationalDropout cannot read from the loss how many labels it averages over; it is taken for 16"
    ):
        trainer(callback, epochs=1).fit(BareTokens(), tokens())
    assert callback.lam == 1 / 48


def test_a_damaged_weight_is_refused():
    with pytest.raises(ValueError, match=r"'kl_weight' must be a finite number > 0, got -1\.0"):
        VariationalDropout().check_state({"step": 0, "offset": 0, "frozen": False, "taken": {}, "kl_weight": -1.0})


def test_gates_have_no_such_default():
    with pytest.raises(TypeError, match="HardConcrete needs lam"):
        HardConcrete()
