"""Pictures of docs/exchange.md: frontiers of all arms, and the duality gap during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from exchange.frontier import Runs, frontier, points
from exchange.grid import NETS, PENALTIES
from exchange.records import Gaps
from exchange.tables import of_arm
from lightning_sparse.reproduction.figures import COLOURS

STYLES = {
    "penalty": ("penalty form", COLOURS[0], "o", "-"),
    "mask": ("mask form, calibrated", COLOURS[3], "s", "-"),
    "mask_uncalibrated": ("mask form, uncalibrated", COLOURS[4], "^", "--"),
    "pruning": ("magnitude pruning", COLOURS[6], "x", ":"),
}


def frontiers(runs: Runs) -> Figure:
    """Draw test error against share of non-zero weights for LeNet-300-100, one panel per penalty.

    Markers are means over seeds at one strength, faint ones single runs; lines join the frontier that validation chooses.
    """
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(1, len(PENALTIES), sharey=True, squeeze=False)[0]
    for axis, (penalty, (title, _, _)) in zip(axes, PENALTIES.items(), strict=True):
        for form in STYLES:
            _draw(axis, of_arm(runs, f"lenet_300_100/{form}" if form == "pruning" else f"lenet_300_100/{penalty}/{form}"), form)
        axis.set(title=f"LeNet-300-100, {title}", xlabel="non-zero weights %", xscale="log", yscale="log")
        _plain(axis)
    axes[0].set_ylabel("test error %")
    _finish(figure, axes)
    return figure


def _draw(axis: Axes, runs: Runs, form: str) -> None:
    if not runs:
        return
    label, colour, marker, line = STYLES[form]
    found = points(runs)
    chosen = frontier(found)
    axis.plot([point.share for point in chosen], [point.test_error for point in chosen], color=colour, linestyle=line, linewidth=1.6)
    single: dict[str, Any] = {"linestyle": "", "marker": marker, "color": colour}
    axis.plot([run["nonzero_file"] for run in runs], [run["test_error"] for run in runs], alpha=0.35, markersize=4, **single)
    axis.plot([point.share for point in found], [point.test_error for point in found], label=label, markersize=7, **single)


def gaps(runs: Runs, epochs: Gaps) -> Figure:
    """Draw ``sparsity/duality_gap`` by epoch, one panel per network, one line per seed.

    The scale is linear within 0.1 of zero and logarithmic beyond, on both sides.
    """
    shown = gap_lines(runs, epochs)
    figure = Figure(figsize=(1.6 + 4.2 * len(shown), 4.6), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (net, lines) in zip(axes, shown.items(), strict=True):
        for form, _, curve in lines:
            label, colour, _, line = STYLES[form]
            axis.plot(range(1, len(curve) + 1), curve, color=colour, linestyle=line, linewidth=1.5, label=label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"{NETS[net].title}, LogSum(2), lam = {lines[0][1]:g}", xlabel="epoch")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("duality gap")
    _finish(figure, axes)
    return figure


def gap_lines(runs: Runs, epochs: Gaps) -> dict[str, list[tuple[str, float, np.ndarray]]]:
    """Return (form, lam, gap by epoch) of the mask runs at one strength, by network."""
    found: dict[str, list[tuple[str, float, np.ndarray]]] = {}
    for net in NETS:
        lam = 1e-3 if 1e-3 in NETS[net].lams else NETS[net].lams[0]
        for form in ("mask", "mask_uncalibrated"):
            own = [run for run in of_arm(runs, f"{net}/logsum/{form}") if run["lam"] == lam]
            curves = [np.array([line["duality_gap"] for line in epochs[run["run"]] if "duality_gap" in line]) for run in own]
            found.setdefault(net, []).extend((form, lam, curve) for curve in curves if len(curve))
    return {net: lines for net, lines in found.items() if lines}


def _plain(axis: Axes) -> None:
    """Label an axis with 1, 2, 3, 5, 10 instead of powers of ten; more labels for errors, which have a smaller range."""
    for scale, subs in ((axis.xaxis, (1.0, 2.0, 3.0, 5.0)), (axis.yaxis, (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0))):
        scale.set_major_locator(LogLocator(subs=subs))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, axes: Sequence[Axes]) -> None:
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=2 * len(axes))
