"""H of squared and absolute losses, drawn from the loss's graph, against exact diagonals by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.weights import Attachment

DRAWS = 300


class Recurrent(nn.Module):
    """A GRU with a head: its weights are on the fall-back path, and its labels are the steps of a sequence."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


NETWORKS = {
    "samples": (lambda: nn.Sequential(nn.Linear(3, 1)), (12, 3)),
    "samples x outputs": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (8, 3)),
}
# the loss, and its curvature in each output for N of them and residuals r
LOSSES = {
    "mse": (functional.mse_loss, lambda r: torch.full_like(r, 2 / r.numel())),
    "mse, summed": (lambda out, y: functional.mse_loss(out, y, reduction="sum"), lambda r: torch.full_like(r, 2.0)),
    "written by hand": (lambda out, y: 0.5 * ((out - y) ** 2).sum(-1).mean(), lambda r: torch.full_like(r, r.shape[-1] / r.numel())),
    "root of the mean": (lambda out, y: functional.mse_loss(out, y).sqrt(), lambda r: (1 / r.norm() / r.numel() ** 0.5).expand_as(r)),
    "huber": (lambda out, y: functional.huber_loss(out, y, delta=0.01), lambda r: 0.01 / r.abs().clamp(min=0.01) / r.numel()),
    "huber, all within": (functional.huber_loss, lambda r: torch.full_like(r, 1 / r.numel())),
    "smooth l1": (lambda out, y: functional.smooth_l1_loss(out, y, beta=0.01), lambda r: 1 / r.abs().clamp(min=0.01) / r.numel()),
    "l1": (functional.l1_loss, lambda r: (1 / r.abs().mean() / r.numel()).expand_as(r)),
    "mse and bce": (
        lambda out, y: functional.mse_loss(out, y) + functional.binary_cross_entropy_with_logits(out, (y > 0).float()),
        None,
    ),
}


def mean_estimate(module, x, loss, scale=1.0, labels=None):
    """The mean of DRAWS updates, a parameter each."""
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    curvature, attachment = EmpiricalFisher(every=1, samples=64, labels=labels), Attachment(module, weights, lambda name: weights[name])
    curvature.attach(module, attachment)
    totals = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step in range(DRAWS):
        curvature.begin(step, len(x))
        curvature.observe_batch((x,))
        value = loss(module(x)) * scale
        curvature.observe_loss(value)
        curvature.before_backward(scale)
        value.backward()
        for name, one in curvature._settled().items():
            totals[name] += one / DRAWS
        curvature.end(None, weights)
    attachment.detach()
    return totals


def gauss_newton(module, x, curvature):
    """sum over outputs of curvature (d output / d w)^2."""
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    totals, out = {name: torch.zeros_like(p) for name, p in weights.items()}, module(x)
    for output, one in zip(out.flatten(), curvature.flatten(), strict=True):
        for name, slope in zip(weights, torch.autograd.grad(output, list(weights.values()), retain_graph=True), strict=True):
            totals[name] += one * slope**2
    return totals


@pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize(("loss", "exact"), LOSSES.values(), ids=LOSSES.keys())
def test_h_is_the_exact_diagonal_however_small_the_residuals_are(make, shape, loss, exact):
    torch.manual_seed(0)
    compare(make(), torch.randn(shape), loss, exact)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "exact"), LOSSES.values(), ids=LOSSES.keys())
def test_h_is_the_exact_diagonal_on_the_fall_back_path(loss, exact):
    torch.manual_seed(0)
    compare(Recurrent(), torch.randn(4, 3, 3), loss, exact)


def compare(module, x, loss, exact):
    """Estimates against the diagonal of the Gauss-Newton matrix, for residuals of 0.03."""
    out = module(x).detach()
    y = out + 0.03 * torch.randn_like(out)
    curvature = exact(out - y) if exact else (2 + out.sigmoid() * (1 - out.sigmoid())) / out.numel()
    expected, found = gauss_newton(module, x, curvature), mean_estimate(module, x, lambda z: loss(z, y), scale=4.0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].mean(), value.mean(), rtol=0.15, atol=0)
        assert (found[name] / value - 1).abs().median() < 0.15, name


def test_of_a_linear_model_it_is_the_hessian():
    torch.manual_seed(1)
    module, x = nn.Sequential(nn.Linear(3, 1, bias=False)), torch.randn(16, 3)
    y = module(x).detach()  # no residual at all
    hessian = torch.autograd.functional.hessian(lambda w: functional.mse_loss(x @ w[:, None], y), torch.zeros(3))
    found = mean_estimate(module, x, lambda out: functional.mse_loss(out, y))
    torch.testing.assert_close(found["0.weight"][0], hessian.diagonal(), rtol=0.15, atol=0)


def test_given_labels_do_not_override_a_count_from_the_graph():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(8, 3)
    y = torch.randn(8, 2)
    exact = gauss_newton(module, x, torch.full((8, 2), 2 / 16))
    found = mean_estimate(module, x, lambda out: functional.mse_loss(out, y), labels=7)
    torch.testing.assert_close(found["0.weight"].mean(), exact["0.weight"].mean(), rtol=0.15, atol=0)


def test_cross_entropy_takes_no_second_backward_pass(monkeypatch):
    module, passes = nn.Sequential(nn.Linear(3, 2)), []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **named: passes.append(args) or real(*args, **named))
    mean_estimate(module, torch.randn(4, 3), lambda out: functional.cross_entropy(out, torch.zeros(4, dtype=torch.long)))
    assert not passes


def test_a_network_that_allows_one_backward_gives_a_warning():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            if torch.is_grad_enabled() or not Once.allowed:
                raise RuntimeError("one backward only")
            return grad

    module, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    weights = dict(module.named_parameters())
    curvature, attachment = EmpiricalFisher(every=1), Attachment(module, {"0.weight": weights["0.weight"]}, lambda name: weights[name])
    curvature.attach(module, attachment)
    curvature.begin(0, 4)
    curvature.observe_batch((x,))
    loss = functional.mse_loss(Once.apply(module(x)), torch.zeros(4, 2))
    curvature.observe_loss(loss)
    Once.allowed = False
    curvature.before_backward(1.0)
    Once.allowed = True
    loss.backward()
    curvature.end(None, weights)
    attachment.detach()
    assert "RuntimeError: one backward only" in curvature.fault
    assert (curvature.estimate("0.weight") > 0).any()
