"""Sparsify: a share of zeros without a strength, with a penalty where the scale of the weights does not matter."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import Toy, data, trainer, weights

from lightning_sparse import penalties, scores
from lightning_sparse.callbacks import AdaptiveProx, ReweightedPenalty, Sparsify


class Lams(Callback):
    """Record lam, and the share of scale-free weights, after each batch until the support is frozen."""

    def __init__(self, form):
        self.form, self.seen, self.free = form, [], []

    def on_train_batch_end(self, *_):
        if not self.form.frozen:
            self.seen.append(self.form.lam)
            self.free.append(self.form.ascent.free)


def plain():
    torch.manual_seed(0)
    return Toy(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)))


def normed():
    return Toy(nn.Sequential(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)))


def fitted(module, callback, epochs=20):
    watch = Lams(callback)
    trainer(callback, watch, epochs=epochs).fit(module, data())
    return watch


@pytest.mark.parametrize("target", [0.5, 0.9, 0.98])
def test_the_target_is_met_to_the_weight_from_twenty_steps_on(target):
    for epochs in (5, 15):
        module = plain()
        fitted(module, Sparsify(target), epochs)
        assert sum(int((w == 0).sum()) for w in weights(module).values() if w.dim() > 1) == round(target * 704)


def test_the_penalty_is_for_weights_whose_scale_does_not_matter():
    with_norm, without = fitted(normed(), Sparsify(0.9)), fitted(plain(), Sparsify(0.9))
    assert with_norm.free[-1] == pytest.approx(512 / 704, abs=0.03)  # the last layer's scale matters
    assert without.free[-1] < 0.2
    assert max(with_norm.seen[10:]) > 3 * max(without.seen[10:])


def test_with_sgd_it_is_the_exact_prox_of_l1_to_a_target():
    one, other = (Toy(plain().network, lambda parameters: torch.optim.SGD(parameters, 0.1)) for _ in range(2))
    fitted(one, Sparsify(0.8))
    fitted(other, AdaptiveProx(penalties.L1(), exact=True, target_sparsity=0.8))
    assert all(torch.equal(w, weights(other)[name]) for name, w in weights(one).items())


def test_its_settings_are_those_that_it_takes():
    callback = Sparsify(0.9, score=scores.Magnitude(), least_kept=0.01)
    assert repr(callback) == "Sparsify(target_sparsity=0.9, score=Magnitude(), least_kept=0.01)"
    assert Sparsify(**callback.settings()).settings() == callback.settings()
    penalty = callback.to_penalty()
    assert isinstance(penalty, ReweightedPenalty)
    assert (penalty.penalty, penalty.target_sparsity, penalty.score) == (penalties.L1(), 0.9, scores.Magnitude())
    with pytest.raises(TypeError, match="Sparsify needs 'target_sparsity'"):
        Sparsify()
    with pytest.raises(ValueError, match=r"target_sparsity must lie in \(0, 1\), got 90"):
        Sparsify(90)
    with pytest.raises(TypeError, match="Sparsify takes no 'lam'; use ReweightedPenalty or AdaptiveProx for a strength"):
        Sparsify(0.9, lam=1e-3)
    with pytest.raises(TypeError, match="Sparsify takes no 'lam'; use ReweightedPenalty or AdaptiveProx for a strength"):
        Sparsify(lam=1e-3)  # without a target too
    with pytest.raises(TypeError, match=r"target_sparsity must be a number, got '80%' of type str; did you mean 0\.8"):
        Sparsify("80%")
