"""The recipes for a given compression: they aim at it, and the table says of their runs whether the goal is met."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

from exchange import record_table
from exchange.record_table import GOALS, Goal

from lightning_sparse.cli import recipes


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.recipe)
def test_a_recipe_and_its_baseline_aim_at_the_compression_and_share_their_length(goal: Goal) -> None:
    ours, baseline = (recipes.content(recipes.find(name)) for name in (goal.recipe, f"{goal.recipe}_pruning"))
    wanted = ours["sparsify"]["init_args"]["target_sparsity"]
    assert goal.times <= 1 / (1 - wanted) < 1.01 * goal.times
    assert baseline["sparsify"]["init_args"]["sparsity"] == wanted
    assert ours["trainer"]["max_epochs"] == baseline["trainer"]["max_epochs"] == record_table.EPOCHS[goal.net]
    assert ours["model"] == baseline["model"]
    assert goal.recipe in record_table.command(goal.net)


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
    assert cells(text, "mnist/lenet_300_100_19x")[6] == "no, too dense"  # however good
    assert cells(text, "mnist/lenet_300_100_100x")[6] == "no, +0.15 points"
    assert cells(text, "mnist/lenet_5_280x")[3] == "not run yet"
