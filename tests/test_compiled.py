"""A compiled kernel does what its function does, on tensors of any size and with any numbers; a failure says what to do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sparse import _compiled, _fused, _joined, _masks, _memory, _rates, proximal
from lightning_sparse._compiled import Kernel
from lightning_sparse._curvature import noise_eta
from lightning_sparse.duality import Penalty, keep_probability
from lightning_sparse.noise import Gaussian, Noise, ScaledBernoulli
from lightning_sparse.penalties import MCP, HardConcrete, LogSquare, LogSum

LOG_SUM = LogSum(2.0)
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}


def scaling(power: int) -> Callable[..., None]:
    def scale(target: Tensor, source: Tensor, factor: Tensor) -> None:
        target.add_(source**power * factor)

    return scale


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No compiler: the function as it is, and the number of tensors of each kernel that was asked for."""
    made: list[int] = []

    def pretend(function: Callable[..., None], tensors: Any, scalars: Any) -> Callable[[list[Tensor]], None]:
        made.append(len(tensors))
        return lambda given: function(*given)

    monkeypatch.setattr(_compiled, "_compile", pretend)
    monkeypatch.setattr(_compiled, "_SHARED", {})
    return made


def weights(count: int = 3000) -> Tensor:
    """With zeros, and of all sizes."""
    w = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return torch.cat([w.masked_fill(torch.arange(count) % 50 == 0, 0.0), w * 1e-3, w * 1e3])


@pytest.mark.slow
def test_one_compilation_serves_every_size_and_number() -> None:
    made, compile_ = [], _compiled._compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compiled, "_SHARED", {})
        patch.setattr(_compiled, "_compile", lambda *given: made.append(1) or compile_(*given))  # type: ignore[func-returns-value]
        kernel = Kernel(scaling, 2)
        for count, factor in ((2, 0.5), (300_001, -2.0), (7, 3.0)):
            target, source = torch.ones(count), torch.randn(count)
            kernel((target, source), (factor,))
            torch.testing.assert_close(target, 1 + source**2 * factor)
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [LOG_SUM, MCP(1.0), HardConcrete()], ids=repr)
def test_a_kernel_does_what_the_calls_do(penalty: Penalty) -> None:
    w, state = weights(), {"exp_avg_sq": torch.rand(9000) + 0.1, "step": 3}
    grad, moved = torch.ones_like(w), w.clone()
    pull, shrink = _fused.Pull(penalty), _fused.Shrinkage(penalty, exact=False)
    pull(grad, w, 0.1)
    torch.testing.assert_close(grad, 1 + 0.1 * penalty.gradient(w), rtol=1e-5, atol=1e-6)
    shrink(moved, state, ADAM, "auto", 0.5)
    torch.testing.assert_close(moved, proximal.reweighted_step(penalty, w, proximal.rate(state, ADAM, "auto", 0.5)), rtol=1e-5, atol=1e-9)
    eta = lambda *terms: noise_eta(penalty, 0.1, 10.0, *terms)  # noqa: E731
    both = _masks.Fused(penalty, Gaussian(), 10.0, 1e-3), _masks.Called(eta, Gaussian(), 1e-3, separable=True)
    terms = w, torch.full_like(w, 0.3)
    torch.testing.assert_close(*(masked(one, [terms]) for one in both), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(one.spread(0.1, *terms) for one in both), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_exact_prox_has_the_same_zeros() -> None:
    w, rate = weights(), torch.rand(9000)
    moved = w.clone()
    _fused.Shrinkage(LOG_SUM, exact=True)(moved, {"exp_inf": 1 / rate}, ADAM, "auto", 1.0)
    step = proximal.rate({"exp_inf": 1 / rate}, ADAM, "auto", 1.0)
    torch.testing.assert_close(moved, LOG_SUM.prox(w, step), rtol=1e-4, atol=1e-6)
    assert 100 < int((moved == 0).sum()) < 9000
    assert torch.equal(moved == 0, LOG_SUM.prox(w, step) == 0)


@pytest.mark.slow
def test_compiled_hashed_masks_are_those_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(torch.randn(shape), torch.rand(shape)) for shape in ((300, 70), (5,), (2, 3, 3, 3))]
    compiled = masked(_masks.Fused(LOG_SUM, ScaledBernoulli(), 10.0, 1e-3), rows)
    monkeypatch.setattr(_compiled, "_compile", lambda function, *_: lambda given: function(*given))
    monkeypatch.setattr(_compiled, "_SHARED", {})
    torch.testing.assert_close(compiled, masked(_masks.Fused(LOG_SUM, ScaledBernoulli(), 10.0, 1e-3), rows))


def masked(masking: _masks.Masking, rows: list[_joined.Row], lam: float = 0.1) -> Tensor:
    """All masks in a row; each product is w times its mask."""
    found = list(masking.masked(rows, lam, torch.Generator().manual_seed(3), _memory.Kept()))
    assert [number for number, *_ in found] == list(range(len(rows)))
    for number, mask, product in found:
        torch.testing.assert_close(product, rows[number][0] * mask, rtol=1e-6, atol=0)
    return torch.cat([mask.flatten() for _, mask, _ in found])


@pytest.mark.parametrize("noise", [ScaledBernoulli(), Gaussian()], ids=["Bernoulli", "Gaussian"])
def test_masks_of_a_kernel_have_the_law_of_their_keep_probability(noise: Noise, traced: list[int]) -> None:
    w, h = torch.full((300_000,), 0.3), torch.full((300_000,), 0.02)
    mask = masked(_masks.Fused(LOG_SUM, noise, 10.0, 1e-3), [(w, h)], lam=0.1)
    alpha = keep_probability(LOG_SUM.eta_hat(w) * 0.02, 0.1)[0].double()
    assert 0.05 < float(alpha) < 0.3
    error = float(((1 - alpha) / alpha / len(mask)).sqrt())
    assert float(mask.double().mean()) == pytest.approx(1, abs=5 * error)
    assert float(mask.double().var() * alpha / (1 - alpha)) == pytest.approx(1, abs=0.03)
    assert bool((mask == 0).any()) == (noise == ScaledBernoulli())


def test_draws_depend_neither_on_pieces_nor_on_other_weights(traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(torch.randn(40, 30), torch.rand(40, 30)), (torch.randn(50), torch.rand(50))]
    fused = _masks.Fused(LOG_SUM, ScaledBernoulli(), 10.0, 1e-3)
    whole = masked(fused, rows)
    monkeypatch.setattr(_masks, "_LONGEST", 64)
    assert torch.equal(masked(fused, rows), whole)
    assert torch.equal(masked(fused, [rows[0]]), whole[:1200])
    same = [(torch.ones(2000), torch.rand(2000) * 0 + 0.05)] * 2
    first, second = masked(fused, same).split(2000)
    assert not torch.equal(first, second)


def test_many_small_weights_share_a_kernels_call(traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(torch.randn(shape), torch.rand(shape)) for shape in ((3, 4), (500, 400), (5,), (2, 2), *[(6, 2)] * 9)]
    calls: list[int] = []
    call = Kernel.__call__
    monkeypatch.setattr(
        Kernel, "__call__", lambda self, tensors, numbers: (calls.append(tensors[0].numel()), call(self, tensors, numbers))[1]
    )
    fused = _masks.Fused(LOG_SUM, ScaledBernoulli(), 10.0, 1e-3)
    found = {number: (mask, product) for number, mask, product in fused.masked(rows, 0.1, torch.Generator().manual_seed(3), None)}
    assert sorted(calls) == [12 + 5 + 4 + 9 * 12, 200_000]
    assert sorted(found) == list(range(len(rows)))
    for number, (w, _) in enumerate(rows):
        torch.testing.assert_close(found[number][1], w * found[number][0])
        assert found[number][0].shape == w.shape
    assert len({tuple(found[number][0].flatten().tolist()) for number in range(4, 13)}) == 9
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = {number: mask for number, mask, _ in fused.masked(rows, 0.1, torch.Generator().manual_seed(3), None)}
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(mask, found[number][0]) for number, mask in again.items())


def test_what_does_not_lie_alike_or_is_one_number_is_worked_on_without_a_kernel(traced: list[int]) -> None:
    kernel = Kernel(scaling, 3)
    for source in (torch.randn(3, 4).t(), torch.randn(4, 6)[:, ::2], torch.randn(1)):
        target = torch.zeros(source.shape)
        kernel((target, source), (2.0,))
        torch.testing.assert_close(target, 2 * source**3)
    assert traced == []
    kernel((torch.zeros(3, 4).t(), torch.zeros(3, 4).t()), (2.0,))
    assert traced == [2]


def test_equal_kernels_share_what_was_compiled_and_types_do_not(traced: list[int]) -> None:
    kernel = Kernel(scaling, 2)
    for one in (kernel, Kernel(scaling, 2), pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel)):
        target = torch.zeros(4)
        one((target, torch.full((4,), 3.0)), (0.5,))
        assert torch.equal(target, torch.full((4,), 4.5))
    assert len(traced) == 1
    kernel((torch.zeros(4).double(), torch.ones(4).double()), (0.5,))
    Kernel(scaling, 1)((torch.zeros(4), torch.ones(4)), (0.5,))
    assert len(traced) == 3
    for _ in range(2):  # nobody knows what such a setting is
        Kernel(lambda _: scaling(1), [1])((torch.zeros(4), torch.ones(4)), (0.5,))
    assert len(traced) == 5


def test_a_searched_prox_and_a_missing_compiler_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"the prox of LogSquare.*its prox is searched for.*leave compile=True out"):
        _fused.Shrinkage(LogSquare(1.0), exact=True).check([torch.ones(2)], "root")

    monkeypatch.setattr(_compiled, "_SHARED", {})
    for error, told in ((OSError("no compiler found\nat all"), "no compiler found"), (AssertionError(), "AssertionError")):

        def broken(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(_compiled, "_compile", broken)
        with pytest.raises(RuntimeError, match=rf"could not compile LogSum\(eps=2.0\): {told}\. It needs.*a C\+\+ one"):
            _fused.Pull(LOG_SUM)(torch.ones(2), torch.ones(2), 0.1)


def test_whole_numbers_are_the_same_strength_as_their_floats(traced: list[int]) -> None:
    w, state = weights(9), {"square_avg": torch.rand(27)}
    for lam in (1, 1.0):
        grad, moved = torch.ones_like(w), w.clone()
        _fused.Pull(LOG_SUM)(grad, w, lam)
        torch.testing.assert_close(grad, 1 + LOG_SUM.gradient(w))
        _fused.Shrinkage(LOG_SUM, exact=False)(moved, state, {"lr": 1, "eps": 1, "centered": False}, "auto", 1)
        torch.testing.assert_close(moved, proximal.reweighted_step(LOG_SUM, w, 1 / (state["square_avg"].sqrt() + 1)))
        fused = _masks.Fused(LOG_SUM, ScaledBernoulli(), 10.0, 1e-3)
        rows = [(torch.ones(50),)]
        assert torch.equal(masked(fused, rows, lam), masked(fused, rows, 1.0))
        torch.testing.assert_close(fused.spread(lam, *rows[0]), torch.full((50,), 1 / 3))
    assert sorted(traced) == [2, 2, 2, 3]  # a kernel each: ints are no reason for another, nor read as floats


def test_a_kernel_for_whole_numbers_is_not_that_for_floats(traced: list[int]) -> None:
    kernel = Kernel(scaling, 2)
    for factor in (2, 2.0):
        target = torch.zeros(3)
        kernel((target, torch.ones(3)), (factor,))
        assert torch.equal(target, torch.full((3,), 2.0))
    assert len(traced) == 2


@pytest.mark.slow
def test_half_precision_and_double_weights_have_kernels_of_their_own() -> None:
    for dtype, close in ((torch.bfloat16, 0.02), (torch.float64, 1e-12)):
        w = weights(300).to(dtype)
        grad = torch.ones_like(w)
        _fused.Pull(LOG_SUM)(grad, w, 0.1)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, 1 + (0.1 * LOG_SUM.gradient(w.double())).to(dtype), rtol=close, atol=close)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "root"),
        (torch.optim.NAdam, "root"),
        (torch.optim.RMSprop, "root"),
        (torch.optim.Adagrad, "root"),
        (lambda p: torch.optim.RMSprop(p, centered=True), "tensor"),
        (torch.optim.Adadelta, "tensor"),
        (torch.optim.Adamax, "tensor"),
        (torch.optim.ASGD, "number"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "number"),
    ],
)
def test_the_kind_of_an_optimizers_rate_is_known_before_its_first_step(optimizer: Any, kind: str) -> None:
    w = torch.nn.Parameter(torch.ones(4))
    made = optimizer([w])
    foretold = _rates.kind_of(made, made.param_groups[0])
    w.grad = torch.ones(4)
    made.step()
    state, group = made.state[w], made.param_groups[0]
    rooted, rate = _rates.of_root(state, group), proximal.rate(state, group, "auto")
    assert foretold == kind == ("root" if rooted is not None else "tensor" if isinstance(rate, Tensor) else "number")
