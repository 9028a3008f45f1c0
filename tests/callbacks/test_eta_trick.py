"""EtaTrick against a hand-written loop, and against a grid search of its objective."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toys import Repeated, Spy, Toy, data, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import EtaTrick

EPS = 2.0
LOG_SUM = penalties.LogSum(eps=EPS)
LAM, KEEP = 0.3, 0.6


def log_sum_dual(eta, eps=EPS):
    """The dual f of log(w + eps)."""
    s = (eps**2 + 4 * eta).sqrt()
    return 2 * ((s + eps) / 2).log() - (s - eps) ** 2 / (4 * eta)


def reference(module, batches, lr, learned_lr, lam=LAM):
    """Run SGD on L + lam/2 sum(w^2 / eta + f(eta)) in the weights and log eta, by autograd."""
    parameters = dict(module.named_parameters())
    start = math.log(lam * KEEP / (1 - KEEP))
    logs = {n: torch.full_like(p, start, requires_grad=True) for n, p in parameters.items() if p.dim() == 2}
    for x, y in batches:
        price = sum((parameters[n] ** 2 / a.exp() + log_sum_dual(a.exp())).sum() for n, a in logs.items())
        loss = module.loss(module(x), y) + lam / 2 * price
        grads = torch.autograd.grad(loss, [*parameters.values(), *logs.values()])
        with torch.no_grad():
            for p, g in zip(parameters.values(), grads, strict=False):
                p -= lr * g
            for a, g in zip(logs.values(), grads[len(parameters) :], strict=True):
                a -= learned_lr * g
    return logs


def doubled(seed=0):
    return Toy(optimizer=lambda p: torch.optim.SGD(p, 0.1), seed=seed).double()


class Double:
    """Make three batches in float64."""

    def __len__(self):
        return 3

    def __iter__(self):
        return ((x.double(), y) for x, y in data(samples=48))


@pytest.mark.parametrize("learned_lr", [None, 0.7])
def test_three_steps_are_those_of_a_loop_written_from_the_formulas(learned_lr):
    module, expected, after = doubled(), doubled(), []
    callback = EtaTrick(LOG_SUM, LAM, learned_lr=learned_lr, keep_start=KEEP)
    look = lambda moment, module: after.append((weights(module), {n: p.detach().clone() for n, p in callback.learned.items()}))  # noqa: E731
    trainer(callback, Spy(look), epochs=1, precision=64).fit(module, Double())
    logs = reference(expected, Double(), 0.1, 0.1 if learned_lr is None else learned_lr)
    live, learned = after[-1]
    assert len(after) == 3 * 5
    for name, w in expected.named_parameters():
        torch.testing.assert_close(live[name], w.detach(), rtol=1e-6, atol=1e-6)
    for name, log_eta in logs.items():
        torch.testing.assert_close(learned[name], log_eta.detach(), rtol=1e-6, atol=1e-6)
        assert (log_eta - log_eta.mean()).abs().max() > 1e-3


A = torch.tensor([[0.05, -0.3, 0.8, -1.4, 3.0]], dtype=torch.float64)


def descended(tmp_path, seed):
    """Return live weights and file after joint descent on 1/2 (w - a)^2 + lam Omega."""
    network = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    torch.manual_seed(seed)
    network.weight.data = torch.randn(1, 5, dtype=torch.float64)
    bowl = lambda prediction, a: ((prediction - a) ** 2).sum() / 2  # noqa: E731
    module, live = Toy(network, lambda p: torch.optim.Adam(p, 0.02), bowl, decay=True), []
    look = lambda moment, module: live.append(weights(module)["network.weight"]) if moment == "batch end" else None  # noqa: E731
    run = trainer(EtaTrick(penalties.LogSum(0.5), 0.4, learned_lr=0.1), Spy(look), epochs=1, precision=64)
    run.fit(module, Repeated((torch.eye(5, dtype=torch.float64), A.T), 1500))
    run.save_checkpoint(tmp_path / "a.ckpt")
    return live[-1], torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["network.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_joint_descent_ends_at_the_minimum_of_a_grid_search_with_zeros_in_the_file(tmp_path, seed):
    """With lam 0.4 and eps 0.5 the objective has one minimum for each a, at zero for |a| < 0.8."""
    live, saved = descended(tmp_path, seed)
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)[:, None]
    best = grid[((grid - A) ** 2 / 2 + 0.4 * torch.log1p(grid.abs() / 0.5)).argmin(0)].T.round(decimals=6)
    torch.testing.assert_close(live, best, rtol=2e-2, atol=2e-2)
    assert torch.equal(saved == 0, best == 0)
    assert 2 <= int((best == 0).sum()) <= 3


@pytest.mark.parametrize(
    ("penalty", "why"),
    [(penalties.Ridge(2.0), "is infinite from eta = "), (penalties.HardThreshold(0.5), "is flat")],
)
def test_penalties_without_a_dual_to_descend_on_are_refused(penalty, why):
    with pytest.raises(ValueError, match=f"EtaTrick learns eta by descent on the dual f, but f of .* {why}"):
        EtaTrick(penalty, 0.1)


def test_a_weight_is_zero_where_the_learned_eta_says_so():
    callback = EtaTrick(LOG_SUM, LAM, tol=0.05)
    w = torch.tensor([0.5, 0.5, 0.0])
    edge = LAM * 0.05 / 0.95  # alpha = 1 / (1 + lam / eta) is tol there
    callback.learned["w"] = nn.Parameter(torch.tensor([edge * 0.99, edge * 1.01, 1.0]).log())
    assert callback.zeros("w", w).tolist() == [True, False, True]
    torch.testing.assert_close(callback.keep_probability("w", w)[:2], torch.tensor([0.0495, 0.0505]), rtol=2e-3, atol=0)


def test_every_weight_starts_at_the_keep_probability_that_is_asked_for():
    callback, w = EtaTrick(LOG_SUM, LAM, keep_start=0.25), torch.randn(3, 4)
    torch.testing.assert_close(callback.keep_probability("w", w), torch.full((3, 4), 0.25))


@pytest.mark.parametrize(("name", "value"), [("learned_lr", 0.0), ("learned_lr", -1.0), ("keep_start", 0.0), ("keep_start", 1.0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        EtaTrick(LOG_SUM, LAM, **{name: value})
