"""check_callback on a custom callback and on broken versions of it: each is detected by the right check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from magnitude import Magnitude
from torch import nn

from lightning_sparse import testing


class Waits(Magnitude):
    """Starts pruning after six steps, and does not save its step count."""

    count = 0

    def prune(self, module: nn.Module) -> None:
        self.count += 1
        if self.count > 6:
            super().prune(module)


class Noisy(Magnitude):
    """Leaves noise in the weights until backward, without hiding it from files."""

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in self.matrices(module).items()}
        for p in self.matrices(module).values():
            p.data.mul_(1.5)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        for name, p in self.matrices(module).items():
            p.data.copy_(self.before[name])


class Renames(Magnitude):
    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if not hasattr(module.network[0], "mask"):
            module.network[0].register_buffer("mask", torch.ones(16, 8))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        super().on_train_end(trainer, module)
        del module.network[0].mask


class Replaces(Magnitude):
    def on_train_end(self, trainer: Any, module: Any) -> None:
        module.network[0].weight = nn.Parameter(module.network[0].weight.detach().clone())


class Percent(Magnitude):
    def figures(self, module: nn.Module) -> dict[str, float]:
        return {name: 100 * value for name, value in super().figures(module).items()}


class CountsTiesTwice(Magnitude):
    def matrices(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.dim() > 1}


class Hooks(Magnitude):
    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.network[0].register_forward_hook(lambda *args: None)


class Hoards(Magnitude):
    def __init__(self) -> None:
        self.past: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, module)
        self.past.append([p.detach().clone() for p in self.matrices(module).values()])


class Idle(Magnitude):
    def prune(self, module: nn.Module) -> None:
        pass


class All(Magnitude):
    def prune(self, module: nn.Module) -> None:
        for parameter in self.matrices(module).values():
            parameter.data.zero_()


MUTANTS = {
    Waits: "resume_at_an_epochs_end",
    Noisy: "no_noise_at_any_moment",
    Renames: "plain_at_every_moment",
    Replaces: "the_module_is_its_own_again",
    Percent: "csv_figures_equal_the_file",
    CountsTiesTwice: "tied_weights_are_counted_once",
    Hooks: "ten_fits_do_not_grow",
    Hoards: "memory_is_steady_over_steps",
    Idle: "fit_ends_with_true_zeros",
    All: "fit_ends_with_true_zeros",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*MUTANTS.values()}))
def test_a_correct_custom_callback_passes(name):
    (outcome,) = testing.check_callback(Magnitude(), only=[name])
    assert (outcome.check, outcome.verdict) == (name, "pass")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_check_detects_the_broken_callback(mutant):
    with pytest.raises(testing.ContractError, match=f"fails 1 of 1 checks:\n  {MUTANTS[mutant]}: "):
        testing.check_callback(mutant(), only=[MUTANTS[mutant]])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_progress(terminal, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1") if terminal else monkeypatch.delenv("FORCE_COLOR", raising=False)
    testing.check_callback(Magnitude(), only=["the_module_is_its_own_again"])
    assert ("check_callback" in capsys.readouterr().err) is terminal


def test_an_unknown_check_suggests_the_closest():
    with pytest.raises(ValueError, match="no check 'resume_at_an_epoch_end'; closest: 'resume_at_an_epochs_end'"):
        testing.check_callback(Magnitude(), only=["resume_at_an_epoch_end"])


@pytest.mark.parametrize("given", [Magnitude, 3, "AdaptiveMask"])
def test_other_objects_than_callbacks_are_refused(given):
    with pytest.raises(TypeError, match=r"takes a lightning.pytorch Callback or a function that makes one"):
        testing.check_callback(given)


def test_a_factory_of_callbacks_is_accepted_and_the_outcome_names_the_check():
    outcomes = testing.check_callback(lambda: [Magnitude()], only=["fit_ends_with_true_zeros"])
    assert [(outcome.check, outcome.verdict, outcome.reason) for outcome in outcomes] == [("fit_ends_with_true_zeros", "pass", "")]


def test_the_callers_random_state_is_unchanged():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    testing.check_callback(Magnitude(), only=["fit_ends_with_true_zeros"])
    assert torch.equal(torch.rand(3), expected)


def test_an_outcome_does_not_depend_on_the_callers_random_state():
    """Checks that build a network themselves get the same one, whatever ran before."""
    seen = []

    class Looks(Magnitude):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
            super().on_train_end(trainer, module)

    for seed in (1, 2):
        torch.manual_seed(seed)
        testing.check_callback(lambda: [Looks()], only=["layers_without_rows"])
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
