"""Parts of the benchmarks of step cost and time to quality: schedules, byte counts, options, verdicts, stored runs."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
from performance import arms, before_after, floor, jobs, options, peers, quality, recipes, rounds, runs, time_to_quality
from performance.peer_list import OURS


@pytest.mark.parametrize(("epochs", "begin", "end"), [(10, 0.0, 0.5), (7, 0.1, 0.6), (40, 0.0, 0.75)])
def test_pruning_in_each_epoch_leaves_two_percent(epochs: int, begin: float, end: float) -> None:
    found = recipes.amounts(epochs, begin, end)
    assert len(found) == epochs
    assert math.prod(1 - amount for amount in found) == pytest.approx(1 - recipes.SHARE)
    assert all(amount == pytest.approx(0) for epoch, amount in enumerate(found) if epoch + 1 <= begin * epochs or epoch >= end * epochs)


def test_pruning_at_once_happens_at_half_time() -> None:
    assert recipes.at_once(10) == [0.0] * 4 + [recipes.SHARE] + [0.0] * 5
    assert recipes.at_once(1) == [recipes.SHARE]


def test_the_penaltys_floor_is_three_values_a_weight() -> None:
    job = jobs.JOBS["lenet"]
    size, traffic = floor.size_of(job), floor.of_arm("penalty", job)
    assert traffic is not None
    assert (size.weights, size.bytes_of(traffic)) == (266_200, 12 * 266_200)
    assert job.epoch == 469
    assert floor.of_arm(arms.PLAIN, job) is None


def test_arms_keep_their_order_and_the_base_comes_first() -> None:
    assert options.picked(["c", "a"], ["a", "b", "c"], "plain") == ["plain", "a", "c"]


@pytest.mark.parametrize("text", ["15", "0", "ten"])
def test_a_window_holds_whole_rounds_of_the_curvature(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options._steps(text)
    assert options._steps("30") == 30


@pytest.mark.parametrize(("ratio", "said"), [(0.9, "ahead"), (0.97, "even"), (1.04, "even"), (1.2, "behind")])
def test_a_verdict_needs_a_difference_larger_than_a_a(ratio: float, said: str) -> None:
    assert peers.standing(ratio, 0.05) == said


@pytest.mark.parametrize(("now", "said"), [(1.3, "slower"), (1.04, "even"), (0.97, "even"), (0.5, "faster")])
def test_a_version_is_slower_if_its_quartiles_exclude_one_by_more_than_a_a(now: float, said: str) -> None:
    times: rounds.Times = {"penalty": [now * (1 + part) for part in (-0.01, 0, 0.01)], "penalty, before": [1.0] * 3}
    row = before_after.row("penalty", times, {"penalty": 1.2, "penalty, before": 1.1}, stray=0.05)
    assert row["ratio"] == pytest.approx(now)
    assert row["standing"] == said


def test_each_version_is_imported_in_its_own_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "lightning_sparse"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the earlier version')\n", encoding="utf-8")
    with before_after._first_on_path(tmp_path):
        calls = runs.calls(runs.Setting("lenet", 10, 2, threads=1), before_after.of, {"penalty, before": "penalty"})
        with calls as started, pytest.raises(RuntimeError, match="ended without a result"):
            started["penalty, before"]()
    assert "ImportError: the earlier version" in capfd.readouterr().err
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(("strays", "kept", "tries"), [([0.05], 0.05, 1), ([0.4, 0.2, 0.09], 0.09, 3), ([0.4, 0.2, 0.3, 0.01], 0.2, 3)])
def test_a_noisy_measurement_is_repeated_and_the_least_noisy_counts(strays: list[float], kept: float, tries: int) -> None:
    runs = iter({"stray": stray, "number": number} for number, stray in enumerate(strays))
    found = options.stillest(lambda: next(runs), argparse.Namespace(still=0.1, tries=3))
    assert found == {"stray": kept, "number": strays.index(kept), "tries": tries}


def test_every_peer_is_held_against_a_form_of_ours_and_says_how_to_get_it() -> None:
    assert {peer.ours for peer in peers.PEERS} <= set(OURS)
    absent = [peer for peer in peers.PEERS if peer.install]
    assert absent
    made_up = peers.Peer("one", absent[0].ours, absent[0].prepare, "no_such_package", "pip install one")
    assert peers.obstacle(made_up, jobs.JOBS["lenet"]) == "not installed: pip install one"


@pytest.mark.slow
def test_arms_train_in_turn_in_processes_of_their_own() -> None:
    setting = runs.Setting("lenet", steps=10, turns=2, threads=1)
    with runs.calls(setting, arms.of, {"plain": "plain", "penalty": "penalty"}) as calls:
        assert [calls[name]() > 0 for name in ("plain", "penalty", "penalty", "plain")] == [True] * 4
    assert not multiprocessing.active_children()
    with runs.calls(setting, arms.of, {"one": "no such arm"}) as calls, pytest.raises(RuntimeError, match=r"'one' failed(.|\n)*KeyError"):
        calls["one"]()


def run(recipe: str, minutes: float, zeros: float = 0.98, error: float = 0.019) -> dict[str, Any]:
    found = {"method": "m", "variant": recipe, "lr": 1e-3, "epochs": 5, "seed": 0, "threads": 1}
    return found | {"minutes": minutes, "cpu_minutes": minutes, "zeros": zeros, "val_error": error, "test_error": 0.02}


def test_a_methods_time_is_its_fastest_recipes_that_reaches() -> None:
    slow, fast, wrong, dense = run("slow", 3.0), run("fast", 2.0), run("wrong", 1.0, error=0.021), run("dense", 0.5, zeros=0.97)
    assert [quality.is_reached(one) for one in (slow, fast, wrong, dense)] == [True, True, False, False]
    row = time_to_quality.row("m", [[slow], [fast], [wrong], [dense]], "", 1)
    assert (row["recipe"], row["minutes"], row["reached"]) == ("fast, lr 0.001", 2.0, "yes")
    missed = time_to_quality.row("m", [[wrong], [dense]], "", 1)
    assert (missed["recipe"], missed["reached"]) == ("wrong, lr 0.001", "no")  # the sparsity goal is checked before the accuracy goal
    assert time_to_quality.row("m", [], "not installed", 1)["reached"] == "not installed"


def test_runs_are_found_again_in_the_file(tmp_path: Path) -> None:
    kept = quality.Kept(tmp_path / "runs.jsonl")
    kept.add(run("fast", 2.0))
    again = quality.Kept(tmp_path / "runs.jsonl")
    assert again.find({"variant": "fast", "seed": 0}) == run("fast", 2.0)
    assert again.find({"variant": "fast", "seed": 1}) is None


def test_runs_on_shifted_images_are_separate(tmp_path: Path) -> None:
    kept, recipe = quality.Kept(tmp_path / "runs.jsonl"), recipes.RECIPES[0]
    kept.add(quality.key(recipe, 1e-3, 5, 0, shift=0))
    assert kept.find(quality.key(recipe, 1e-3, 5, 0, shift=0)) is not None
    assert kept.find(quality.key(recipe, 1e-3, 5, 0, shift=1)) is None
