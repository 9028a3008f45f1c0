"""The two figures of the case study: the penalties, and the trajectories of the runs with the published points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightning_sparse.duality import Penalty
from lightning_sparse.mask_rules import Standout
from lightning_sparse.penalties import MCP, HardConcrete, LogSum, VariationalDropout
from lightning_sparse.reproduction.rows import EPOCHS, Row

Trajectories = dict[str, dict[int, list[dict[str, float]]]]  # by recipe and seed: one line per epoch

# Okabe and Ito's colours, safe for colour-blind readers; without yellow, because it is too pale for a line
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS, _DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", ":")
DIMENSION, KEPT = 32, 16

CURVES: tuple[tuple[str, Penalty, float], ...] = (
    ("VarDrop (exact)", VariationalDropout("log_uniform"), 1.0),
    ("2 LogSum(2)", LogSum(eps=2.0), 2.0),
    ("Standout", Standout().to_penalty(), 1.0),
    ("hard concrete", HardConcrete(), 1.0),
    (r"$\sqrt{2}$ MCP($\sqrt{2}/2$)", MCP(c=math.sqrt(2) / 2), math.sqrt(2)),
)


def on_weights(penalty: Penalty, lam: float, w: Sequence[float]) -> list[float]:
    """Return lam * omega at each weight."""
    values: list[float] = (lam * penalty.omega(torch.tensor(w, dtype=torch.float64))).tolist()
    return values


def on_vectors(penalty: Penalty, lam: float) -> list[float]:
    """Return lam * Omega of vectors in DIMENSION dimensions with k entries 1 / sqrt(k), the others 0, for k = 0 to DIMENSION."""
    counts = range(1, DIMENSION + 1)
    return [0.0] + [k * value for k, value in zip(counts, on_weights(penalty, lam, [k**-0.5 for k in counts]), strict=True)]


def penalties() -> Figure:
    """Draw figure 1: lam * Omega of one weight, and of vectors of norm 1 with k equal non-zeros."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    one, spread = figure.subplots(1, 2)
    w = np.geomspace(0.01, 5, 400).tolist()
    for index, (title, penalty, lam) in enumerate(CURVES):
        # dashed where another curve overlaps
        style = {"color": COLOURS[index], "linestyle": "--" if index in (1, 4) else "-", "linewidth": 2}
        one.plot(w, on_weights(penalty, lam, w), label=title, **style)
        spread.plot(range(DIMENSION + 1), on_vectors(penalty, lam), marker=".", **style)
    top = 1.08 * max(max(on_vectors(penalty, lam)) for _, penalty, lam in CURVES)
    spread.plot([0, KEPT, KEPT], [0, 0, top], color="black", linestyle="-.", linewidth=1.6, label=f"hard threshold at {KEPT}")
    spread.annotate(r"$\infty$", (KEPT, top), (KEPT + 0.5, 0.94 * top))
    one.set(title="one weight", xlabel=r"$|w|$", ylabel=r"$\lambda\,\Omega(w)$", xscale="log", yscale="log", xlim=(0.01, 5))
    title = f"{DIMENSION} weights of norm 1, k of them equal, the others 0"
    spread.set(title=title, xlabel="k", ylabel=r"$\lambda\,\Omega(w)$", xlim=(0, DIMENSION), ylim=(-0.02 * top, top))
    _finish(figure, [one, spread], [*one.lines, spread.lines[-1]], 3)
    return figure


def trajectories(rows: Sequence[Row], found: Trajectories) -> Figure:
    """Draw figure 2: share of non-zero weights and validation error per epoch, as mean and minimum-to-maximum band over seeds.

    Published points are drawn for rows that have them, if the runs are as long as the published ones.
    """
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(1, 2)
    handles = [_draw_row(axes, row, found[row.recipe], _style(index)) for index, row in enumerate(rows) if row.recipe in found]
    for axis, title in zip(axes, ("non-zero weights %", "validation error %"), strict=True):
        _label(axis, title)
    if any(handle.get_marker() != "None" for handle in handles):
        handles.append(Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color="gray", label="published, one run"))
    if any(len(seeds) > 1 for seeds in found.values()):
        handles.append(Line2D([], [], color="gray", alpha=0.3, linewidth=8, label="least to most of the seeds"))
    _finish(figure, axes, handles, 4)
    return figure


def _label(axis: Axes, title: str) -> None:
    """Label an axis and set a logarithmic scale; write a note instead if the axis has no finite values."""
    # because runs that train on all images have no validation error
    measured = any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axis.lines)
    if not measured:
        axis.set(title=f"{title}: no images held out", xticks=[], yticks=[])
        return
    axis.set(title=title, xlabel="epoch", yscale="log")
    _plain_numbers(axis)


def _draw_row(axes: Sequence[Axes], row: Row, seeds: dict[int, list[dict[str, float]]], style: dict[str, str]) -> Line2D:
    """Draw one row in both panels and return its legend handle."""
    comparable = max(len(lines) for lines in seeds.values()) == EPOCHS[-1]
    for axis, name, factor, points in ((axes[0], "nonzero", 100, row.shares), (axes[1], "val_error", 1, row.errors)):
        epoch, mean, least, most = mean_and_band(seeds, name, factor).T
        axis.plot(epoch, mean, color=style["color"], linestyle=style["linestyle"], linewidth=1.8)
        axis.fill_between(epoch, least, most, color=style["color"], alpha=0.2, linewidth=0)
        if points and comparable:
            axis.plot(EPOCHS, [factor * point for point in points], **(style | {"linestyle": "", "markerfacecolor": "white"}))  # type: ignore[arg-type]
    legend_style = style if row.shares and comparable else style | {"marker": "None"}
    return Line2D([], [], label=row.title, markerfacecolor="white", **legend_style)  # type: ignore[arg-type]


def mean_and_band(seeds: dict[int, list[dict[str, float]]], name: str, factor: float = 1.0) -> np.ndarray:
    """Return the columns epoch, mean, minimum and maximum over seeds, for the epochs recorded for every seed."""
    length = min(len(lines) for lines in seeds.values())
    values = factor * np.array([[line[name] for line in lines[:length]] for lines in seeds.values()])
    epochs = [line["epoch"] for line in next(iter(seeds.values()))[:length]]
    return np.stack([np.array(epochs), values.mean(0), values.min(0), values.max(0)], axis=1)


def _style(index: int) -> dict[str, str]:
    count = len(COLOURS)
    return {"color": COLOURS[index % count], "marker": _MARKERS[index % count], "linestyle": _DASHES[index // count % len(_DASHES)]}


def _plain_numbers(axis: Axes) -> None:
    """Label the y axis with 1, 2, 3, 5, 10 instead of powers of ten."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, axes: Sequence[Axes], handles: Sequence[Line2D], columns: int) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)
