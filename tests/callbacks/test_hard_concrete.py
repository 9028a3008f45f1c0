"""HardConcrete: gradients against finite differences with the same draw, and gates that close as they should."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from toys import Repeated, Spy, Toy, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import HardConcrete

LAM = 0.4


def stretched(u, log_alpha, beta=2 / 3, gamma=-0.1, zeta=1.1):
    """Compute s as in the paper."""
    soft = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / beta)
    return (soft * (zeta - gamma) + gamma).clamp(0, 1)


def mean_gate(log_alpha):
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    return stretched(even, log_alpha[..., None]).mean(-1)


class Drawing(HardConcrete):
    """Record the uniform draws of each batch's gates."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.method.draw = partial(self.note, self.method.draw)

    def note(self, draw, name, attachment, generator):
        state = generator.get_state()
        at = self.learned[name]
        self.u = torch.rand(at.shape, dtype=at.dtype, generator=generator)
        generator.set_state(state)
        draw(name, attachment, generator)


def recorded(steps=3):
    """Return the last batch's live weights, log alpha, noisy weights, and gradients after backward and before the step."""
    generator, seen = torch.Generator().manual_seed(3), {}
    batch = tuple(torch.randn(6, n, dtype=torch.float64, generator=generator) for n in (4, 3))
    callback = Drawing(LAM, log_start=0.3)

    def look(moment, module):
        w, log_alpha = callback.parameters["network.weight"], callback.learned["network.weight"]
        if moment == "before backward":
            seen.update(log_alpha=log_alpha.detach().clone(), noisy=w.detach().clone(), u=callback.u)
        if moment == "after backward":
            seen["live"] = w.detach().clone()
        if moment in ("after backward", "before step"):
            seen[moment] = (w.grad.clone(), log_alpha.grad.clone())

    torch.manual_seed(1)
    module = Toy(nn.Linear(4, 3, bias=False).double(), lambda p: torch.optim.Adam(p, 0.1), nn.functional.mse_loss)
    trainer(callback, Spy(look), epochs=1, precision=64).fit(module, Repeated(batch, steps))
    return seen, batch


@pytest.mark.slow
def test_gradients_are_finite_differences_of_the_loss_under_the_same_draw():
    seen, (x, y) = recorded()
    w, log_alpha, u = seen["live"], seen["log_alpha"], seen["u"]

    def loss(w, log_alpha):
        return nn.functional.mse_loss(x @ (w * stretched(u, log_alpha) / mean_gate(log_alpha)).T, y)

    torch.testing.assert_close(seen["noisy"], w * stretched(u, log_alpha) / mean_gate(log_alpha), rtol=1e-4, atol=1e-5)
    in_w, in_log_alpha = seen["after backward"]
    for i in range(3):
        for j in range(4):
            step = torch.zeros_like(w)
            step[i, j] = 1e-4
            torch.testing.assert_close(in_w[i, j], (loss(w + step, log_alpha) - loss(w - step, log_alpha)) / 2e-4, rtol=1e-3, atol=1e-5)
            found = (loss(w, log_alpha + step) - loss(w, log_alpha - step)) / 2e-4
            torch.testing.assert_close(in_log_alpha[i, j], found, rtol=2e-3, atol=2e-5)
    assert in_log_alpha.abs().max() > 1e-2


def test_the_step_pays_half_of_lam_for_each_gate_that_may_be_open():
    seen, _ = recorded()
    log_alpha = seen["log_alpha"].requires_grad_()
    share = torch.sigmoid(log_alpha - 2 / 3 * torch.log(torch.tensor(0.1 / 1.1, dtype=torch.float64)))
    (wanted,) = torch.autograd.grad(LAM / 2 * share.sum(), log_alpha)
    (w_before, before), (w_after, after) = seen["after backward"], seen["before step"]
    torch.testing.assert_close(after - before, wanted)
    assert torch.equal(w_before, w_after)


@pytest.mark.slow
def test_a_toy_keeps_what_it_needs_and_zeroes_the_rest(tmp_path):
    """Minimise 1/2 (w - a)^2 for many a: gates of small a close and their weights are zero in the file; large a stay open."""
    a = torch.tensor([0.02, 0.1, 2.0, 3.0])
    network = nn.Linear(4, 50, bias=False)
    network.weight.data = a.expand(50, 4).clone()
    bowl = lambda prediction, y: ((prediction - y) ** 2).sum() / 2  # noqa: E731
    module = Toy(network, lambda p: torch.optim.Adam(p, 0.02), bowl, decay=True)
    run = trainer(HardConcrete(LAM, learned_lr=0.1), epochs=1)
    run.fit(module, Repeated((torch.eye(4), a[:, None].expand(4, 50)), 300))
    run.save_checkpoint(tmp_path / "a.ckpt")
    zeros = (torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["network.weight"] == 0).float().mean(0)
    assert zeros[:2].min() > 0.9
    assert zeros[2:].max() == 0
    torch.testing.assert_close(module.network.weight[:, 2:].mean(0), a[2:], rtol=0.1, atol=0)  # no shrinkage far out


def test_as_a_penalty_it_is_scaled_by_the_root_of_lam():
    for other in (HardConcrete(0.09).to_penalty(), HardConcrete(0.09).to_prox(), HardConcrete(0.09).to_mask()):
        assert (other.penalty, other.lam) == (penalties.Scaled(penalties.HardConcrete(), 0.3), 0.09)


def test_a_weight_is_zero_where_the_gates_keep_probability_is_below_tol():
    callback, w = HardConcrete(LAM), torch.tensor([0.5, 0.5, 0.0])
    callback.learned["w"] = nn.Parameter(torch.tensor([-3.8, -3.7, 3.0]))
    even = stretched((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000, torch.tensor([[-3.8], [-3.7]], dtype=torch.float64))
    alpha = even.mean(1) ** 2 / even.square().mean(1)
    assert (alpha < 0.05).tolist() == [True, False]
    torch.testing.assert_close(callback.keep_probability("w", w)[:2].double(), alpha, rtol=1e-3, atol=0)
    assert callback.zeros("w", w).tolist() == [True, False, True]
