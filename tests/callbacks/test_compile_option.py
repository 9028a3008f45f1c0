"""compile=True: the same results as without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from toys import Toy, data, several, trainer, weights

from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, EtaTrick, PenaltyLoss, ReweightedPenalty
from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import kernels
from lightning_sparse.mask_rules import TopK
from lightning_sparse.methods.gradient import ReweightedGradient
from lightning_sparse.methods.mask import Mask, MaskFormula
from lightning_sparse.noise import Gaussian, Noise, ScaledBernoulli
from lightning_sparse.penalties import LogSquare, LogSum

LOG_SUM = LogSum(0.05)
EVERY = EmpiricalFisher(every=1)
EQUAL: dict[str, Callable[..., Any]] = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 3e-3),
    "prox": partial(AdaptiveProx, LOG_SUM, 3e-3),
    "prox, plain": partial(AdaptiveProx, LOG_SUM, 3e-3, metric="plain"),
    "prox, exact": partial(AdaptiveProx, LOG_SUM, 3e-3, exact=True),
    "mask on outputs": partial(AdaptiveMask, LOG_SUM, 3e-3, curvature=EVERY),
}
DRAWN: dict[str, Callable[..., Any]] = {
    "Bernoulli": partial(AdaptiveMask, LOG_SUM, 3e-3, noise=ScaledBernoulli(), curvature=EVERY),
    "Gaussian": partial(AdaptiveMask, LOG_SUM, 3e-3, noise=Gaussian(), curvature=EVERY),
    "uncalibrated": partial(AdaptiveMask, LOG_SUM, 3e-3, noise=ScaledBernoulli(), curvature=None, threshold=0.02),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8),
}
Calls = list[Callable[..., None]]


pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replace the compiler by the function itself, and record the function of each call."""
    calls: Calls = []

    def pretend(function: Callable[..., None], *_: Any) -> Callable[[list[Tensor]], None]:
        return lambda given: (calls.append(function), function(*given))[1]

    monkeypatch.setattr(kernels, "_compile", pretend)
    monkeypatch.setattr(kernels, "_COMPILED", {})
    return calls


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 3))


def trained(callback: Any, optimizer: Any = OPTIMIZERS["Adam"], epochs: int = 3, **fit: Any) -> tuple[Toy, dict[str, float]]:
    module = Toy(net(), optimizer)
    run = trainer(callback, epochs=epochs)
    run.fit(module, data(), **fit)
    return module, {name: float(value) for name, value in run.callback_metrics.items()}


def alike(one: tuple[Toy, dict[str, float]], other: tuple[Toy, dict[str, float]]) -> None:
    for name, weight in weights(one[0]).items():
        torch.testing.assert_close(weights(other[0])[name], weight, rtol=2e-4, atol=2e-5)
    assert one[1] == pytest.approx(other[1], rel=1e-3)
    assert any(not torch.equal(weight, weights(Toy(net()))[name]) for name, weight in weights(one[0]).items())


@pytest.mark.parametrize(
    "optimizer", [pytest.param(make, id=name, marks=pytest.mark.slow if name != "Adam" else ()) for name, make in OPTIMIZERS.items()]
)
@pytest.mark.parametrize("form", several(EQUAL, *list(EQUAL)[:2]))
def test_a_kernel_changes_no_run(form: Any, optimizer: Any, called: Calls) -> None:
    plain = trained(form(), optimizer)
    assert called == []
    fused = trained(form(compile=True), optimizer)
    alike(plain, fused)
    assert len(called) > 3 * len(data())  # for each weight and batch


@pytest.mark.slow
@pytest.mark.parametrize("form", EQUAL.values(), ids=EQUAL.keys())
def test_a_compiled_kernel_changes_no_run(form: Any) -> None:
    alike(trained(form()), trained(form(compile=True)))


@pytest.mark.parametrize("form", several(DRAWN, "Bernoulli"))
def test_masks_of_a_kernel_train_alike_with_exact_zeros(form: Any, called: Calls) -> None:
    errors, zeros, (x, y) = [], [], data().dataset.tensors  # type: ignore[attr-defined]
    for compiled in (False, True):
        module, _ = trained(form(compile=compiled), epochs=8)
        errors.append(module.loss(module(x), y).item())
        zeros.append(sum(int((w == 0).sum()) for w in weights(module).values() if w.dim() == 2) / (8 * 40 + 40 * 12 + 36))
    assert called
    assert errors[1] == pytest.approx(errors[0], rel=0.25)
    assert zeros[1] == pytest.approx(zeros[0], abs=0.1)


@pytest.mark.parametrize("form", several(DRAWN, "Gaussian"))
def test_a_resumed_run_continues_the_random_draws(form: Any, called: Calls, tmp_path: Path) -> None:
    whole, resumed = (Toy(net(), OPTIMIZERS["Adam"]) for _ in range(2))
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer(form(compile=True), keep, epochs=4, enable_checkpointing=True).fit(whole, data())
    trainer(form(compile=True), epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(weight, weights(resumed)[name]) for name, weight in weights(whole).items())


def test_each_batch_has_masks_of_its_own(called: Calls) -> None:
    seen: list[Tensor] = []

    class Watching(AdaptiveMask):
        def on_before_backward(self, *given: Any) -> None:
            seen.append(self.parameters["network.0.weight"].detach() == 0)
            super().on_before_backward(*given)

    trained(Watching(LOG_SUM, 0.3, noise=ScaledBernoulli(), curvature=None, threshold=0.02, compile=True), epochs=1)
    assert all(mask.any() for mask in seen)
    assert all(not torch.equal(a, b) for number, a in enumerate(seen) for b in seen[:number])


def test_it_goes_from_form_to_form_and_into_a_recipe() -> None:
    penalty = ReweightedPenalty(LOG_SUM, 1e-3, compile=True)
    for other in (penalty.to_mask(), penalty.to_prox(), penalty.to_mask().to_penalty()):
        assert other.compile is True
        assert other.recipe()["init_args"]["compile"] is True
    assert penalty.to_prox(compile=False).compile is False
    assert "compile" not in EtaTrick(LOG_SUM, 1e-3).recipe()["init_args"]
    assert EtaTrick(LOG_SUM, 1e-3).to_penalty().compile is False


class Coin(Noise):
    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.ones_like(alpha)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (partial(ReweightedPenalty, LOG_SUM, 1e-3, compile="yes"), TypeError, "compile must be True or False, got 'yes'"),
        (partial(PenaltyLoss, LOG_SUM, 1e-3, compile=True), ValueError, "PenaltyLoss has no kernel.*use ReweightedPenalty"),
        (partial(AdaptiveMask, TopK(0.5), compile=True), ValueError, r"weight by weight, TopK\(density=0.5\) does not"),
        (partial(AdaptiveMask, LOG_SUM, 1e-3, noise=Coin(), compile=True), TypeError, r"compile=True needs ScaledBernoulli\(\)"),
    ],
)
def test_functions_that_cannot_be_compiled_are_refused(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


def test_a_searched_prox_is_refused_before_training_starts() -> None:
    module = Toy(net(), OPTIMIZERS["Adam"])
    with pytest.raises(RuntimeError, match=r"the prox of LogSquare.*found by a search"):
        trainer(AdaptiveProx(LogSquare(1.0), 1e-3, threshold=1e-3, exact=True, compile=True), epochs=1).fit(module, data())
    assert all(torch.equal(weight, weights(Toy(net()))[name]) for name, weight in weights(module).items())


def test_a_custom_gradient_is_compiled_unchanged(called: Calls) -> None:
    class Steeper(ReweightedGradient):
        def gradient(self, w: Tensor) -> Tensor:
            return 2 * super().gradient(w)

    class Steep(ReweightedPenalty):
        def _make_method(self, penalty: Penalty) -> Steeper:
            return Steeper(penalty)

    alike(trained(Steep(LOG_SUM, 3e-3)), trained(Steep(LOG_SUM, 3e-3, compile=True)))
    assert called


class Constant(MaskFormula):
    """A penalty with the same eta for every weight."""

    def eta(self, lam: Any, *terms: Any) -> Tensor:
        return torch.full_like(terms[0], 1e-9)


class ConstantMask(Mask):
    formula_type = Constant


@pytest.mark.parametrize("compiled", [False, True])
def test_masks_follow_a_custom_eta_and_are_compiled_unchanged(called: Calls, compiled: bool) -> None:
    seen: list[float] = []

    class Seen(AdaptiveMask):
        def _make_method(self, penalty: Penalty) -> Mask:
            return ConstantMask(penalty, self.noise, self.curvature, self.ceiling, self.alpha_min)

        def on_before_backward(self, *given: Any) -> None:
            seen.append(float((self.parameters["network.0.weight"] == 0).float().mean()))
            super().on_before_backward(*given)

    more: dict[str, Any] = {"noise": ScaledBernoulli(), "curvature": None, "threshold": 0.02, "alpha_min": 0.3}
    trained(Seen(LOG_SUM, 1e-3, compile=compiled, **more), epochs=1)
    assert bool(called) == compiled
    assert sum(seen) / len(seen) == pytest.approx(0.7, abs=0.1)


def test_noise_for_a_share_of_the_samples_reaches_the_layers() -> None:
    rows: list[int] = []

    callback: Any = AdaptiveMask(LOG_SUM, 3e-2, noise=Gaussian(local=True, share=0.25), curvature=None, threshold=0.02)
    draw = callback.method.draw_outputs

    def counted(*given: Any) -> Tensor:
        noise: Tensor = draw(*given)
        rows.append(int(noise.ne(0).any(1).sum()))
        return noise

    callback.method.draw_outputs = counted
    trained(callback, epochs=1)
    assert rows
    assert set(rows) == {4}  # of 16


WITHOUT_COMPILER = """
import torch
from lightning_sparse.callbacks import ReweightedPenalty
from lightning_sparse.conformance.toys import Toy, data, trainer, weights
from lightning_sparse.penalties import LogSum

module = Toy()
before = weights(module)
try:
    trainer(ReweightedPenalty(LogSum(0.05), 1e-3, compile=True), epochs=1).fit(module, data())
except RuntimeError as error:
    print(error, all(torch.equal(weight, before[name]) for name, weight in weights(module).items()))
"""


@pytest.mark.slow
def test_a_missing_compiler_fails_before_training(tmp_path: Path) -> None:
    """In a child process, because torch caches which compilers work."""
    env = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.search(r"could not compile LogSum.*a C\+\+ one.*True$", run.stdout.strip()), run.stdout
