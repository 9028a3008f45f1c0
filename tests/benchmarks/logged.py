"""Pictures of docs/guide/logging.md: train the recipe ``digits`` with W&B offline, and take what the run stored.

    python tests/benchmarks/logged.py docs/guide/logged

Copies the two pictures of the run's folder and draws the histograms that lie in the run's W&B file.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from lightning_sparse import plots
from lightning_sparse.cli import main
from lightning_sparse.conformance import _wandb_file

NAMES = {"sparsity/log_alpha": "log of the keep probability alpha", "sparsity/abs_w": "|w|"}


def histograms(history: Sequence[Mapping[str, Any]]) -> plots.Picture:
    """Draw each histogram over the optimiser steps: one column for each time that it was logged, darker for more weights."""
    figure = plots.Picture(figsize=(9, 4), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(NAMES)), NAMES.items(), strict=True):
        rows = [row for row in history if name in row]
        steps = [row["trainer/global_step"] for row in rows]
        for row, start, end in zip(rows, steps, [*steps[1:], 2 * steps[-1] - (steps[-2] if len(steps) > 1 else 0)], strict=True):
            drawn = _column(axis, row[name]["values"], row[name]["bins"], start, end)
        axis.set(title=name, xlabel="optimiser step", ylabel=label)
    figure.colorbar(drawn, ax=figure.axes, label="share of the weights in a bin")
    return figure


def _column(axis: Axes, counts: Sequence[int], edges: Sequence[float], start: float, end: float) -> Any:
    shares = np.asarray(counts, dtype=float)[:, None] / max(sum(counts), 1)
    return axis.pcolormesh([start, end], edges, np.where(shares > 0, shares, np.nan), norm=LogNorm(1e-5, 1), cmap="Blues", rasterized=True)


def write(folder: Path) -> None:
    """Train in a temporary folder and write the three pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        words = ["fit", "--config", "digits", "--report.dense_twin", "false", "--report.exports", "false"]
        if main([*words, "--trainer.logger.save_dir", scratch]) != 0:
            raise SystemExit("the run failed")
        wandb.finish()  # completes the run's file
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sparsity.png", "masks.png"):
            (found,) = Path(scratch).rglob(name)
            shutil.copy(found, folder / name)
        plots.save(histograms(_wandb_file.read_run(Path(scratch)).history), folder / "histograms.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
