"""Recipes for a given compression: their targets, and the table's verdicts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange import record_table
from exchange.record_table import GOALS, Goal

from lightning_sparse.cli import main, recipes
from lightning_sparse.reproduction.written import read_lines

RECORDS = Path(__file__).resolve().parents[2] / "docs" / "records"
CHOICES, UNMOVED = (sorted(RECORDS.glob(f"*/{name}")) for name in (record_table.CHOICE, record_table.UNMOVED))


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.recipe)
def test_a_recipe_and_its_baseline_aim_at_the_compression_and_share_their_length(goal: Goal) -> None:
    ours, baseline = (recipes.content(recipes.find(name)) for name in (goal.recipe, f"{goal.recipe}_pruning"))
    wanted = baseline["sparsify"]["init_args"]["target_sparsity"]
    assert goal.times <= 1 / (1 - wanted) < 1.01 * goal.times
    strength = ours["sparsify"]["init_args"]
    assert strength.get("target_sparsity", wanted) == wanted
    assert ("target_sparsity" in strength) != ("kl_weight" in strength)  # otherwise a KL weight chosen on held-out images
    assert ours["trainer"]["max_epochs"] == baseline["trainer"]["max_epochs"] == goal.epochs
    assert ours["model"] == baseline["model"]
    assert ours["data"] == baseline["data"]
    assert goal.recipe in record_table.command(goal.folder)


def run(recipe: str, share: float, error: float, seed: int) -> dict[str, Any]:
    return {"recipe": recipe, "nonzero_file": share, "test_error": error, "seconds": 90.0, "seed": seed}


def cells(text: str, recipe: str) -> list[str]:
    line = next(line for line in text.splitlines() if f"`{recipe}`" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_goal_is_judged_by_the_means_over_the_seeds() -> None:
    met = [run("mnist/lenet_300_100_68x", 1.46, 1.7, 0), run("mnist/lenet_300_100_68x", 1.48, 1.5, 1)]
    dense, wrong = [run("mnist/lenet_300_100_19x", 5.4, 1.2, 0)], [run("mnist/lenet_300_100_100x", 1.0, 1.9, 0)]
    text = record_table.markdown([*met, *dense, *wrong])
    assert cells(text, "mnist/lenet_300_100_68x")[3:] == ["68.0x", "1.47 (0.01)", "1.60 (0.14)", "yes", "1.5 (0.0)", "0, 1"]
    assert cells(text, "mnist/lenet_300_100_19x")[6] == "no, too dense"  # however small the error
    assert cells(text, "mnist/lenet_300_100_100x")[6] == "no, +0.15 points"
    assert cells(text, "mnist/lenet_5_280x")[3] == "not run yet"


def test_an_error_that_equals_the_goal_meets_it_in_float32_too() -> None:
    counted = [run("mnist/lenet_5_280x", 0.35, float(torch.tensor(wrong / 10_000) * 100), seed) for seed, wrong in enumerate((86, 94))]
    assert sum(one["test_error"] for one in counted) / 2 > 0.9
    assert cells(record_table.markdown(counted), "mnist/lenet_5_280x")[6] == "yes"
    more = [*counted[:1], run("mnist/lenet_5_280x", 0.35, 0.96, 1)]
    assert cells(record_table.markdown(more), "mnist/lenet_5_280x")[6] == "no, +0.01 points"


def test_trials_are_sorted_by_error_and_have_no_test_error(tmp_path: Path) -> None:
    assert record_table.tried(tmp_path) == "Not run yet."
    (tmp_path / "lenet_5").mkdir()
    names = "recipe,epochs,val_error,nonzero_file,seconds,overrides"
    lines = ["a,8,2.0,1.5,90,--model.lr 1e-3 --sparsify.freeze 0.3", "a,9,1.9,1.6,60,--data.batch_size 8"]
    (tmp_path / "lenet_5" / record_table.CHOICE).write_text("\n".join([names, *lines]), encoding="utf-8")
    first, second = record_table.tried(tmp_path).splitlines()[2:]
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["`a`", "`batch_size 8`", "9", "1.60", "1.90", "1.0"]
    assert "`lr 1e-3 freeze 0.3`" in second
    assert CHOICES
    for file in CHOICES:
        assert "test_error" not in file.read_text(encoding="utf-8")


def test_the_page_of_measurements_shows_what_the_records_hold() -> None:
    readme = (RECORDS.parent / "results" / "measured.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- records: begin -->")[2].partition("<!-- records: end -->")[0]
    runs = record_table.recorded(RECORDS)
    assert shown.strip() == record_table.reached(runs)
    assert all(f"`{run['recipe']}`" in shown for run in runs)
    assert "not run yet" not in shown
    met = [goal for goal in GOALS if f"`{goal.recipe}`" in shown and cells(shown, goal.recipe)[6] == "yes"]
    assert f"{('None', 'One', 'Two', 'Three', 'Four', 'All')[len(met)]} of the five goals are met" in readme


def test_runs_without_shifts_have_a_table_with_their_overrides(tmp_path: Path) -> None:
    assert record_table.unmoved(tmp_path) == "Not run yet."
    (tmp_path / "lenet_300_100").mkdir()
    names = "recipe,seed,epochs,test_error,nonzero_file,seconds,overrides"
    lines = [f"mnist/lenet_300_100_68x,{seed},80,{error},1.25,60,--data.shift 0 --model.lr 1" for seed, error in ((0, 2.0), (1, 1.9))]
    (tmp_path / "lenet_300_100" / record_table.UNMOVED).write_text("\n".join([names, *lines]), encoding="utf-8")
    text = record_table.unmoved(tmp_path)
    assert cells(text, "mnist/lenet_300_100_68x")[3:7] == ["80.0x", "1.25 (0.00)", "1.95 (0.07)", "no, +0.35 points"]
    assert text.splitlines()[-1] == "- `mnist/lenet_300_100_68x`: `--data.shift 0 --model.lr 1`"
    assert UNMOVED
    assert all(run["overrides"].startswith("--data.shift 0 ") for file in UNMOVED for run in read_lines(file))


@pytest.mark.parametrize("recipe", [name for goal in GOALS for name in (goal.recipe, f"{goal.recipe}_pruning")])
def test_a_recipes_comment_matches_its_recorded_runs(recipe: str) -> None:
    said = recipes.about(recipes.find(recipe))["reaches"]
    text = record_table.reached(record_table.recorded(RECORDS))
    if f"`{recipe}`" not in text:
        assert said == "to be measured"
    else:
        times, _, error = cells(text, recipe)[3:6]
        assert said.startswith(f"{error.split()[0]} % test error at {times}, trained on all 60,000 images, shifted by up to one pixel")


@pytest.mark.slow
@pytest.mark.parametrize("file", CHOICES + UNMOVED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_trial_can_be_run_again_as_it_is_printed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in read_lines(file):
        assert main(["check", run["recipe"], *shlex.split(run["overrides"])]) == 0
        capsys.readouterr()
