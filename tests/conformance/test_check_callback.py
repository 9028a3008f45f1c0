"""check_callback on a callback of one's own, and on broken versions of it: each is caught, by the check that should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_sparse import testing


class Magnitude(Callback):
    """Half of every weight matrix (a quarter of small ones) is zero after each step: what one writes in five minutes."""

    def matrices(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters() if p.dim() > 1}

    @torch.no_grad()
    def prune(self, module: nn.Module) -> None:
        for parameter in self.matrices(module).values():
            share = 0.5 if parameter.numel() >= 48 else 0.25
            parameter[parameter.abs() <= parameter.abs().flatten().quantile(share)] = 0.0

    def figures(self, module: nn.Module) -> dict[str, float]:
        counts = {name: (int((p == 0).sum()), p.numel()) for name, p in self.matrices(module).items()}
        total = sum(zeros for zeros, _ in counts.values()) / sum(size for _, size in counts.values())
        return {"sparsity/total": total} | {f"sparsity/{name}": zeros / size for name, (zeros, size) in counts.items()}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.prune(module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        module.log_dict(self.figures(module))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.prune(module)


class Waits(Magnitude):
    """Prunes from its sixth step on, and forgets in a checkpoint how many there were."""

    count = 0

    def prune(self, module: nn.Module) -> None:
        self.count += 1
        if self.count > 6:
            super().prune(module)


class Noisy(Magnitude):
    """Leaves its noise in the weights until the batch ends."""

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
def test_a_callback_of_ones_own_passes(name):
    (outcome,) = testing.check_callback(Magnitude(), only=[name])
    assert (outcome.check, outcome.verdict) == (name, "pass")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_one_is_caught_by_the_check_that_should(mutant):
    with pytest.raises(testing.ContractError, match=f"fails 1 of 1 checks:\n  {MUTANTS[mutant]}: "):
        testing.check_callback(mutant(), only=[MUTANTS[mutant]])


def test_an_unknown_check_is_answered_with_the_closest():
    with pytest.raises(ValueError, match="no check 'resume_at_an_epoch_end'; closest: 'resume_at_an_epochs_end'"):
        testing.check_callback(Magnitude(), only=["resume_at_an_epoch_end"])


@pytest.mark.parametrize("given", [Magnitude, 3, "AdaptiveMask"])
def test_what_is_no_callback_is_refused(given):
    with pytest.raises(TypeError, match=r"takes a lightning.pytorch Callback or a function that makes one"):
        testing.check_callback(given)


def test_a_function_that_makes_callbacks_is_taken_and_the_outcome_names_the_check():
    outcomes = testing.check_callback(lambda: [Magnitude()], only=["fit_ends_with_true_zeros"])
    assert [(outcome.check, outcome.verdict, outcome.reason) for outcome in outcomes] == [("fit_ends_with_true_zeros", "pass", "")]


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    testing.check_callback(Magnitude(), only=["fit_ends_with_true_zeros"])
    assert torch.equal(torch.rand(3), expected)
