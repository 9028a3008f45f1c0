"""With custom loops, skipped batches, layers added late, metrics, other callbacks and YAML."""

from __future__ import annotations

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional
from torchmetrics import MeanMetric
from toys import Toy, data, trainer, weights

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, Sparsifier
from lightning_sparse.cli.check import CheckCLI
from lightning_sparse.cli.training import launch
from lightning_sparse.curvature import EmpiricalFisher, SampledFisher

LOG_SUM = penalties.LogSum(eps=2.0)
NOISY = {"noise": noise.ScaledBernoulli(), "curvature": None}


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr)


def kept_equal(module, expected):
    """Check that selected weights are as expected, or were set to zero at the end of fit."""
    return all(torch.equal(w[w != 0], expected[name][w != 0]) for name, w in weights(module).items())


class Watched(nn.Linear):
    """A layer that records the share of zeros among its weights in each training forward."""

    def forward(self, x):
        if self.training:
            self.__dict__.setdefault("shares", []).append(float((self.weight == 0).float().mean()))
        return super().forward(x)


class TwoOptimisers(Toy):
    """Manual optimisation with one optimiser per layer: two forwards, backwards and steps per batch."""

    def __init__(self, lr, bare):
        super().__init__(nn.Sequential(Watched(8, 16), nn.ReLU(), Watched(16, 3)))
        self.lr, self.bare, self.automatic_optimization = lr, bare, False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.network[i].parameters(), self.lr) for i in (0, 2)]

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            loss = super().training_step(batch, index)
            optimizer.zero_grad()
            loss.backward() if self.bare else self.manual_backward(loss)
            optimizer.step()


@pytest.mark.parametrize("bare", [False, True], ids=["manual_backward", "loss.backward"])
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_every_forward_of_a_manual_loop_is_masked_and_every_step_moves_the_live_weights(lr, bare):
    module = TwoOptimisers(lr, bare)
    before = weights(module)
    trainer(AdaptiveMask(LOG_SUM, 0.3, **NOISY)).fit(module, data())
    for layer in (module.network[0], module.network[2]):
        assert len(layer.shares) == 16  # 2 epochs of 4 batches with 2 forwards
        assert all(0.1 < share < 0.9 for share in layer.shares)
    assert kept_equal(module, before) == (lr == 0)
    for name, w in weights(module).items():
        assert (w != before[name]).float().mean() > (0.9 if lr else -1)
        assert ((w - before[name])[w != 0].abs() < 1).all()


def test_a_skipped_batch_leaves_no_noise_behind():
    seen = []

    class Skipping(Toy):
        def on_train_batch_start(self, batch, index):
            return -1 if index == 2 else None

        def on_train_epoch_end(self):
            seen.append(weights(self))

    module = Skipping(optimizer=sgd(0.0))
    before = weights(module)
    trainer(AdaptiveMask(LOG_SUM, 0.3, **NOISY)).fit(module, data())
    assert len(seen) == 2
    assert all(torch.equal(w, before[name]) for after in seen for name, w in after.items())
    assert kept_equal(module, before)
    assert any(w.count_nonzero() for w in weights(module).values())


class Bypassed(nn.Module):
    """A network that uses the first layer's weight without its forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.seen = nn.Linear(8, 16), nn.Linear(16, 3), []

    def forward(self, x):
        self.seen.append(self.fc.weight.detach().clone())
        return self.head(functional.relu(functional.linear(x, self.fc.weight, self.fc.bias)))


def test_a_layer_whose_forward_is_bypassed_gets_its_noise():
    module = Toy(Bypassed(), sgd(0.0))
    w = module.network.fc.weight.detach().clone()
    trainer(AdaptiveMask(LOG_SUM, 0.3, alpha_min=1e-3, ceiling=10)).fit(module, data())
    later = module.network.seen[1:]
    assert len(later) == 7
    assert not any(torch.allclose(noisy, w, atol=1e-3) for noisy in later)


def test_the_total_of_two_callbacks_is_their_joint_count():
    totals = []

    class Looking(Toy):
        def on_train_epoch_start(self):
            totals.append(float(self.trainer.callback_metrics.get("sparsity/total", -1)))
            joint.append(sum(int(c.zeros(n).sum()) for c in callbacks for n in c.parameters) / 176)

    joint, callbacks = [], [ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"]), AdaptiveProx(LOG_SUM, 0.02, select=["network.2.*"])]
    module, run = Looking(), trainer(*callbacks, epochs=6)
    run.fit(module, data())
    assert totals[1:] == pytest.approx(joint[1:], abs=1e-6)
    zeros = [float((module.network[i].weight == 0).float().mean()) for i in (0, 2)]
    assert zeros[0] > zeros[1] + 0.1
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx((128 * zeros[0] + 48 * zeros[1]) / 176, abs=1e-6)


def test_measuring_the_gap_leaves_the_users_metrics_alone():
    values = []

    class Measuring(Toy):
        def __init__(self):
            super().__init__(optimizer=sgd(0.1))
            self.mean = MeanMetric()

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.mean.update(loss.detach())
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return loss

        def on_train_epoch_end(self):
            values.append((float(self.mean.compute()), self.mean._update_count))

    runs = [trainer(ReweightedPenalty(LOG_SUM, 0.1, gap_samples=samples)) for samples in (0, 5)]
    for run in runs:
        run.fit(Measuring(), data())
    assert values[:2] == values[2:]
    assert values[0][1] == 4
    assert runs[0].callback_metrics["mean"] == runs[1].callback_metrics["mean"]
    assert "sparsity/duality_gap" in runs[1].callback_metrics


def test_a_conversion_to_its_own_form_keeps_the_forms_own_arguments():
    own = {"noise": noise.Gaussian(), "ceiling": 3.0, "alpha_min": 0.02}
    mask = AdaptiveMask(LOG_SUM, 0.1, curvature=SampledFisher("gaussian", every=7), **own).to_mask()
    assert {name: getattr(mask, name) for name in own} == own
    assert mask.curvature.settings() == SampledFisher("gaussian", every=7).settings()
    assert (mask.to_mask(ceiling=5.0).ceiling, AdaptiveMask(LOG_SUM, 0.1, curvature=None).to_mask().curvature) == (5.0, None)
    prox = AdaptiveProx(LOG_SUM, 0.1, metric="plain", exact=True).to_prox()
    assert (prox.metric, prox.exact) == ("plain", True)


deprecations = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
YAML = "sparsify: {class_path: AdaptiveMask, init_args: {penalty: {class_path: LogSum, init_args: {eps: 2.0}}, lam: 0.1, %s}}"
WRITTEN = {
    "noise: {class_path: ScaledBernoulli}": (noise.ScaledBernoulli(), EmpiricalFisher),
    "noise: {class_path: Gaussian, init_args: {local: false}}, curvature: null": (noise.Gaussian(), type(None)),
    "curvature: {class_path: SampledFisher, init_args: {every: 3}}": (noise.Gaussian(local=True), SampledFisher),
}


@deprecations
@pytest.mark.parametrize("text", WRITTEN)
def test_noise_and_curvature_are_read_from_yaml_and_written_back(text):
    kind, curvature = WRITTEN[text]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Sparsifier, "sparsify")
    first = parser.parse_string(YAML % text)
    for config in (first, parser.parse_string(parser.dump(first, skip_none=False))):
        callback = parser.instantiate_classes(config)["sparsify"]
        assert (type(callback), callback.noise) == (AdaptiveMask, kind)
        assert isinstance(callback.curvature, curvature)


@pytest.mark.slow
@deprecations
def test_a_written_recipe_remembers_that_there_is_no_curvature(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = launch(CheckCLI, ["fit", "--config", "digits", "--sparsify", "AdaptiveMask", "--sparsify.curvature", "null"])
    assert cli.settings["sparsify"].curvature is None
    assert yaml.safe_load(cli.recipe())["sparsify"]["init_args"].get("curvature", "absent") is None


class Scheduled(Callback):
    """A user's callback with an attribute ``schedule``."""

    schedule = "every Monday"


@pytest.mark.parametrize("first", [True, False])
def test_a_users_callback_with_an_attribute_schedule_is_ignored(first):
    own = ReweightedPenalty(LOG_SUM, 0.5)
    run = trainer(*([Scheduled(), own] if first else [own, Scheduled()]), epochs=2)
    run.fit(Toy(), data())
    assert 0 < float(run.callback_metrics["sparsity/total"]) <= 1
