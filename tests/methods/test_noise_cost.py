"""The measured cost of noise: against the loss itself, against a wrong estimate of H, and through a file."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_bare_loop_noise import Loop
from torch import Tensor, nn
from toys import Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.curvature import EmpiricalFisher, InputMoment
from lightning_sparse.methods import Mask
from lightning_sparse.methods.noise_cost import FIRST, NoiseCost
from lightning_sparse.noise import Gaussian, ScaledBernoulli
from lightning_sparse.penalties import LogSum
from lightning_sparse.schedules import Constant

ONE = [(torch.ones(1), torch.ones(1), torch.ones(1))]  # w, H and Var s of which the cost is estimated at 1 / 2


def trained(scale: float, noise: Gaussian | ScaledBernoulli, steps: int) -> tuple[Mask, list[str]]:
    """Train a linear model, whose H is 2 E x^2, with an estimate that is wrong by ``scale``; return the method and what it said."""
    said: list[str] = []
    method = Mask(LogSum(0.5), noise, InputMoment(2.0 * scale, every=1), 10.0, 0.9)
    loop = Loop(method, Constant(0.3))
    loop.run.info = said.append
    loop.run.strength.total = 1000
    for _ in range(steps):
        loop.step()
    return method, said


@pytest.mark.parametrize("noise", [Gaussian(), ScaledBernoulli()], ids=repr)
def test_on_a_quadratic_loss_the_cost_is_the_estimate(noise):
    method, said = trained(1.0, noise, 180)
    ratio, error = method.cost.ratio()
    assert abs(ratio - 1) < 3 * error < 2
    assert said == []
    assert method.cost.factor == 1


@pytest.mark.parametrize("wrong", [20.0, 0.05])
def test_an_estimate_of_h_that_is_wrong_is_corrected(wrong):
    method, said = trained(wrong, Gaussian(), 180)
    assert 1 / 3 < method.cost.factor * wrong < 3
    assert len(said) >= 1
    assert "times what the curvature estimate says" in said[0]
    (w, curvature), right = method.terms("weight", method.run.weights.live("weight")), method.curvature.estimate("weight")
    torch.testing.assert_close(curvature, right)
    mean = method.curvature.mean["weight"] / method.curvature.weight["weight"]
    torch.testing.assert_close(curvature, mean * method.cost.factor)
    assert w.shape == curvature.shape


class Curved(nn.Module):
    """Two layers with tanh, whose loss in the noise of the first layer's outputs can be averaged directly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 20).double(), nn.Linear(20, 1).double()
        self.x = torch.randn(256, 6, dtype=torch.float64)
        self.y = torch.sin(self.x.sum(1, keepdim=True))

    def loss(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        noisy = self.first(self.x) + noise
        return nn.functional.mse_loss(self.second(torch.tanh(noisy)), self.y), noisy


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_noise_times_gradient_measures_twice_the_rise_of_the_loss(scale):
    """The loss's mean rise by sampling, without any gradient, against half the sum of noise times gradient."""
    net, cost, draws = Curved(), NoiseCost(), 500
    noises = [0.2 * torch.randn(256, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(draw)) for draw in range(draws)]
    with torch.no_grad():
        clean = net.loss(torch.zeros(256, 20, dtype=torch.float64))[0]
        rise = torch.stack([net.loss(noise)[0] - clean for noise in noises]).mean()
    assert rise > 0
    one = torch.ones_like(rise)
    for noise in noises:
        cost.begin([(one, one, 2 * rise)])
        value, noisy = net.loss(noise)
        cost.observe(noisy, noise)
        (value * scale).backward()
        assert cost.end(scale, None) == ""
    ratio, error = cost.ratio()
    assert error < 0.1
    assert ratio == pytest.approx(1, abs=0.25)


def test_a_batch_without_a_backward_is_left_out():
    cost = NoiseCost()
    cost.begin(ONE)
    cost.cancel()
    assert cost.end(1.0, None) == ""
    assert cost.state_dict() == {}


def test_the_mean_over_processes_decides():
    """A process whose own batches say nothing follows the mean of all."""
    cost = NoiseCost()
    for step in range(FIRST):
        cost.begin(ONE)
        cost.add(torch.ones(1), torch.ones(1), torch.zeros(1))
        found = cost.end(1.0, lambda batch, step=step: torch.tensor([10.0 + 0.1 * (step % 2), 1.0, 0.01]))
    assert "10 +- " in found
    assert cost.factor == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize(("measured", "factor"), [(-5.0, 0.01), (0.6, 1.0), (1.9, 1.0), (1e9, 100.0)])
def test_the_factor_is_bounded_and_small_errors_are_left_alone(measured, factor):
    cost = NoiseCost()
    for step in range(FIRST):
        cost.begin(ONE)
        cost.add(torch.full((1,), measured * (1 + 0.01 * (step % 2))), torch.ones(1), torch.zeros(1))
        found = cost.end(1.0, None)
    assert cost.factor == pytest.approx(factor)
    assert ("takes the noise's place" in found) == (measured < 0)


def wrong_labels(**more):
    """A mask form that is told that each sample of the toy has 1000 labels, of which it has one."""
    return AdaptiveMask(penalties.LogSum(2.0), 0.05, curvature=EmpiricalFisher(labels=1000, every=1), **more)


def fit(callback, *others, path=None):
    torch.manual_seed(0)
    module = Toy(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    trainer(callback, *others, epochs=20, enable_checkpointing=bool(others)).fit(module, data(), ckpt_path=path)
    return module


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_run_with_wrong_labels_says_so_and_resumes_with_what_was_measured(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level("INFO")
    whole, files = wrong_labels(), ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    module = fit(whole, files)
    assert whole.method.cost.factor < 0.2
    assert "the noise cost" in caplog.text
    for file in (tmp_path / "epoch=6.ckpt", tmp_path / "epoch=1.ckpt"):  # after and before the correction
        resumed = wrong_labels()
        again = fit(resumed, path=file)
        assert resumed.method.cost.factor == whole.method.cost.factor
        torch.testing.assert_close(again.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_a_damaged_state_is_refused():
    callback = wrong_labels()
    trainer(callback, epochs=2).fit(Toy(), data())
    state = callback.state_dict()
    for key, bad, words in (("noise_cost", torch.ones(3), "shape"), ("curvature_factor", -1.0, "finite number > 0")):
        with pytest.raises(ValueError, match=words):
            wrong_labels().check_state(state | {key: bad})
