"""docs/methods.md equals its generator's output; pairs are found in made-up trajectories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from methods import page, pairs

from lightning_sparse import callbacks
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.cli import recipes
from lightning_sparse.reproduction.rows import ROWS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
COMMAND = "python tests/benchmarks/methods --write docs/methods.md"


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page.page(), f"run {COMMAND}"
    pictures = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures
    assert all((PAGE.parent / picture).is_file() for picture in pictures), f"run {COMMAND}"


def test_every_row_and_every_form_has_its_line() -> None:
    listed = [name for method in page.METHODS for name in page.recipes_of(method)]
    assert sorted(listed) == [name for name in recipes.names() if name.startswith(("paper/", "mnist/"))]
    assert {row.recipe for row in ROWS} <= set(listed)
    every = [getattr(callbacks, name) for name in callbacks.__all__]
    forms = {cls.__name__ for cls in every if issubclass(cls, Sparsifier) and cls is not Sparsifier}
    assert forms <= {method.callback for method in page.METHODS}


def test_a_page_without_runs_says_so(tmp_path: Path) -> None:
    text = page.page(tmp_path)
    assert "not run yet" in text
    assert "figure2.png" not in text


def seeds(*curves: np.ndarray) -> dict[int, list[dict[str, float]]]:
    return {seed: [{"epoch": epoch, "nonzero": float(share)} for epoch, share in enumerate(curve, 1)] for seed, curve in enumerate(curves)}


EPOCH = np.arange(1, 201)
EARLY = np.maximum(0.8 * 0.9 ** (EPOCH - 1), 0.02)
CLIFF = np.where(EPOCH <= 60, 1.0, 0.1)
SLOW = np.linspace(1, 0.6, 200)


def test_runs_are_grouped_by_their_start_and_their_fall() -> None:
    assert pairs.kind(EARLY) == "sparse from the first epoch"
    assert pairs.kind(CLIFF) == "dense at first, then a cliff"
    assert pairs.kind(SLOW) == "dense at first, then a slow decline"
    factor, first, last = pairs.fall(CLIFF)
    assert factor == pytest.approx(10)
    assert first <= 60 < last <= first + pairs.SPAN


def test_rows_coincide_where_their_largest_distance_is_below_the_bound() -> None:
    assert pairs.gap(EARLY, EARLY * 1.2) == pytest.approx(np.log10(1.2))
    assert pairs.gap(EARLY[:20], EARLY) == 0
    found = {ROWS[0].recipe: seeds(EARLY), ROWS[1].recipe: seeds(EARLY * 1.02, EARLY * 1.1), ROWS[2].recipe: seeds(CLIFF)}
    text = pairs.markdown(ROWS, found)
    assert f"- **coinciding**: {ROWS[0].title} with {ROWS[1].title} (0.025)." in text  # log10 of 1.06
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {ROWS[1].title} |")]
    assert "| 84.8 |" in row
    assert "| 0.033 |" in row  # its own seeds: log10 of 1.1 / 1.02
    assert f"{1.06 * EARLY[-26] / (1.06 * EARLY[-1]):.1f}x | 0.033" in row
    assert f"- **dense at first, then a cliff**: {ROWS[2].title}." in text
    assert pairs.markdown(ROWS, {}) == "Not run yet."
