"""Exact zeros after fit, a plain module at every hook, exact resumes."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Repeated, Spy, Toy, data, hooks, trainer, weights

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.schedules import LinearWarmup

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": lambda **k: ReweightedPenalty(LOG_SUM, **k),
    "prox": lambda **k: AdaptiveProx(LOG_SUM, **k),
    "exact prox": lambda **k: AdaptiveProx(LOG_SUM, exact=True, **k),
    "mask": lambda **k: AdaptiveMask(LOG_SUM, **k),
    "mask, Bernoulli": lambda **k: AdaptiveMask(LOG_SUM, noise=noise.ScaledBernoulli(), **k),
    "mask, no curvature": lambda **k: AdaptiveMask(LOG_SUM, curvature=None, **k),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def share_of_zeros(module):
    matrices = [w for w in weights(module).values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*of the selected weights to zero in")  # few are enough here
@every_form
@pytest.mark.parametrize("decay", [True, False], ids=["decayed", "constant rate"])
def test_fit_ends_with_exact_zeros(form, decay):
    module = Toy(decay=decay)
    trainer(form(lam=0.05), epochs=30).fit(module, data())
    assert 0 < share_of_zeros(module) < 0.95


@pytest.mark.slow
@every_form
def test_the_module_is_its_own_again(form):
    module = Toy()
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    keys, count, kind = list(module.state_dict()), hooks(module), type(module)
    callback = form(lam=0.1)
    for _ in range(2):  # a second fit with the same callback
        trainer(callback).fit(module, data())
        assert {name: id(parameter) for name, parameter in module.named_parameters()} == before
        assert (list(module.state_dict()), hooks(module), type(module)) == (keys, count, kind)


@pytest.mark.slow
@every_form
def test_a_frozen_support_stays_through_momentum(form):
    seen = []

    def look(moment, module):
        if moment == "batch end" and callback.frozen:
            seen.append({name: w == 0 for name, w in weights(module).items() if w.dim() > 1})

    callback = form(lam=0.3, freeze=0.5)
    module = Toy(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3))
    trainer(callback, Spy(look), epochs=20).fit(module, data())
    assert len(seen) >= 39
    assert any(zeros.any() for zeros in seen[0].values())
    for later in seen[1:]:
        assert all(torch.equal(seen[0][name], later[name]) for name in later)


@pytest.mark.parametrize("kind", [noise.ScaledBernoulli(), noise.Gaussian()])
def test_noise_never_shows_outside_the_forward(kind):
    """Parameter data are noisy from batch start to backward; state_dict, files and the step use the live weights."""
    noisy, clean = [], []

    def look(moment, module):
        live = {name: callback.attachment.live(name) for name in callback.parameters}
        same = all(torch.equal(module.get_parameter(name), w) for name, w in live.items())
        (noisy if moment in ("batch start", "before backward") else clean).append(same)
        shown, expected = module.state_dict(), {name: callback.thresholded(name) for name in live}
        assert all(torch.equal(shown[name], w) for name, w in expected.items()), moment

    callback = AdaptiveMask(LOG_SUM, lam=0.3, noise=kind, curvature=None)
    trainer(callback, Spy(look), epochs=1).fit(Toy(), data())
    assert not any(noisy)
    assert all(clean)
    assert len(clean) == 12


def test_a_copy_in_training_carries_no_hook():
    copies = []
    callback = AdaptiveMask(LOG_SUM, lam=0.3, noise=noise.ScaledBernoulli())
    trainer(callback, Spy(lambda moment, module: copies.append(copy.deepcopy(module.network))), epochs=1).fit(Toy(), data())
    x = torch.randn(2, 8)
    assert all(torch.equal(c(x), torch.nn.functional.linear(c[1](c[0](x)), c[2].weight, c[2].bias)) for c in copies)
    assert all(torch.equal(c.state_dict()["0.weight"], c[0].weight) for c in copies)


@pytest.mark.slow
@every_form
def test_validation_sees_thresholded_weights_and_training_goes_on_with_its_own(form):
    seen = []

    class Looking(Toy):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            seen.append((weights(self), {name: callback.attachment.live(name).clone() for name in callback.parameters}))

        def on_train_epoch_start(self):
            if seen:
                assert all(torch.equal(self.get_parameter(name), w) for name, w in seen[-1][1].items())

    callback = form(lam=0.5)
    trainer(callback, epochs=4).fit(Looking(), data(), data())
    differs = False
    for shown, live in seen:
        for name, w in live.items():
            zero = shown[name] == 0
            assert torch.equal(shown[name][~zero], w[~zero])
            differs |= bool((w[zero] != 0).any())
    assert differs


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("freeze", [0.0, 0.6])
def test_resume_is_exact_and_the_file_holds_the_zeros(form, freeze, tmp_path):
    options = {"lam": LinearWarmup(0.5, 0.2), "freeze": freeze}
    straight, keeper = Toy(decay=True), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(form(**options), keeper, epochs=4, enable_checkpointing=True).fit(straight, data())
    resumed, path = Toy(decay=True, seed=1), tmp_path / "epoch=1.ckpt"
    callback = form(**options)
    saved = torch.load(path, weights_only=True)
    trainer(callback, epochs=4).fit(resumed, data(), ckpt_path=path)
    for name, w in weights(straight).items():
        assert torch.equal(weights(resumed)[name], w), name
    assert sum(int((w == 0).sum()) for name, w in saved["state_dict"].items() if name in callback.parameters) > 0


@pytest.mark.slow
@every_form
def test_weights_only_files_hold_the_zeros_and_load_into_the_plain_module(form, tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="plain", save_weights_only=True)
    callback = form(lam=0.5)
    seen = []

    class Looking(Toy):
        def on_train_epoch_end(self):
            seen.append({name: callback.thresholded(name) for name in callback.parameters})

    trainer(callback, keeper, epochs=2, enable_checkpointing=True).fit(Looking(), data())
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    plain = Toy()
    plain.load_state_dict(state, strict=True)
    assert all(torch.equal(plain.get_parameter(name), w) for name, w in seen[-1].items())


@every_form
@pytest.mark.parametrize("moment", ["training_step", "on_before_zero_grad", "on_after_backward"])
def test_an_exception_leaves_live_weights_and_no_hook(form, moment):
    module = Toy()
    before, count = weights(module), hooks(module)

    def fail(*args):
        raise RuntimeError("user code failed")

    setattr(module, moment, fail)
    with pytest.raises(RuntimeError, match="user code failed"):
        trainer(form(lam=0.3)).fit(module, data())
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())
    assert hooks(module) == count


class PowerCut(Toy):
    """Raise once, at a given optimiser step."""

    at = 6

    def training_step(self, batch, index):
        if self.trainer.global_step == self.at:
            raise RuntimeError("power cut")
        return super().training_step(batch, index)


@pytest.mark.parametrize("name", ["penalty", "mask"])
def test_a_checkpoint_written_on_exception_holds_zeros_and_resumes(name, tmp_path):
    callback, module = FORMS[name](lam=0.5), PowerCut()
    run = trainer(callback, epochs=4)
    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(module, data())
    live = weights(module)
    run.save_checkpoint(tmp_path / "cut.ckpt")
    saved, again = torch.load(tmp_path / "cut.ckpt", weights_only=True)["state_dict"], FORMS[name](lam=0.5)
    assert any((saved[key] == 0).any() for key in callback.parameters)

    class Looking(Toy):
        def on_train_start(self):
            assert all(torch.equal(self.get_parameter(key), w) for key, w in live.items())
            assert again.step == 6

    trainer(again, epochs=4).fit(Looking(), data(), ckpt_path=tmp_path / "cut.ckpt")


def test_logged_figures_equal_a_count_of_the_module(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    callback, module = ReweightedPenalty(LOG_SUM, lam=0.3), Toy(decay=True)
    logger = CSVLogger(tmp_path)
    run = trainer(callback, epochs=10, logger=logger)
    run.fit(module, data())
    figures = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("sparsity/")}
    assert figures["sparsity/total"] == pytest.approx(share_of_zeros(module), abs=1e-7)
    for name in callback.parameters:
        assert figures[f"sparsity/{name}"] == pytest.approx(float((module.get_parameter(name) == 0).float().mean()), abs=1e-7)
    assert figures["sparsity/lam"] == pytest.approx(0.3)
    assert 0 <= figures["sparsity/keep_probability"] <= 1
    expected = 0.3 * sum(float(torch.log((w.abs() + 2) / 2).sum()) for w in weights(module).values() if w.dim() > 1)
    assert figures["sparsity/penalty"] == pytest.approx(expected, rel=1e-4)
    assert "sparsity/total" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_the_duality_gap_vanishes_on_a_linear_model_with_unit_curvature():
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(32, 4))[0] * 32**0.5
    half_squares = lambda prediction, y: ((prediction - y) ** 2).mean() / 2  # noqa: E731
    logged = []

    class Looking(Toy):
        def on_train_end(self):
            logged.append(float(self.trainer.callback_metrics["sparsity/duality_gap"]))

    module = Looking(torch.nn.Linear(4, 1, bias=False), optimizer=lambda p: torch.optim.SGD(p, 0.0), loss=half_squares)
    callback = ReweightedPenalty(LOG_SUM, lam=0.1, gap_samples=1500)
    trainer(callback, epochs=1).fit(module, Repeated((x, torch.randn(32, 1))))
    w = module.network.weight.detach()
    scale = 0.05 * float((w**2 / LOG_SUM.eta_hat(w)).sum())
    assert abs(logged[0]) < 0.2 * scale
