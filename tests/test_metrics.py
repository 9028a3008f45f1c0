"""Counts, metrics and the sampled duality gap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_sparse import counts, masked_loss, metrics, noise
from lightning_sparse.penalties import LogSum


def test_zeros_are_counted_exactly_where_float32_sums_would_not() -> None:
    weight = torch.zeros(2**24 + 3, dtype=torch.uint8)
    weight[:2] = 1
    assert counts.count_zeros({"w": weight}) == {"w": (2**24 + 1, 2**24 + 3)}


def test_minus_zero_is_a_zero_and_nan_is_not() -> None:
    assert counts.count_zeros({"w": torch.tensor([-0.0, 0.0, math.nan, 1e-45])}) == {"w": (2, 4)}


def test_tied_weights_count_once_also_through_a_transpose() -> None:
    encoder, decoder = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
    decoder.weight = nn.Parameter(encoder.weight.data.t())
    head = nn.Linear(2, 2, bias=False)
    named = {"encoder": encoder.weight, "decoder": decoder.weight, "head": head.weight, "again": encoder.weight}
    assert list(counts.count_zeros(named)) == ["encoder", "head"]


def test_parts_of_one_buffer_are_different_weights() -> None:
    buffer = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert counts.count_zeros({"left": buffer[:2], "right": buffer[2:]}) == {"left": (1, 2), "right": (2, 2)}


def test_empty_tensors_are_neither_tied_nor_divided_by() -> None:
    found = counts.count_zeros({"a": torch.zeros(0), "b": torch.zeros(0)})
    assert found == {"a": (0, 0), "b": (0, 0)}
    assert counts.figures(found) == {"sparsity/total": 0.0, "sparsity/a": 0.0, "sparsity/b": 0.0}


def test_a_threshold_not_yet_applied_counts_by_its_mask() -> None:
    weights = {"a": torch.tensor([1.0, 2.0, 3.0])}
    assert counts.count_zeros(weights, {"a": torch.tensor([True, False, True])}) == {"a": (2, 3)}


def test_the_total_weighs_layers_by_their_size() -> None:
    found = counts.figures({"small": (1, 1), "large": (0, 99)})
    assert found == {"sparsity/total": 0.01, "sparsity/small": 1.0, "sparsity/large": 0.0}


def test_layers_carry_the_same_counts_and_the_mean_of_alpha() -> None:
    weights = {"a": torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "b": torch.ones(3)}
    first, second = counts.layers(weights, {"a": torch.tensor([[0.0, 1.0], [0.5, 0.5]])})
    assert first == counts.Layer("a", (2, 2), 4, 1, 0.75, 0.5)
    assert (second.sparsity, second.keep_probability) == (0.0, None)


def test_histogram_bins_agree_with_torch_histogram() -> None:
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = counts.histogram([values[:4000], values[4000:]], 0.0, 1.0, 32)
    reference = torch.histogram(values, 32, range=(0.0, 1.0))
    assert ours.counts == reference.hist.long().tolist()
    assert ours.edges == pytest.approx(reference.bin_edges.tolist())


def test_alpha_zero_lies_at_the_floor_one_in_the_last_bin_and_nan_in_none() -> None:
    found = counts.log_alpha_histogram([torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1e-30, math.nan])], bins=4)
    assert found.counts == [3, 0, 0, 1]
    assert (found.edges[0], found.edges[-1]) == (counts.LOG_ALPHA_FLOOR, 0.0)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [math.inf, -math.inf, math.nan], [1e-45], [3e38, -3e38]])
def test_magnitude_histogram_takes_any_weights(values: list[float]) -> None:
    found = counts.magnitude_histogram([torch.tensor(values)])
    assert sum(found.counts) == sum(math.isfinite(value) for value in values)
    assert all(low < high for low, high in zip(found.edges, found.edges[1:], strict=False))


def test_a_pruned_weight_is_counted_as_used_in_the_forward() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    prune.custom_from_mask(model[0], "weight", torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    name, value = counts.weight_in_use(model, "0.weight_orig")
    assert (name, counts.count_zeros({name: value})) == ("0.weight", {"0.weight": (3, 4)})
    assert counts.weight_in_use(model, "0.weight")[0] == "0.weight"


def test_a_parametrised_weight_is_counted_as_used_in_the_forward() -> None:
    class Relu(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.relu()

    model = nn.Sequential(nn.Linear(2, 1))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Relu())
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.tensor([[-1.0, 1.0]]))
    name, value = counts.weight_in_use(model, "0.parametrizations.weight.original")
    assert (name, value.tolist()) == ("0.weight", [[0.0, 1.0]])


def test_sparsity_is_a_share_of_all_weights_given() -> None:
    metric = metrics.Sparsity()
    metric.update({"a": torch.tensor([0.0, 1.0]), "b": torch.zeros(2)})
    assert metric.compute().item() == 0.75
    metric.update({"a": torch.ones(2), "b": torch.ones(2)})  # the same weights again: the mean of both
    assert metric.compute().item() == 0.375


def test_sparsity_per_parameter_names_every_weight() -> None:
    metric = metrics.Sparsity(per_parameter=True)
    values = metric({"a": torch.tensor([0.0, 1.0]), "b": torch.zeros(2)})
    assert {name: value.item() for name, value in values.items()} == {"total": 0.75, "a": 0.5, "b": 1.0}
    again = metric({"a": torch.ones(2), "b": torch.zeros(2)})  # forward returns this call's figures, compute those of all calls
    assert (again["total"].item(), metric.compute()["total"].item()) == (0.5, 0.625)


def test_sparsity_starts_afresh_after_reset_and_refuses_other_weights_before() -> None:
    metric = metrics.Sparsity()
    metric.update([torch.zeros(2)])
    with pytest.raises(ValueError, match="reset"):
        metric.update({"other": torch.zeros(2)})
    metric.reset()
    metric.update({"other": torch.ones(3)})
    assert metric.compute().item() == 0.0


def test_one_tensor_is_one_weight_not_its_rows() -> None:
    metric = metrics.Sparsity(per_parameter=True)
    metric.update(torch.zeros(2, 3))
    assert list(metric.compute()) == ["total", "0"]


def test_a_module_instead_of_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        metrics.Sparsity().update({"layer": nn.Linear(2, 2)})  # type: ignore[dict-item]


def test_compression_is_all_over_nonzero() -> None:
    metric = metrics.Compression()
    metric.update([torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.zeros(4)])
    assert metric.compute().item() == 8.0
    metric.reset()
    metric.update(torch.zeros(4))
    assert metric.compute().item() == math.inf


def test_keep_probability_weighs_elements_not_tensors() -> None:
    metric = metrics.KeepProbability()
    metric.update([torch.ones(3), torch.zeros(1)])
    assert metric.compute().item() == 0.75
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric.update(torch.tensor([1.5]))


def test_duality_gap_metric_is_the_mean_of_its_values() -> None:
    metric = metrics.DualityGap()
    metric.update(1.0)
    metric.update(torch.tensor([2.0, 6.0]))
    assert metric.compute().item() == 3.0


ALL = [
    (metrics.Sparsity, {"a": torch.tensor([0.0, 1.0])}),
    (metrics.Compression, {"a": torch.tensor([0.0, 1.0])}),
    (metrics.KeepProbability, [torch.tensor([0.25])]),
    (metrics.DualityGap, 0.5),
]


@pytest.mark.parametrize(("kind", "given"), ALL)
def test_ranks_that_hold_the_same_weights_agree_with_one_rank_alone(kind: type, given: object) -> None:
    alone, together = kind(), kind(dist_sync_fn=lambda state, group: [state, state], distributed_available_fn=lambda: True)
    alone.update(given)
    together.update(given)
    assert together.compute() == alone.compute()


def test_ranks_that_hold_parts_of_the_weights_agree_with_the_whole() -> None:
    other = {"zeros": torch.tensor([3]), "sizes": torch.tensor([6])}
    metric = metrics.Sparsity(distributed_available_fn=lambda: True)
    metric.dist_sync_fn = lambda state, group: [state, other["zeros"] if torch.equal(state, metric.zeros) else other["sizes"]]
    metric.update({"w": torch.tensor([0.0, 1.0])})
    assert metric.compute().item() == 4 / 8


@pytest.mark.parametrize(("kind", "given"), [*ALL, (lambda: metrics.Sparsity(per_parameter=True), ALL[0][1])])
def test_plot_draws_what_compute_gives(kind: type, given: object) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = kind()
    metric.update(given)
    figure, axes = metric.plot()
    now = metric.compute()
    drawn = [float(line.get_ydata()[0]) for line in axes.lines]
    assert [pytest.approx(float(v)) for v in (now.values() if isinstance(now, dict) else [now])] == drawn
    _, over_time = metric.plot([now, now])
    assert len(over_time.lines[0].get_ydata()) == 2
    pyplot.close("all")
    assert figure is not None


@dataclass(frozen=True)
class Antithetic(noise.Noise):
    """Draw 1 + sd and 1 - sd in turn, so that two draws have exactly mean 1 and the right variance."""

    signs: list[float]

    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.signs.append(-self.signs[-1])
        return 1 + self.signs[-1] * noise.variance(alpha).sqrt()


def _quadratic(weights: dict[str, Tensor]) -> Tensor:
    return ((weights["w"] - torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)) ** 2).sum() / 2


def test_gap_vanishes_at_unit_curvature() -> None:
    w = {"w": torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)}
    gaps = masked_loss.duality_gap_samples(_quadratic, w, LogSum(0.5), 0.1, Antithetic([1.0]), samples=2)
    assert gaps.abs().max() > 1e-3  # each draw is off,
    assert masked_loss.duality_gap(_quadratic, w, LogSum(0.5), 0.1, Antithetic([1.0]), samples=2) == pytest.approx(0, abs=1e-12)


def test_gap_shows_curvature_that_is_not_one_and_calibration_takes_it_away() -> None:
    penalty, lam = LogSum(0.5), 0.1
    w = {"w": torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)}

    def steep(weights: dict[str, Tensor]) -> Tensor:
        return 3 * _quadratic(weights)

    expected = (3 - 1) * lam / 2 * (w["w"].abs() / (w["w"].abs() + 0.5)).sum()
    gap = masked_loss.duality_gap(steep, w, penalty, lam, Antithetic([1.0]), samples=2)
    assert gap == pytest.approx(float(expected), rel=1e-12)
    calibrated = {"w": 1 / (1 + lam / (3 * penalty.eta_hat(w["w"])))}
    assert masked_loss.duality_gap(steep, w, penalty, lam, Antithetic([1.0]), 2, keep=calibrated) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_gap_of_bernoulli_masks_is_small_within_its_own_error_and_repeats_with_the_generator() -> None:
    w = {"w": torch.tensor([0.5, -1.5, 0.0], dtype=torch.float64)}
    runs = [
        masked_loss.duality_gap_samples(_quadratic, w, LogSum(0.5), 0.1, noise.ScaledBernoulli(), 4000, torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert abs(runs[0].mean()) < 4 * runs[0].std() / len(runs[0]) ** 0.5
    assert w["w"].tolist() == [0.5, -1.5, 0.0]


@pytest.mark.parametrize(("lam", "samples"), [(0.0, 1), (1.0, 0)])
def test_gap_refuses_what_cannot_be_sampled(lam: float, samples: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        masked_loss.duality_gap(_quadratic, {"w": torch.ones(3)}, LogSum(1.0), lam, noise.ScaledBernoulli(), samples)
