"""Noise for all uses of layers: by keyword, not in every batch, with empty inputs, in evaluation; and export of modules."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional
from toys import Moved, Repeated, Toy, data, several, trainer

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, HardConcrete, VariationalDropout
from lightning_sparse.curvature import EmpiricalFisher, SampledFisher

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "mask": lambda: AdaptiveMask(LOG_SUM, 1.0, curvature=EmpiricalFisher(every=1), alpha_min=1e-3, ceiling=10),
    "mask, sampled": lambda: AdaptiveMask(LOG_SUM, 1.0, curvature=SampledFisher(output="network", every=1)),
    "mask on the weights": lambda: AdaptiveMask(LOG_SUM, 1.0, noise=noise.ScaledBernoulli(), curvature=None),
    "dropout": lambda: VariationalDropout(1e-3, log_start=-1.0),
    "dropout on the weights": lambda: VariationalDropout(1e-3, noise="weight", log_start=-1.0),
    "gates": lambda: HardConcrete(1e-3, log_start=-1.0),
}
forms = pytest.mark.parametrize("make", several(FORMS, "mask", "gates"))


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


class ByKeyword(nn.Module):
    """Layers with keyword inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.conv, self.b = nn.Linear(8, 16), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(input=functional.relu(self.conv(input=self.a(input=x)[:, None])[:, 0]))


class ByPosition(ByKeyword):
    def forward(self, x):
        return self.b(functional.relu(self.conv(self.a(x)[:, None])[:, 0]))


@forms
def test_layers_called_by_keyword_train_as_those_called_by_position(make):
    ends = []
    for network in (ByKeyword, ByPosition):
        torch.manual_seed(0)
        module = Toy(network(), sgd)
        trainer(make()).fit(module, data())
        ends.append(module.state_dict())
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


class Experts(nn.Module):
    """Two experts; the second gets no samples in most batches."""

    def __init__(self, least):
        super().__init__()
        self.experts, self.out, self.least = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)]), nn.Linear(16, 3), least

    def forward(self, x):
        first = x[:, 0] > self.least
        return self.out(functional.relu(torch.cat([self.experts[0](x[first]), self.experts[1](x[~first])])))


@forms
def test_a_layer_with_empty_input_keeps_training(make):
    module, callback = Toy(Experts(-9.0), sgd), make()
    trainer(callback).fit(module, data())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert (module.network.experts[0].weight == 0).any() or callback.keep_probability("network.experts.0.weight").min() < 1


@pytest.mark.parametrize("curvature", [EmpiricalFisher, SampledFisher])
def test_an_empty_input_gives_no_estimate_and_changes_no_other(curvature):
    alone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    experts = Experts(-9.0)
    experts.experts[0].load_state_dict(alone[0].state_dict())
    experts.out.load_state_dict(alone[2].state_dict())
    found = []
    for network in (alone, experts):
        given = {"output": "network"} if curvature is SampledFisher else {}
        callback = AdaptiveMask(LOG_SUM, 1e-9, noise=noise.Gaussian(), curvature=curvature(every=1, **given))
        torch.manual_seed(0)
        trainer(callback, epochs=1).fit(Toy(network, lambda p: torch.optim.SGD(p, 0.0)), data())
        found.append(callback.curvature)
    assert found[1].estimate("network.experts.1.weight") is None
    torch.testing.assert_close(found[1].estimate("network.experts.0.weight"), found[0].estimate("network.0.weight"), rtol=1e-4, atol=1e-7)


def test_an_experts_estimate_counts_all_labels_of_the_batch():
    """An expert gets only some of the rows that the loss averages over; H is a mean over all rows."""
    experts = Experts(0.0)
    callback = AdaptiveMask(LOG_SUM, 1e-9, curvature=EmpiricalFisher(every=1))
    batch = next(iter(data(batch_size=64)))
    order = (batch[0][:, 0] <= 0).int().argsort(stable=True)
    batch = batch[0][order], batch[1][order]
    trainer(callback, epochs=1).fit(Toy(experts, lambda p: torch.optim.SGD(p, 0.0)), Repeated(batch))
    total = torch.zeros(16, 8)
    for x, y in zip(*batch, strict=True):
        loss = functional.cross_entropy(experts(x[None]), y[None])
        (grad,) = torch.autograd.grad(loss, experts.experts[0].weight, allow_unused=True)
        total += 0 if grad is None else grad**2 / len(batch[0])
    torch.testing.assert_close(callback.curvature.estimate("network.experts.0.weight"), total, rtol=1e-3, atol=1e-6)


class Heads(Toy):
    """Two heads for two tasks; each batch uses one of them."""

    def __init__(self):
        super().__init__(nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 3)]), sgd)

        self.noisy = []

    def training_step(self, batch, index):
        x, used = batch[0], (self.network[0], self.network[1 + index % 2])
        for layer in used:
            x, plain = layer(functional.relu(x)), functional.linear(functional.relu(x), layer.weight, layer.bias)
            self.noisy.append(not torch.allclose(x, plain))
        return functional.cross_entropy(x, batch[1])


@pytest.mark.parametrize("make", [FORMS["mask"], FORMS["dropout"]], ids=["mask", "dropout"])
def test_a_layer_that_a_batch_does_not_use_keeps_its_noise_on_the_outputs(make):
    module, moved = Heads(), Moved()
    trainer(make(), moved).fit(module, data())
    assert moved.seen == [set()] * 8
    assert all(module.noisy[4:])  # because earlier masks are not calibrated


@pytest.mark.parametrize("curvature", [EmpiricalFisher, SampledFisher])
def test_an_update_that_misses_a_layer_is_made_up_for(curvature):
    """Every second batch uses the second head, but never the batches of a scheduled update."""
    given = {"output": "network.0"} if curvature is SampledFisher else {}  # the loss does not use it
    callback, seen = AdaptiveMask(LOG_SUM, 1e-9, curvature=curvature(every=4, decay=0.5, **given), alpha_min=0.9), []  # which does not fade

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            seen.append({name.split(".")[1]: weight for name, weight in callback.curvature.weight.items()})

    module = Heads()
    trainer(callback, Look()).fit(module, data())
    one, two = 1 - 0.5**4, 1 - 0.5**8
    assert seen[0].keys() <= {"0", "1"}
    assert [set(weights.values()) for weights in seen] == [{one}] * 4 + [{one, two}] + [{two}] * 3
    assert all(weights.keys() == {"0", "1", "2"} for weights in seen[1:])
    state = callback.curvature.state_dict()
    assert "missed" not in state
    callback.curvature.check_state(state | {"missed": ["network.2.weight"]}, callback.parameters)
    with pytest.raises(ValueError, match="has a damaged 'missed', a list of names, got 3"):
        callback.curvature.check_state(state | {"missed": 3}, callback.parameters)


class Late(Toy):
    """A network that uses the first layer's weight without its forward from the third batch on."""

    def training_step(self, batch, index):
        first = self.network[0]
        x = first(batch[0]) if index < 2 else functional.linear(batch[0], first.weight, first.bias)
        return functional.cross_entropy(self.network[2](functional.relu(x)), batch[1])


@pytest.mark.parametrize("make", [FORMS["mask"], FORMS["dropout"]], ids=["mask", "dropout"])
def test_noise_moves_to_the_weights_once_a_forward_is_bypassed(make):
    moved = Moved()
    trainer(make(), moved, epochs=1).fit(Late(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), sgd), data())
    assert moved.seen == [set(), set(), set(), {"network.0.weight"}]


class Teacher(Toy):
    """A toy that runs a forward in evaluation mode without gradients before and after each training forward."""

    def __init__(self, mode=torch.no_grad, network=None):
        super().__init__(network or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), sgd)
        self.mode, self.seen, self.x = mode, [], torch.randn(5, 8)

    def look(self):
        self.eval()
        with self.mode():
            self.seen.append(self(self.x).clone())
        self.train()

    def training_step(self, batch, index):
        self.look()
        loss = super().training_step(batch, index)
        self.look()
        return loss


class Expect(Callback):
    """Record the network's outputs with its own weights before each batch."""

    def __init__(self):
        self.outputs = []

    def on_train_batch_end(self, trainer, module, *args):
        self.outputs.append(module(module.x).detach())


class Projected(nn.Module):
    """A layer whose weight is used without its forward, like the output projection of attention."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return functional.linear(functional.relu(self.first(x)), self.last.weight, self.last.bias)


@forms
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("network", [None, Projected], ids=["layers", "bypassed"])
def test_evaluation_without_gradients_has_no_noise_in_the_middle_of_a_step(make, mode, network):
    torch.manual_seed(0)
    module, expect = Teacher(mode, network() if network else None), Expect()
    trainer(make(), expect, epochs=1).fit(module, data())
    assert len(module.seen) == 8
    for i, expected in enumerate(expect.outputs[:3]):
        assert torch.equal(module.seen[2 * i + 2], expected)
        assert torch.equal(module.seen[2 * i + 3], expected)
    assert not torch.equal(expect.outputs[0], expect.outputs[1])


@pytest.mark.parametrize("make", [FORMS["mask on the weights"], FORMS["dropout on the weights"], FORMS["gates"]])
def test_the_step_around_such_an_evaluation_is_the_same(make):
    ends = []
    for look in (True, False):
        torch.manual_seed(0)
        module = Teacher()
        if not look:
            module.look = lambda: None
        torch.manual_seed(1)
        trainer(make()).fit(module, data())
        ends.append(module.state_dict())
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


class Export(Callback):
    """Script, trace and export the network during a run, and compare the outputs."""

    def __init__(self):
        self.count, self.x = 0, torch.randn(4, 8)

    def _export(self, module):
        was = module.training
        module.eval()
        expected = module(self.x).detach()
        made = [
            torch.jit.script(module.network),
            module.to_torchscript(method="trace", example_inputs=self.x),
            torch.export.export(module.network, (self.x,)).module(),
        ]
        module.train(was)
        for one in made:
            with torch.no_grad():
                torch.testing.assert_close(one(self.x), expected)
            self.count += 1

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 1:
            self._export(module)

    def on_validation_end(self, trainer, module):
        self._export(module)

    def on_train_epoch_end(self, trainer, module):
        self._export(module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@forms
def test_a_module_is_scripted_traced_and_exported_in_the_middle_of_a_run(make):
    export = Export()
    trainer(export, make(), epochs=1, num_sanity_val_steps=0).fit(Toy(), data(), data(seed=1))
    assert export.count == 9


@forms
def test_between_batches_no_forward_has_a_hook(make):
    class Count(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, module, *args):
            self.seen.append(sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()))

    count = Count()
    trainer(make(), count, epochs=1).fit(Toy(), data())
    assert count.seen == [0] * 4
