"""Plots: the drawn values equal the input, and files are complete or absent."""

from __future__ import annotations

import html
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from lightning_sparse import _pictures, duality, mask_rules, penalties, plots
from lightning_sparse.duality import Penalty

EVERY = [
    cls(**example)
    for module in (penalties, mask_rules)
    for name in module.__all__
    if (cls := getattr(module, name)).separable and isinstance(cls.separable, bool)
    for example in cls.examples[:1]
]


def lines(axis: object) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]  # type: ignore[attr-defined]


def test_alpha_and_omega_are_drawn_at_the_given_strength() -> None:
    penalty = penalties.LogSum(eps=2.0)
    omega, _, _, alpha = plots.penalty_curves([penalty], lam=3.0, w_max=2.0).axes
    (w, values) = lines(alpha)[0]
    assert math.isclose(w[-1], 2.0)
    assert math.isclose(values[-1], 1 / (1 + 3.0 / (2.0 * (2.0 + 2.0))))  # eta_hat = w (w + eps)
    assert math.isclose(lines(omega)[0][1][-1], math.log(2.0))


@pytest.mark.slow
@pytest.mark.parametrize("given", EVERY, ids=repr)
def test_every_penalty_and_rule_of_the_catalogue_can_be_drawn(given: Penalty, tmp_path: Path) -> None:
    figure = plots.penalty_curves([given, penalties.LogSum(eps=2.0)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [repr(given), "LogSum(eps=2.0)"]
    drawn = [y for axis in figure.axes for y in lines(axis)[0][1]]
    assert sum(math.isfinite(y) for y in drawn) > len(drawn) / 4


def curves(shown: str) -> list[list[tuple[float, float]]]:
    """Return the points of each line of an SVG, in pixels from its panel's upper left corner."""
    found = ElementTree.fromstring(shown.partition("<br>")[2]).iter("{http://www.w3.org/2000/svg}polyline")
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.get("points", "").split())] for line in found]


def test_a_notebook_shows_omega_and_alpha_of_a_penalty_and_of_its_rule() -> None:
    penalty = penalties.LogSum(eps=2.0)
    for given, lam in ((penalty, 1.0), (duality.to_mask_rule(penalty, 0.5), 0.5)):
        shown = given._repr_html_()
        assert html.escape(repr(given)) in shown
        assert f"omega(w), 0 to {math.log(3):.3g}" in shown  # at w = 4
        assert f"alpha(w) at lam = {lam:g}, 0 to 1" in shown
        omega, alpha = curves(shown)
        wide, tall = omega[-1][0], omega[0][1]  # w = 4 is on the right, omega = 0 below
        for at, line, expected in (
            (1.0, omega, math.log(1.5) / math.log(3)),
            (1.0, alpha, 1 / (1 + lam / 3)),
            (4.0, alpha, 1 / (1 + lam / 24)),
        ):
            (y,) = [y for x, y in line if math.isclose(x, at / 4 * wide)]
            assert math.isclose(1 - y / tall, expected, abs_tol=1e-3)


def test_what_has_no_curve_is_shown_by_its_repr() -> None:
    class Broken(Penalty):
        def omega(self, w: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not yet written")

        eta_hat = omega

    assert penalties.ARD(**penalties.ARD.examples[0])._repr_html_() is None
    assert mask_rules.TopK(0.5)._repr_html_() is None
    assert Broken()._repr_html_() is None  # an error here would hide the object


def test_a_picture_has_gaps_where_a_value_is_not_finite_and_plain_text_for_its_name() -> None:
    shown = _pictures.panels("<b>", [("y", [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, math.inf, 2.0, 1.0], None)])
    assert "<code>&lt;b&gt;</code>" in shown
    assert [len(line) for line in curves(shown)] == [2, 2]
    assert curves(shown)[1][0][1] == 0.0  # the largest finite value is at the top


def test_a_penalty_without_a_curve_is_refused() -> None:
    rule = mask_rules.TopK(**mask_rules.TopK.examples[0])
    with pytest.raises(ValueError, match=r"separable|gradient"):
        plots.penalty_curves([rule])
    with pytest.raises(ValueError, match="at least one penalty"):
        plots.penalty_curves([])
    with pytest.raises(ValueError, match="lam must be a finite number > 0, got 0"):
        plots.penalty_curves([penalties.LogSum(eps=1.0)], lam=0)


def test_the_masks_picture_is_the_zero_pattern() -> None:
    torch.manual_seed(0)
    weights = {"wide": torch.randn(3, 5) * (torch.rand(3, 5) > 0.5), "tall": torch.randn(6, 2), "conv": torch.zeros(2, 3, 2, 2)}
    wide, tall, conv = plots.masks(weights).axes
    assert torch.equal(torch.from_numpy(wide.images[0].get_array().data) != 0, weights["wide"] != 0)
    assert tall.images[0].get_array().shape == (2, 6)
    assert (tall.get_xlabel(), wide.get_xlabel()) == ("output", "input")
    assert conv.get_title() == "conv: 0 of 24 non-zero (100.0 % zeros)"
    with pytest.raises(ValueError, match="no weights"):
        plots.masks({})


def test_the_sparsity_curve_shows_shares_alone_by_epoch() -> None:
    state = {"sparsity/lam": 1e-3, "sparsity/penalty": 7.0, "sparsity/keep_probability": 0.4, "train/loss": 2.0}
    history = [
        {"epoch": 1, "sparsity/total": 0.1, "sparsity/a.weight": 0.1, **state},
        {"epoch": 2, "sparsity/total": 0.4, "sparsity/a.weight": 0.4, **state},
    ]
    (axis,) = plots.sparsity_curve(history).axes
    assert [line.get_label() for line in axis.lines] == ["total", "a.weight"]
    assert lines(axis)[0] == ([1, 2], [0.1, 0.4])
    assert plots.sparsity_curve([]).axes[0].lines[:] == []


def test_a_new_figure_is_not_drawn_as_a_share_of_zeros() -> None:
    history = [{"epoch": 1, "sparsity/total": 0.1, "sparsity/weight": 0.1, "sparsity/a.weight": 0.3, "sparsity/target": 0.9}]
    history[0] |= {"sparsity/groups": 0.5, "sparsity/groups/a.weight": 0.7, "sparsity/groups/weight": 0.7}
    labels = [[line.get_label() for line in plots.sparsity_curve(history, names).axes[0].lines] for names in (None, ["weight", "a.weight"])]
    assert labels == [["total", "a.weight"], ["total", "weight", "a.weight"]]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plots.masks({"w": torch.eye(3)})
    path = plots.save(figure, tmp_path / "new" / "mask.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    before = path.read_bytes()
    monkeypatch.setattr(figure, "savefig", _half_written)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["mask.png"]
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plots.save(figure, tmp_path / "mask.jpg")


def _half_written(path: Path, **_: object) -> None:
    path.write_bytes(b"half")
    raise OSError("disk full")


def test_drawing_leaves_no_global_figure() -> None:
    import matplotlib._pylab_helpers as pylab

    plots.penalty_curves([penalties.LogSum(eps=1.0)])
    assert pylab.Gcf.figs == {}


def test_the_dual_panel_is_the_dual() -> None:
    penalty = penalties.MCP(c=0.7)
    eta, values = lines(plots.penalty_curves([penalty]).axes[2])[0]
    at = len(eta) // 2
    assert duality.gap(penalty, torch.tensor([0.3], dtype=torch.float64), torch.tensor([eta[at]], dtype=torch.float64)) >= 0
    assert math.isclose(values[at], 0.7 * eta[at] / (eta[at] + 0.7))


@pytest.mark.parametrize("draw", [lambda: plots.masks({"w": torch.eye(3)}), lambda: plots.penalty_curves([penalties.L1()])])
def test_a_notebook_shows_a_picture_by_itself(draw) -> None:
    assert draw()._repr_png_().startswith(b"\x89PNG")  # IPython asks for it; matplotlib's Figure has none
