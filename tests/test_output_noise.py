"""Noise on a layer's output: values and gradients against autograd of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import noise

LAYERS = {"linear": (lambda: nn.Linear(5, 4), (6, 5)), "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 4))}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def by_the_formula(layer: nn.Module, x: Tensor, variances: Tensor) -> Tensor:
    """Compute draw * sqrt(V x^2), with V the variances of the weights."""
    total = torch.func.functional_call(layer, {"weight": variances, "bias": torch.zeros_like(layer.bias)}, (x * x,))
    return noise.normal_like(total, seeded()) * total.sqrt()


def made(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double()
    return layer, torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.rand_like(layer.weight).requires_grad_()


@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_gradients_are_the_formulas(kind: str) -> None:
    layer, x, variances = made(kind)
    ours, theirs = noise.additive_output_noise(layer, x, variances, seeded()), by_the_formula(layer, x, variances)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    for got, wanted in zip(*(torch.autograd.grad((y * weights).sum(), (x, variances)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, wanted)
        assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradients_gradient_is_the_formulas(kind: str) -> None:
    layer, x, variances = made(kind)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.sin().sum(), (x, variances), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, variances))

    both = noise.additive_output_noise(layer, x, variances, seeded()), by_the_formula(layer, x, variances)
    for got, wanted in zip(*map(second, both), strict=True):
        torch.testing.assert_close(got, wanted)
        assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_output_without_variance_has_no_noise_and_finite_gradients(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2).to(dtype)
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]], dtype=dtype, requires_grad=True)
    variances = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=dtype, requires_grad=True)
    got = noise.additive_output_noise(layer, x, variances, seeded())
    assert got[0].tolist() == [0, 0]
    assert got[1, 0] != 0
    assert got[1, 1] == 0
    got.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[0].tolist() == [0, 0, 0]
    assert variances.grad[1].tolist() == [0, 0, 0]


def test_nan_is_detected() -> None:
    got = noise.additive_output_noise(nn.Linear(2, 1), torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2), seeded())
    assert got.isnan().all()


@pytest.mark.parametrize(
    ("count", "share"), [(7, 0.4), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((8, 0.25), (5, 0.2), (1, 0.25)))]
)
def test_noise_for_a_share_of_the_samples_has_the_moments_of_noise_for_all(count: int, share: float) -> None:
    layer, x, spread = nn.Linear(3, 2).double(), torch.randn(count, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    drawn = [noise.output_noise(layer, x, spread, torch.Generator().manual_seed(seed), share).detach() for seed in range(4000)]
    taken = max(1, round(share * count))
    assert all(int((draw != 0).all(1).sum()) == taken for draw in drawn)
    variance = (x * x) @ (layer.weight.detach() ** 2 * spread).T
    torch.testing.assert_close(torch.stack(drawn).var(0) / variance, torch.ones_like(variance), rtol=0, atol=0.3)
    assert (torch.stack(drawn).mean(0) / (variance / 4000).sqrt()).abs().max() < 5
    if taken < count:  # each sample equally often, in contiguous blocks with wrap-around
        often = torch.stack(drawn).ne(0).all(2).double().mean(0)
        torch.testing.assert_close(often, torch.full_like(often, taken / count), rtol=0, atol=0.04)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("seed", range(6))
def test_the_samples_of_a_share_get_the_noise_that_they_would_get_alone(kind: str, seed: int) -> None:
    layer, x, spread = made(kind)
    count = 2 * len(x)
    x = torch.cat([x, x + 1]).detach().requires_grad_()
    found = noise.output_noise(layer, x, spread.detach(), torch.Generator().manual_seed(seed), 0.5)
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(count, (), generator=generator))
    places = [(start + step) % count for step in range(count // 2)]
    alone = noise.output_noise(layer, x[places], spread.detach(), generator) * 2**0.5
    torch.testing.assert_close(found[places], alone)
    rest = [place for place in range(count) if place not in places]
    assert (found[rest] == 0).all()
    weights = torch.randn_like(found)
    sides = ((found * weights).sum(), (alone * weights[places]).sum())
    for got, wanted in zip(*(torch.autograd.grad(side, (x, layer.weight)) for side in sides), strict=True):
        torch.testing.assert_close(got, wanted)


def test_noise_for_a_share_moves_on_with_its_generator_and_keeps_the_order_in_memory() -> None:
    layer, generator = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last), seeded()
    x = torch.randn(6, 3, 5, 5).to(memory_format=torch.channels_last)
    drawn = [noise.output_noise(layer, x, torch.rand_like(layer.weight), generator, 0.5) for _ in range(20)]
    assert len({tuple(draw.flatten(1).ne(0).all(1).tolist()) for draw in drawn}) > 3
    assert all(draw.is_contiguous(memory_format=torch.channels_last) for draw in drawn)


def test_one_sample_without_a_batch_gets_its_noise_and_wrong_shares_are_refused() -> None:
    layer, x, spread = nn.Linear(3, 2), torch.randn(3), torch.rand(2, 3)
    assert torch.equal(noise.output_noise(layer, x, spread, seeded(), 0.25), noise.output_noise(layer, x, spread, seeded()))
    assert torch.equal(noise.output_noise(layer, x[None], spread, seeded(), 1.0), noise.output_noise(layer, x[None], spread, seeded()))
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        noise.Gaussian(local=True, share=0)
    with pytest.raises(ValueError, match="needs local=True"):
        noise.Gaussian(share=0.5)


@pytest.mark.slow
def test_a_squared_loss_with_noise_for_a_share_is_its_penalty_in_the_mean() -> None:
    torch.manual_seed(0)
    layer, x, y, spread = (
        nn.Linear(4, 1, bias=False).double(),
        torch.randn(12, 4).double(),
        torch.randn(12, 1).double(),
        torch.rand(1, 4).double(),
    )
    with torch.no_grad():
        plain, quadratic = (layer(x) - y).square().mean(), ((x * x).mean(0) * (layer.weight**2 * spread)[0]).sum()
        losses = [
            (layer(x) + noise.output_noise(layer, x, spread, torch.Generator().manual_seed(seed), 0.25) - y).square().mean()
            for seed in range(20_000)
        ]
    sampled = torch.stack(losses)
    assert abs(float(sampled.mean() - plain - quadratic)) < 5 * float(sampled.std()) / len(losses) ** 0.5
    assert float(quadratic) > 20 * float(sampled.std()) / len(losses) ** 0.5
