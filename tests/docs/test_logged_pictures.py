"""The pictures of docs/guide/logging.md: what is drawn is what the W&B run holds, and the page names the files and their command."""

from __future__ import annotations

from pathlib import Path

import logged
import numpy as np

DOCS = Path(__file__).parents[2] / "docs"


def row(step: int, values: list[int], bins: list[float]) -> dict[str, object]:
    histogram = {"_type": "histogram", "values": values, "bins": bins}
    return {"trainer/global_step": step, "sparsity/log_alpha": histogram, "sparsity/abs_w": histogram}


def test_each_histogram_is_a_column_with_its_own_bins() -> None:
    history = [row(10, [1, 3], [0.0, 1.0, 2.0]), {"trainer/global_step": 15, "train/loss": 0.1}, row(30, [8, 0], [0.0, 2.0, 4.0])]
    figure = logged.histograms(history)  # type: ignore[arg-type]
    assert [axis.get_title() for axis in figure.axes[:2]] == ["sparsity/log_alpha", "sparsity/abs_w"]
    for axis in figure.axes[:2]:
        first, second = axis.collections
        assert np.allclose(first.get_array().ravel(), [0.25, 0.75])
        corners = second.get_coordinates()  # type: ignore[attr-defined]
        assert corners[:, 0, 1].tolist() == [0.0, 2.0, 4.0]
        assert corners[0, :, 0].tolist() == [30.0, 50.0]  # as wide as the column before
        assert second.get_array().mask.ravel().tolist() == [False, True]  # an empty bin is blank


def test_the_page_shows_every_picture_and_names_the_command() -> None:
    page = (DOCS / "guide/logging.md").read_text()
    for name in ("sparsity.png", "masks.png", "histograms.png"):
        assert f"](logged/{name})" in page
        assert 0 < (DOCS / "guide/logged" / name).stat().st_size < 100_000
    assert "python tests/benchmarks/logged.py docs/guide/logged" in page
