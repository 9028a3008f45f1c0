"""Noise on a layer's output: its values and gradients beside those of the formula as torch's own operations differentiate it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import noise

LAYERS = {"linear": (lambda: nn.Linear(5, 4), (6, 5)), "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 4))}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def by_the_formula(layer: nn.Module, x: Tensor, variances: Tensor) -> Tensor:
    """draw * sqrt(V x^2), V the variances of the weights."""
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


def test_what_is_no_number_is_seen() -> None:
    got = noise.additive_output_noise(nn.Linear(2, 1), torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2), seeded())
    assert got.isnan().all()
