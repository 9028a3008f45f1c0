"""Every check on every callback of the package, and on Lightning's ModelPruning as a control that must fail."""

from __future__ import annotations

import pytest
from subjects import COMPILED, OTHERS, OURS, SILENT, TARGETS, VARIANTS

from lightning_sparse import conformance, testing
from lightning_sparse.callbacks import SparsityMonitor
from lightning_sparse.elementwise import kernels

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("check", conformance.CHECKS)
@pytest.mark.parametrize("name", OURS)
def test_our_callbacks_conform(name, check):
    outcome = conformance.outcome(OURS[name], check)
    control = outcome.reason.startswith("Lightning")  # Lightning's own run is not exact either, or not possible
    assert outcome.verdict == "pass" or (outcome.verdict == "n/a" and (control or (name, check) in SILENT)), outcome.reason


@pytest.mark.parametrize("check", [name for name, check in conformance.CHECKS.items() if check.group in ("resume", "files", "counts")])
@pytest.mark.parametrize("name", VARIANTS)
def test_their_options_conform_in_what_a_file_holds(name, check):
    outcome = conformance.outcome(VARIANTS[name], check)
    assert outcome.verdict == "pass", outcome.reason


LENGTHS = [name for name, check in conformance.CHECKS.items() if check.group == "length of a run"]


@pytest.mark.parametrize("check", LENGTHS)
@pytest.mark.parametrize("name", TARGETS)
def test_runs_to_a_target_conform_whatever_their_length(name, check):
    outcome = conformance.outcome(TARGETS[name], check)
    assert outcome.verdict == "pass", outcome.reason


STEPS = [name for name, check in conformance.CHECKS.items() if check.group == "precision and steps"]


@pytest.mark.parametrize("check", [*STEPS, "what_is_unfrozen_becomes_sparse"])
@pytest.mark.parametrize("name", COMPILED)
def test_kernels_conform_wherever_steps_are_taken(name, check, monkeypatch):
    monkeypatch.setattr(kernels, "_compile", lambda function, *_: lambda given: function(*given))  # no compiler
    monkeypatch.setattr(kernels, "_COMPILED", {})
    outcome = conformance.outcome(COMPILED[name], check)
    assert outcome.verdict == "pass", outcome.reason


# checks that Lightning's ModelPruning fails, with a part of the reason
BROKEN = {
    "resume_at_an_epochs_end": "resumed from step=4, the final state differs",
    "resume_within_an_epoch": "the final state differs",
    "resume_after_a_kill": "the final state differs",
    "csv_figures_equal_the_file": "CSVLogger got no figure",
    "plain_at_every_moment": "weight_orig",
    "no_noise_at_any_moment": "weight_orig",
    "a_callback_is_reusable": "don't exist in the model",
    "mask_buffers_are_the_users_own": "",
    "ema_is_sparse": "are neither the average's nor zero",
    "the_best_score_is_that_of_its_file": "recorded",
    "ranks_hold_the_same_zeros": "the ranks' zeros differ",
    "frozen_weights_stay": "a frozen weight changed",
    "tied_weights_are_counted_once": "nothing is logged",
    "an_exception_leaves_the_module": "the hooks are 4; before 0",
    "a_full_disk_while_saving": "the hooks are 4; before 0",
    "a_loss_that_is_not_finite": "was not detected",
    "gradients_that_are_not_finite": "was not detected",
    "weights_that_are_not_finite": "was not detected",
    "flipped_bits_are_refused": "resumed without an error",
}


@pytest.mark.parametrize("check", BROKEN)
def test_the_control_fails_the_known_checks(check):
    outcome = conformance.outcome(OTHERS["ModelPruning"], check)
    assert (outcome.verdict, BROKEN[check] in outcome.reason) == ("fail", True), outcome


def test_a_callback_that_only_measures_fails():
    with pytest.raises(testing.ContractError, match="fails 1 of 2 checks:\n  fit_ends_with_true_zeros: 0 of 176 weights are zero"):
        testing.check_callback(SparsityMonitor(), only=["fit_ends_with_true_zeros", "plain_at_every_moment"])
