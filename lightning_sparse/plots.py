"""Plot penalty curves, the sparsity of a run, and masks. Only this module loads matplotlib, without its global state."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_sparse import _checks, duality
from lightning_sparse._construction import brief
from lightning_sparse.duality import MaskRule, Penalty

_Curve = tuple[str, Tensor, Tensor]


class Picture(Figure):
    """A figure that a notebook displays by itself, because matplotlib displays only those made by pyplot."""

    def _repr_png_(self) -> bytes:
        shown = BytesIO()
        self.savefig(shown, format="png")
        return shown.getvalue()


def penalty_curves(penalties: Sequence[Penalty | MaskRule], lam: float = 1.0, w_max: float = 4.0) -> Figure:
    """Plot omega(w), eta_hat(w), f(eta) and alpha(w) at strength ``lam``, one line for each penalty.

    Raises ValueError for no penalty, one that is not separable, and unless ``lam`` and ``w_max`` are > 0.
    """
    _checks.positive("lam", lam)
    if not penalties:
        raise ValueError("give at least one penalty, for example [LogSum(eps=2.0), MCP(c=1.0)]")
    w = torch.linspace(0, _checks.positive("w_max", w_max), 801, dtype=torch.float64)
    figure = Picture(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for given in penalties:
        penalty = _separable(given)
        for axis, (_, x, y) in zip(axes, _curves(penalty, w, lam), strict=True):
            axis.plot(*_finite(x, y), label=repr(given), linewidth=1.8)
    _label(axes[0], "penalty", "w", r"$\omega(w)$")
    _label(axes[1], "minimiser of the eta-trick", "w", r"$\hat\eta(w)$")
    _label(axes[2], "dual", r"$\eta$", r"$f(\eta)$")
    _label(axes[3], f"keep probability at lam = {lam:g}", "w", r"$\alpha(w)$")
    axes[1].set_yscale("log")
    axes[3].set_ylim(-0.03, 1.03)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 if len(penalties) > 1 else 1)
    return figure


def _separable(given: Penalty | MaskRule) -> Penalty:
    penalty = duality.to_penalty(given)
    if not penalty.separable:
        why = f"{brief(given)} is not separable: its value at one weight depends on the others, so it has no curve"
        raise ValueError(f"{why}; plot a penalty or rule of single weights, such as LogSum")
    return penalty


def _curves(penalty: Penalty, w: Tensor, lam: float) -> list[_Curve]:
    eta = w[1:]
    eta_hat = penalty.eta_hat(w)
    alpha = duality.keep_probability(eta_hat, lam)
    return [("omega", w, penalty.omega(w)), ("eta_hat", w[1:], eta_hat[1:]), ("f", eta, penalty.dual(eta)), ("alpha", w, alpha)]


def _finite(x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    return x.tolist(), [value if math.isfinite(value) else math.nan for value in y.tolist()]


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)


def sparsity_curve(history: Sequence[Mapping[str, float]], names: Collection[str] | None = None) -> Figure:
    """Plot the share of zeros by epoch, in total and for each parameter, with the validation accuracy if it was logged.

    ``history`` holds one mapping per epoch, with ``epoch`` and the logged ``sparsity/...`` values. ``names`` are the parameters'
    names; without them, figures whose name has a dot, as parameters of layers have, count as parameters.
    """
    figure = Picture(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    shares = [name for name in (history[-1] if history else {}) if _is_share(name, names)]
    for name in sorted(shares, key=lambda name: name != "sparsity/total"):
        style = {"color": "black", "linewidth": 2.2} if name == "sparsity/total" else {"linewidth": 1.2}
        _draw(axis, history, name, name.removeprefix("sparsity/"), **style)
    for name in (name for name in (history[-1] if history else {}) if name.startswith("val") and "acc" in name):
        _draw(axis, history, name, name, linestyle="--", linewidth=1.2)
    _label(axis, "zeros in the selected weights", "epoch", "share")
    axis.set_ylim(-0.02, 1.02)
    if axis.lines:
        figure.legend(loc="outside right center")
    return figure


def _is_share(name: str, parameters: Collection[str] | None) -> bool:
    """Return True for the total and for a parameter's share of zeros, False for any other ``sparsity/...`` figure."""
    own = name.removeprefix("sparsity/")
    layer = own in parameters if parameters is not None else "." in own and not own.startswith("groups/")
    return own != name and (own == "total" or layer)


def _draw(axis: Axes, history: Sequence[Mapping[str, float]], name: str, label: str, **style: object) -> None:
    points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
    axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)  # type: ignore[arg-type]


def masks(weights: Mapping[str, Tensor]) -> Figure:
    """Plot which weights of each parameter are not zero: dark if non-zero, the longer side horizontal.

    A tensor of more than two dimensions is flattened to (outputs, all others). Raises ValueError for no weights.
    """
    _checks.tensors(weights, "masks(weights)")
    if not weights:
        raise ValueError("no weights to draw")
    patterns = {name: pattern(weight) for name, weight in weights.items()}
    heights = [min(max(9.0 * min(p.shape) / max(p.shape), 0.8), 3.6) for p in patterns.values()]
    figure = Picture(figsize=(9, sum(heights) + 0.9 * len(heights)), layout="constrained")
    axes = figure.subplots(len(patterns), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (name, rows) in zip(axes, patterns.items(), strict=True):
        _draw_mask(axis, name, rows)
    return figure


def _draw_mask(axis: Axes, name: str, rows: Tensor) -> None:
    kept, size, tall = int(rows.sum()), rows.numel(), rows.shape[0] > rows.shape[1]
    axis.imshow((rows.T if tall else rows).numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    x, y = ("output", "input") if tall else ("input", "output")
    axis.set(title=f"{name}: {kept} of {size} non-zero ({100 * (1 - kept / max(size, 1)):.1f} % zeros)", xlabel=x, ylabel=y)


def pattern(weight: Tensor) -> Tensor:
    """Return True where a weight is not zero, as (first dimension, all others)."""
    return (weight.detach().cpu() != 0).reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG or PDF atomically and return its path; the folder is created if it is missing.

    Raises ValueError unless the name ends in ``.png`` or ``.pdf``.
    """
    target = Path(path)
    if target.suffix not in (".png", ".pdf"):
        raise ValueError(f"the picture's name must end in .png or .pdf, got {str(path)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f"{target.suffix}.part")
    undated = {"CreationDate": None} if target.suffix == ".pdf" else {}  # so that equal figures give equal files
    try:
        FigureCanvasAgg(figure)
        figure.savefig(part, format=target.suffix[1:], dpi=120, metadata=undated)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target
