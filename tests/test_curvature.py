"""Curvature estimates against per-sample autograd, exact Gauss-Newton diagonals and each other."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from toys import Repeated, Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.curvature import EmpiricalFisher, InputMoment, SampledFisher
from lightning_sparse.layers import layers
from lightning_sparse.weights import Attachment

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (6, 5)),
    "linear over positions": (lambda: nn.Linear(5, 3), (6, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (6, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding="same"), (6, 4, 7, 7)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (6, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (6, 1, 3, 3, 3)),
}


def per_sample_squares(layer, x, loss):
    """Compute the mean of squared per-sample gradients by autograd, one sample at a time."""
    total = torch.zeros_like(layer.weight)
    for sample in x:
        total += torch.autograd.grad(loss(layer(sample[None])), layer.weight)[0] ** 2
    return total / len(x)


def record(curvature, module, x, loss, scale=1.0):
    """Update ``curvature`` from one backward of ``loss * scale``."""
    parameters = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    attachment = Attachment(module, parameters, lambda name: parameters[name])
    curvature.attach(module, attachment)
    curvature.begin(0, len(x), scale)
    value = loss(module(x)) * scale
    curvature.before_backward(scale)
    value.backward()
    curvature.end()
    attachment.detach()
    return curvature


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_is_the_mean_of_squared_sample_gradients(make, shape, reduction):
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    own = lambda y: (y**3).flatten(1).sum(1).sum()  # noqa: E731
    loss = (lambda y: own(y) / len(y)) if reduction == "mean" else own
    curvature = record(EmpiricalFisher(reduction=reduction), nn.Sequential(layer), x, loss, scale=0.25)
    expected = per_sample_squares(layer, x, own) * (1 if reduction == "mean" else len(x))
    torch.testing.assert_close(curvature.estimate("0.weight"), expected, rtol=1e-9, atol=1e-12)


def test_other_layers_fall_back_to_the_batch_gradient():
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose1d(2, 3, 3).double(), torch.randn(6, 2, 9, dtype=torch.float64)
    loss = lambda y: (y**2).sum() / len(y)  # noqa: E731
    curvature = record(EmpiricalFisher(), nn.Sequential(layer), x, loss)
    batch = torch.autograd.grad(loss(layer(x)), layer.weight)[0]
    torch.testing.assert_close(curvature.estimate("0.weight"), 6 * batch**2, rtol=1e-9, atol=0)


def squared_loss_curvature(module, x):
    """Compute the Gauss-Newton diagonal of nn.MSELoss: mean over samples of 2 / outputs * sum over outputs (dy/dw)^2."""
    parameters = [p for p in module.parameters() if p.dim() > 1]
    totals = [torch.zeros_like(p) for p in parameters]
    for sample in x:
        y = module(sample[None])[0]
        for output in y:
            for total, slope in zip(totals, torch.autograd.grad(output, parameters, retain_graph=True), strict=True):
                total += slope**2 * 2 / len(y) / len(x)
    return totals


@pytest.mark.slow
def test_sampled_fisher_is_right_for_a_squared_loss_where_the_empirical_one_vanishes():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(64, 3)
    target = module(x).detach() + 1e-3 * torch.randn(64, 2)
    loss = lambda y: nn.functional.mse_loss(y, target)  # noqa: E731
    sampled, empirical = SampledFisher("gaussian", decay=0.999), EmpiricalFisher()
    for _ in range(300):
        record(sampled, module, x, loss)
    record(empirical, module, x, loss)
    for name, expected in zip(("0.weight", "2.weight"), squared_loss_curvature(module, x), strict=True):
        torch.testing.assert_close(sampled.estimate(name), expected, rtol=0.2, atol=1e-3)
        assert (empirical.estimate(name) < 1e-3 * expected).all()


def test_sampled_fisher_is_right_for_cross_entropy():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(32, 3)
    chance = module(x).softmax(1).detach()
    expected = ((chance * (1 - chance)).t() @ x**2) / 32  # the Hessian's diagonal of a softmax layer
    sampled = SampledFisher("categorical", decay=0.999)
    for _ in range(400):
        record(sampled, module, x, lambda y: nn.functional.cross_entropy(y, torch.zeros(32, dtype=torch.long)))
    torch.testing.assert_close(sampled.estimate("0.weight"), expected, rtol=0.15, atol=1e-3)


def test_input_moment_is_exact_for_a_linear_model():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 1)).double(), torch.randn(40, 3, dtype=torch.float64)
    curvature = record(InputMoment(scale=2.0, decay=0.5), module, x, lambda y: (y**2).mean())
    hessian = torch.autograd.functional.hessian(lambda w: ((x @ w) ** 2).mean(), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(curvature.estimate("0.weight")[0], hessian.diagonal(), rtol=1e-12, atol=0)


def test_input_moment_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"knows Linear layers only, '0.weight' is none; use SampledFisher"):
        record(InputMoment(), nn.Sequential(nn.Conv1d(1, 1, 1)), torch.ones(1, 1, 1), torch.sum)


def test_the_mean_weighs_updates_by_their_age():
    curvature, module = EmpiricalFisher(decay=0.5, every=2), nn.Sequential(nn.Linear(1, 1, bias=False))
    for slope in (1.0, 2.0):
        record(curvature, module, torch.ones(1, 1), lambda y, slope=slope: slope * y.sum())
    assert curvature.estimate("0.weight").item() == pytest.approx((0.25 * 1 + 1 * 4) / 1.25)


def test_attention_and_shared_layers_are_not_read_from_one_layer():
    attention, shared = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)
    module = nn.ModuleDict({"attention": attention, "first": shared, "second": nn.Linear(4, 4)})
    module["second"].weight = shared.weight
    names = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    assert set(names) == {"attention.in_proj_weight", "attention.out_proj.weight", "first.weight"}
    assert layers(module, names) == {}


@pytest.mark.slow
def test_a_compiled_network_is_calibrated_and_masked_like_the_eager_one():
    network = torch.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), backend="eager")
    callback = AdaptiveMask(penalties.LogSum(2.0), lam=0.3)
    run = trainer(callback, epochs=1)
    run.fit(Toy(network), data())
    assert 0 < float(run.callback_metrics["sparsity/keep_probability"]) < 0.9


def test_calibrated_noise_realises_the_penalty_where_the_curvature_is_not_one():
    """With H far from 1 the mean loss under noise is L + lam/2 sum w^2 / eta_hat only if the noise is calibrated."""
    torch.manual_seed(0)
    x = torch.randn(16, 2, dtype=torch.float64).repeat(100, 1) @ torch.diag(torch.tensor([0.2, 5.0], dtype=torch.float64))
    penalty, lam = penalties.LogSum(2.0), 0.5
    found = {}
    for curvature in (InputMoment(), None):
        losses: list[float] = []

        class Listening(Toy):
            def training_step(self, batch, index):
                loss = ((self(batch[0]) - batch[1]) ** 2).mean() / 2
                losses.append(float(loss.detach()))  # noqa: B023
                return loss

        network = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[1.5, -0.5]]))
        y = network(x).detach() + 1
        callback = AdaptiveMask(penalty, lam, curvature=curvature, ceiling=1e6)
        trainer(callback, epochs=1).fit(Listening(network, lambda p: torch.optim.SGD(p, 0.0)), Repeated((x, y), 60))
        found[curvature] = sum(losses[1:]) / len(losses[1:])  # the first batch has no estimate yet
    w = torch.tensor([1.5, -0.5], dtype=torch.float64)
    expected = 0.5 + lam / 2 * float((w**2 / penalty.eta_hat(w)).sum())
    with_calibration, without = found.values()
    assert with_calibration == pytest.approx(expected, rel=0.02)
    assert abs(without - expected) > 5 * abs(with_calibration - expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmpiricalFisher(**arguments)


def test_sampled_fisher_names_the_closest_module():
    module = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'head' is no module of the model"):
        record(SampledFisher(output="head"), module, torch.ones(1, 1), torch.sum)
    with pytest.raises(ValueError, match="likelihood must be 'categorical' or 'gaussian', got 'poisson'"):
        SampledFisher("poisson")


def test_curvature_is_the_mean_over_the_ranks_that_saw_the_layer():
    meeting, shared, results = threading.Barrier(2), [None, None], [None, None]
    parameters = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    seen = [{"a": torch.tensor([1.0, 3.0])}, {"b": torch.ones(3), "a": torch.tensor([3.0, 5.0])}]

    def run(rank):
        def reduce(value):
            shared[rank] = value.clone()
            meeting.wait(10)
            mean = (shared[0] + shared[1]) / 2
            meeting.wait(10)
            return mean

        fisher = EmpiricalFisher(every=1)
        fisher.begin(0, 1)
        fisher._pending = dict(seen[rank])
        fisher.end(reduce, parameters)
        results[rank] = {name: fisher.estimate(name) for name in parameters}

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    for result in results:
        torch.testing.assert_close(result["a"], torch.tensor([2.0, 4.0]))
        torch.testing.assert_close(result["b"], torch.ones(3))
        assert result["c"] is None
