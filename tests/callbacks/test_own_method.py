"""A custom training method and a custom logged figure, defined in this file without changes to the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Toy, data, trainer, weights

from lightning_sparse import conformance, penalties, testing
from lightning_sparse.callbacks import Sparsifier, logging
from lightning_sparse.methods import Method, Step


class FirstOrderDecay(Method):
    """Multiply each weight by 1 - lam / (|w| + 0.1) after each step, at least by 0: nearly a soft threshold."""

    adds_gradients = False

    @torch.no_grad()
    def after_optimizer(self, step: Step) -> None:
        for _, parameter, _ in step.trained():
            parameter.mul_((1 - step.lam / (parameter.abs() + 0.1)).clamp(min=self.floor))

    def __init__(self, penalty: Any, floor: float = 0.0) -> None:
        super().__init__(penalty)
        self.floor = floor


class Decay(Sparsifier):
    """Decay small weights to zero.

    Args:
        floor: the smallest factor of a step.
    """

    method_type, own_arguments = FirstOrderDecay, ("floor",)

    def __init__(self, penalty: Any, lam: Any = None, *, floor: float = 0.0, **options: Any) -> None:
        self.floor = floor
        super().__init__(penalty, lam, **options)

    def _make_method(self, penalty: Any) -> FirstOrderDecay:
        return FirstOrderDecay(penalty, self.floor)


def decay(**options: Any) -> Decay:
    return Decay(penalties.LogSum(0.1), 0.01, **options)


def by_hand(steps: int) -> dict[str, Tensor]:
    module: Any = Toy()
    optimizer = module.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    taken = 0
    while taken < steps:
        for batch in data():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
            taken += 1
            with torch.no_grad():
                for layer in module.network:
                    if isinstance(layer, nn.Linear):
                        layer.weight.mul_((1 - 0.01 / (layer.weight.abs() + 0.1)).clamp(min=0))
            if taken == steps:
                break
    return weights(module)


def test_it_takes_its_steps_and_ends_with_exact_zeros() -> None:
    module = Toy()
    run = trainer(decay(tol=0.0001), epochs=1)
    run.fit(module, data())
    wanted = by_hand(run.global_step)
    for name, w in weights(module).items():
        torch.testing.assert_close(w[w != 0], wanted[name][w != 0])
    sparse = Toy()
    trainer(decay(), epochs=20).fit(sparse, data())
    assert any(bool((w == 0).any()) for w in weights(sparse).values())


def test_it_is_described_converted_and_documented_as_the_forms_are() -> None:
    made = decay(floor=0.5, keep_zeros=True)
    assert repr(made) == "Decay(penalty=LogSum(eps=0.1), lam=0.01, keep_zeros=True, floor=0.5)"
    assert repr(made.to_mask().to_penalty()) == "ReweightedPenalty(penalty=LogSum(eps=0.1), lam=0.01, keep_zeros=True)"
    assert "floor: the smallest factor" in (Decay.__doc__ or "")
    assert "target_sparsity: the share of zeros to reach" in (Decay.__doc__ or "")


@pytest.mark.parametrize(
    "check", ["files_load_safely", "resume_at_an_epochs_end", "a_run_stopped_early_says_what_it_missed", "a_second_fit_goes_on"]
)
def test_it_passes_the_conformance_checks(check: str) -> None:
    outcome = conformance.outcome(conformance.Subject("own", lambda: [decay()]), check)
    assert outcome.verdict in ("pass", "n/a"), outcome


@pytest.mark.slow
def test_it_passes_every_check_but_the_one_that_trains_at_a_rate_of_zero() -> None:
    skipped = "no_noise_at_any_moment"
    assert testing.check_callback(decay(), skip=[skipped], slow=False)
    with pytest.raises(testing.ContractError, match="at a learning rate of 0, where no step but the noise"):
        testing.check_callback(decay(), only=[skipped])


def test_a_custom_figure_needs_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logging.FIGURES, "sparsity/largest", lambda support, shown: max(float(w.abs().max()) for w in shown.values()))
    callback = decay()
    run = trainer(callback, epochs=1)
    run.fit(Toy(), data())
    largest = max(float(w.detach().abs().max()) for w in callback.parameters.values())
    assert float(run.callback_metrics["sparsity/largest"]) == pytest.approx(largest)


def test_several_callbacks_log_a_custom_figure_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logging.FIGURES, "sparsity/largest", lambda support, shown: max(float(w.abs().max()) for w in shown.values()))
    net = Toy()
    names = [name for name, parameter in net.named_parameters() if parameter.dim() > 1]
    callbacks = [decay(select=[name]) for name in names]
    run = trainer(*callbacks, epochs=1)
    run.fit(net, data())
    for place, callback in enumerate(callbacks, start=1):
        (w,) = callback.parameters.values()
        assert float(run.callback_metrics[f"sparsity/largest/{place}"]) == pytest.approx(float(w.detach().abs().max()))
    assert "sparsity/largest" not in run.callback_metrics


class Misspelt(Method):
    """Acts at no moment, because its name has another spelling."""

    def after_optimiser(self, step: Step) -> None:
        raise AssertionError("not called")


class Nothing(Sparsifier):
    """Has a method that is never called."""

    method_type = Misspelt


class Unnamed(Sparsifier):
    """Names no method."""


def test_a_method_without_a_moment_is_refused_with_the_closest_name() -> None:
    with pytest.raises(
        TypeError, match=r"Misspelt defines none of the moments .*'after_optimiser' is none of them; closest: 'after_optimizer'"
    ):
        trainer(Nothing(penalties.LogSum(0.1), 0.01)).fit(Toy(), data())
    with pytest.raises(TypeError, match=r"Unnamed names no method, so it trains nothing: set method_type"):
        trainer(Unnamed(penalties.LogSum(0.1), 0.01)).fit(Toy(), data())
