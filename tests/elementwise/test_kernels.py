"""A compiled kernel equals its function for tensors of any size and any scalars; errors say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sparse.elementwise import Engine, kernels
from lightning_sparse.elementwise.kernels import Kernel
from lightning_sparse.noise import Gaussian, ScaledBernoulli
from lightning_sparse.penalties import MCP, HardConcrete, LogSum


def scaling(power: int) -> Callable[..., None]:
    def scale(target: Tensor, source: Tensor, factor: Tensor) -> None:
        target.add_(source**power * factor)

    return scale


def weights(count: int = 3000) -> Tensor:
    """Draw weights of all sizes, some of them zero."""
    w = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return torch.cat([w.masked_fill(torch.arange(count) % 50 == 0, 0.0), w * 1e-3, w * 1e3])


@pytest.mark.slow
def test_one_compilation_serves_every_size_and_scalar() -> None:
    made, compile_ = [], kernels._compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_compile", lambda *given: made.append(1) or compile_(*given))  # type: ignore[func-returns-value]
        kernel = Kernel(scaling(2), "a square")
        for count, factor in ((2, 0.5), (300_001, -2.0), (7, 3.0)):
            target, source = torch.ones(count), torch.randn(count)
            kernel((target, source), (factor,))
            torch.testing.assert_close(target, 1 + source**2 * factor)
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [LogSum(2.0), MCP(1.0), HardConcrete()], ids=repr)
def test_a_kernel_of_a_penalty_does_what_the_calls_do(penalty: Any) -> None:
    compiled, plain, w = Engine(), Engine(), weights()
    compiled.compile_add_(penalty.gradient, [w], repr(penalty))
    grads = torch.ones_like(w), torch.ones_like(w)
    for engine, grad in zip((compiled, plain), grads, strict=True):
        engine.add_([grad], [w], penalty.gradient, 0.1)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [Gaussian(), ScaledBernoulli()], ids=["Gaussian", "Bernoulli"])
def test_compiled_masks_are_those_of_the_function(noise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def alpha(w: Tensor, h: Tensor, scale: Any) -> Tensor:
        return (w.abs() * h * scale).clamp(0.2, 0.9)

    rows = [(torch.randn(shape), torch.rand(shape)) for shape in ((300, 70), (5,), (2, 3, 3, 3))]
    found = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(kernels, "_compile", lambda function, *_: lambda given: function(*given))
        engine = Engine()
        engine.compile_draw(alpha, noise, [rows[0][0]], (0.5, 0.5), (0.5,), "masks")
        masks = [mask.flatten() for _, mask, _ in engine.draw(rows, alpha, noise, torch.Generator().manual_seed(3), (1.0,))]
        found.append(torch.cat(masks))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_half_precision_and_double_tensors_have_kernels_of_their_own() -> None:
    for dtype, close in ((torch.bfloat16, 0.02), (torch.float64, 1e-12)):
        engine, w = Engine(), weights(300).to(dtype)
        grad, penalty = torch.ones_like(w), LogSum(2.0)
        engine.compile_add_(penalty.gradient, [w], repr(penalty))
        engine.add_([grad], [w], penalty.gradient, 0.1)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, 1 + (0.1 * penalty.gradient(w.double())).to(dtype), rtol=close, atol=close)


def test_other_layouts_and_single_numbers_run_without_a_kernel(traced: list[int]) -> None:
    kernel = Kernel(scaling(3), "a cube")
    for source in (torch.randn(3, 4).t(), torch.randn(4, 6)[:, ::2], torch.randn(1)):
        target = torch.zeros(source.shape)
        kernel((target, source), (2.0,))
        torch.testing.assert_close(target, 2 * source**3)
    assert traced == []
    kernel((torch.zeros(3, 4).t(), torch.zeros(3, 4).t()), (2.0,))
    assert traced == [12]


def test_kernels_of_equal_keys_are_compiled_once_and_types_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(kernels, "_COMPILED", {})
    monkeypatch.setattr(kernels, "_compile", lambda function, *_: made.append(1) or (lambda given: function(*given)))
    for _ in range(2):  # equal penalties, each with its own engine
        engine = Engine()
        engine.compile_add_(LogSum(2.0).gradient, [torch.ones(3)], "LogSum")
    assert len(made) == 1
    engine.compile_add_(LogSum(2.0).gradient, [torch.ones(3, dtype=torch.float64)], "LogSum")
    Engine().compile_add_(LogSum(3.0).gradient, [torch.ones(3)], "LogSum")
    assert len(made) == 3
    for _ in range(2):  # compiled each time, because a closure is no cache key
        Engine().compile_update_(scaling(1), [torch.ones(3)], (0.5, 0.5), (0.5,), "a closure")
    assert len(made) == 5


def test_whole_number_scalars_and_floats_have_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(kernels, "_compile", lambda function, *_: made.append(1) or (lambda given: function(*given)))
    kernel = Kernel(scaling(2), "a square")
    for factor in (2, 2.0):
        target = torch.zeros(3)
        kernel((target, torch.ones(3)), (factor,))
        assert torch.equal(target, torch.full((3,), 2.0))
    assert len(made) == 2


def test_a_missing_compiler_raises_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, told in ((OSError("no compiler found\nat all"), "no compiler found"), (AssertionError(), "AssertionError")):

        def broken(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(kernels, "_compile", broken)
        with pytest.raises(RuntimeError, match=rf"could not compile LogSum\(eps=2.0\): {told}\. It needs.*a C\+\+ one"):
            Kernel(scaling(1), "LogSum(eps=2.0)")((torch.ones(2), torch.ones(2)), (0.1,))
