"""Warnings of a resumed run about changed settings, and zeros at the start of a fit."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch.utils.data import DataLoader
from toys import Spy, Toy, data, trainer, weights

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, MagnitudePruning, ReweightedPenalty, Sparsify
from lightning_sparse.schedules import LinearWarmup

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": lambda **k: ReweightedPenalty(LOG_SUM, 0.3, **k),
    "prox": lambda **k: AdaptiveProx(LOG_SUM, 0.1, **k),
    "mask": lambda **k: AdaptiveMask(LOG_SUM, 0.3, **k),
    "Bernoulli": lambda **k: AdaptiveMask(LOG_SUM, 0.3, noise=noise.ScaledBernoulli(), **k),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def written(callback, path, epochs=2):
    run = trainer(callback, epochs=epochs)
    run.fit(Toy(), data())
    run.save_checkpoint(path)
    return path


def said(callback, path):
    """Return the warnings of the resumed run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, epochs=3).fit(Toy(seed=1), data(), ckpt_path=path)
    return [str(warning.message) for warning in caught if "other settings" in str(warning.message)]


class RandomState(Callback):
    def state_dict(self):
        return {"cpu": torch.get_rng_state()}

    def load_state_dict(self, state):
        torch.set_rng_state(state["cpu"])


def shuffled(*callbacks, seed, path=None):
    """Fit on a loader that shuffles, with a sanity check on a validation loader; return the weights and the first batch of each epoch."""
    torch.manual_seed(seed)
    first = []
    watch = LambdaCallback(on_train_batch_start=lambda *given: first.append(given[2][0].clone()) if given[3] == 0 else None)
    run = trainer(*callbacks, RandomState(), watch, epochs=3, num_sanity_val_steps=2, enable_checkpointing=path is None)
    module = Toy()
    run.fit(module, DataLoader(data().dataset, 8, shuffle=True), data(), ckpt_path=path)
    return weights(module), first


@every_form
def test_a_resumed_run_is_exact_with_a_sanity_check_and_a_loader_that_shuffles(form, tmp_path):
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, batches = shuffled(form(), keeper, seed=0)
    resumed, again = shuffled(form(), seed=1, path=tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(one, other) for one, other in zip(batches[1:], again, strict=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_sanity_check_leaves_the_batches_of_a_run_without_sparsity(tmp_path):
    _, batches = shuffled(FORMS["penalty"](), ModelCheckpoint(tmp_path / "sparse"), seed=0)
    _, dense = shuffled(ModelCheckpoint(tmp_path / "dense"), seed=0)
    assert all(torch.equal(one, other) for one, other in zip(batches, dense, strict=True))


def test_no_warning_for_the_same_settings(tmp_path):
    path = written(FORMS["mask"](), tmp_path / "a.ckpt")
    assert said(FORMS["mask"](), path) == []


def test_changed_settings_are_listed_in_a_warning(tmp_path):
    path = written(ReweightedPenalty(LOG_SUM, LinearWarmup(0.3, 0.2), tol=0.04), tmp_path / "a.ckpt")
    callback = ReweightedPenalty(penalties.LogSum(eps=1.0), LinearWarmup(0.5, 0.2), freeze=0.1, tol=0.04)
    (message,) = said(callback, path)
    assert message.startswith("resuming at step 8 of the checkpoint's ReweightedPenalty with other settings: ")
    for change in ("penalty.eps: 2.0 -> 1.0", "lam.lam: 0.3 -> 0.5", "freeze: 0.0 -> 0.1"):
        assert change in message
    assert "tol" not in message
    assert "share" not in message.split(". The new one applies from here on")[0]
    assert callback.schedule.lam == 0.5


def test_another_target_of_a_callback_that_names_it_otherwise_is_reported(tmp_path):
    path = written(Sparsify(target_sparsity=0.5), tmp_path / "a.ckpt")
    (message,) = said(MagnitudePruning(0.8), path)
    assert "form: Sparsify -> MagnitudePruning" in message
    assert message.count("target_sparsity: 0.5 -> 0.8") == 1


def test_a_changed_callback_or_penalty_is_reported(tmp_path):
    path = written(ReweightedPenalty(LOG_SUM, 0.3), tmp_path / "a.ckpt")
    (message,) = said(AdaptiveMask(penalties.MCP(1.0), 0.3), path)
    assert "form: ReweightedPenalty -> AdaptiveMask" in message
    assert "penalty: LogSum(eps=2.0) -> MCP(c=1.0)" in message
    assert "curvature" not in message


@pytest.mark.filterwarnings("ignore:.*continues for")
def test_a_frozen_support_stays_frozen_with_a_warning(tmp_path):
    path = written(ReweightedPenalty(LOG_SUM, 0.5, freeze=0.5), tmp_path / "a.ckpt")
    zeros = {name: w == 0 for name, w in torch.load(path, weights_only=True)["state_dict"].items() if w.dim() > 1}
    assert any(zero.any() for zero in zeros.values())
    module = Toy(seed=1)
    with pytest.warns(UserWarning, match=r"freeze: 0.5 -> 0.0\. Its support is frozen already, so the same weights stay zero"):
        trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=6).fit(module, data(), ckpt_path=path)
    assert all(torch.equal(module.get_parameter(name) == 0, zero) for name, zero in zeros.items())


@pytest.mark.parametrize(
    ("form", "what"),
    [(Sparsify, "those above it are trained again"), (partial(MagnitudePruning, every=1), "they stay zero")],
    ids=["Sparsify", "MagnitudePruning"],
)
def test_a_lower_target_says_what_happens_to_the_zeros_beyond_it(form, what, tmp_path):
    trainer(form(0.6), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), epochs=4, enable_checkpointing=True).fit(Toy(), data())
    path, after = tmp_path / "epoch=1.ckpt", form(0.3)
    before = zeros_in(torch.load(path, weights_only=True)["state_dict"])
    assert before > 0.3
    module = Toy(seed=1)
    with pytest.warns(UserWarning, match="If more than 0.3 of the weights are zero already, " + what):
        trainer(after, epochs=4).fit(module, data(), ckpt_path=path)
    assert (zeros_in(module.state_dict()) >= before) == (form is not Sparsify)
    if form is not Sparsify:
        assert after.lam == pytest.approx(before, abs=0.01)  # what is logged as the target


def zeros_in(state):
    matrices = [w for w in state.values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


def test_an_argument_that_the_file_lacks_is_named(tmp_path):
    path = written(ReweightedPenalty(LOG_SUM, 0.5), tmp_path / "a.ckpt")
    file = torch.load(path, weights_only=True)
    (state,) = file["callbacks"].values()
    del state["recipe"]["init_args"]["finish"]
    torch.save(file, path)
    (message,) = said(ReweightedPenalty(LOG_SUM, 0.5), path)
    assert "with other settings: finish: nothing -> keep. The new one" in message


def sparse_start():
    module = Toy(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3))
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data[parameter.abs() < 0.1] = 0.0
    return module


@every_form
@pytest.mark.parametrize("freeze", [0.0, 0.5])
def test_a_fit_keeps_the_zeros_that_it_starts_with(form, freeze):
    seen, module = [], sparse_start()
    before = {name: w == 0 for name, w in weights(module).items() if w.dim() > 1}
    assert all(zero.any() for zero in before.values())
    look = lambda moment, module: seen.append(weights(module)) if moment == "batch end" else None  # noqa: E731
    trainer(form(keep_zeros=True, freeze=freeze), Spy(look), epochs=3).fit(module, data())
    assert all(not w[name][zero].any() for w in [*seen, weights(module)] for name, zero in before.items())
    assert any((w[name][~zero] != 0).any() for w in seen for name, zero in before.items())


def test_without_the_option_they_may_grow_again():
    module, seen = sparse_start(), []
    before = module.network[0].weight.detach() == 0
    look = lambda moment, module: seen.append(weights(module)) if moment == "batch end" else None  # noqa: E731
    trainer(FORMS["penalty"](), Spy(look), epochs=1).fit(module, data())
    assert any(w["network.0.weight"][before].any() for w in seen)


@pytest.mark.slow
@every_form
def test_a_resumed_run_keeps_the_zeros_of_the_first_start_and_no_others(form, tmp_path):
    straight, keeper = sparse_start(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(form(keep_zeros=True), keeper, epochs=4, enable_checkpointing=True).fit(straight, data())
    resumed = Toy(seed=1, optimizer=straight.make)
    trainer(form(keep_zeros=True), epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(straight).items())


def test_keep_zeros_must_be_a_truth_value():
    with pytest.raises(TypeError, match="keep_zeros must be True or False, got 1 of type int"):
        ReweightedPenalty(LOG_SUM, 0.1, keep_zeros=1)
    assert AdaptiveProx(LOG_SUM, 0.1, keep_zeros=True).to_mask().keep_zeros is True
