"""Properties of elementwise functions on any weights: all bit patterns, denormals, -0.0, inf, NaN, empty and 0-d tensors.

Two properties hold everywhere: unchanged values keep their bits, and NaN neither becomes zero nor spreads.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sparse import counts, curvature, duality, elementwise, mask_rules, noise, penalties, proximal
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.elementwise import engine
from lightning_sparse.methods.proximal import reweighted_step
from lightning_sparse.numeric import scalar_div
from lightning_sparse.weights import Attachment

pytestmark = pytest.mark.slow
BITS = st.integers(-(2**31), 2**31 - 1)
# 0, -0.0, the smallest denormals, inf, -inf, NaN with payloads (a signalling one too), the largest and the smallest normal
PATTERNS = [0, -(2**31), 1, -(2**31) + 1, 0x7F800000, -0x800000, 0x7FC00001, -0x3FFFFF, 0x7F800001, 0x7F7FFFFF, 0x00800000]
EVERY = torch.tensor(PATTERNS, dtype=torch.int32).view(torch.float32)
quick = settings(max_examples=30, deadline=None, database=None)
ROWS = [getattr(penalties, name)(**kwargs) for name in penalties.__all__ for kwargs in getattr(penalties, name).examples[:1]]
SEPARABLE = [row for row in ROWS if row.separable] + [penalties.Lp(0.5), mask_rules.Standout().to_penalty()]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.int32)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Draw float32 tensors of any bit pattern in a few shapes, including an empty one and a scalar."""
    shape = draw(st.sampled_from([(), (0,), (0, 3), (1,), (5,), (2, 3)]))
    values = draw(st.lists(st.one_of(BITS, st.sampled_from(PATTERNS)), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.int32).view(torch.float32).reshape(shape).clone()


class Holder(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())


@quick
@example(w=EVERY, mask=torch.tensor(0.0), shown=torch.tensor(1.0))
@given(w=weights(), mask=weights(), shown=weights())
def test_attached_weights_come_back_bit_for_bit(w: Tensor, mask: Tensor, shown: Tensor) -> None:
    module = Holder(w)
    fill = mask.reshape(-1)[0] if mask.numel() else torch.tensor(0.0)
    view = torch.full_like(w, float(shown.reshape(-1)[0]) if shown.numel() else 0.0)
    attachment = Attachment(module, {"w": module.w}, lambda name: view)
    for step in ("multiply", "multiply", "show", "multiply", "restore", "show", "restore"):
        if step == "multiply":
            attachment.multiply("w", torch.full_like(w, float(fill)))
        else:
            getattr(attachment, step)()
        assert torch.equal(bits(attachment.live("w")), bits(w))
        assert torch.equal(bits(module.state_dict()["w"]), bits(view))
        if step == "restore":
            assert torch.equal(bits(module.w), bits(w))
    attachment.show()
    assert torch.equal(bits(module.w), bits(view))
    attachment.detach()
    assert torch.equal(bits(module.w), bits(w))
    assert torch.equal(bits(module.state_dict()["w"]), bits(w))


FORMS = [
    ReweightedPenalty(penalties.LogSum(2.0), 0.5, threshold=1e-3),
    AdaptiveProx(penalties.HardThreshold(0.5), 0.5, exact=True),
    AdaptiveMask(penalties.LogSum(2.0), 0.5, curvature=None),
    AdaptiveMask(mask_rules.TopK(0.5)),
    AdaptiveMask(mask_rules.TargetedDropout(0.5, 0.5), threshold=0.1),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{type(form).__name__} {form.given}")
@quick
@example(w=EVERY)
@given(w=weights())
def test_the_thresholded_view_zeroes_what_counts_as_zero_and_keeps_the_other_bits(form: ReweightedPenalty, w: Tensor) -> None:
    form.weights.parameters = {"w": nn.Parameter(w.clone())}
    zeros, shown = form.zeros("w"), form.thresholded("w")
    assert shown.shape == zeros.shape == w.shape
    assert not (zeros & w.isnan()).any()
    assert zeros[w == 0].all()
    assert torch.equal(bits(shown)[~zeros.reshape(-1)], bits(w)[~zeros.reshape(-1)])
    assert not bits(shown)[zeros.reshape(-1)].any()
    assert counts.count_zeros({"w": shown}) == {"w": (int(zeros.sum()), w.numel())}


@pytest.mark.parametrize("penalty", SEPARABLE, ids=repr)
@quick
@example(w=EVERY, rho=0.1, lam=0.5, each=False)
@example(w=torch.tensor([-9.9607e36]), rho=1.0, lam=1.0, each=False)
@given(w=weights(), rho=st.floats(1e-6, 10), lam=st.floats(1e-6, 10), each=st.booleans())
def test_proximal_steps_shrink_and_keep_nan_inf_and_zero(penalty: penalties.L1, w: Tensor, rho: float, lam: float, each: bool) -> None:
    rate = torch.full_like(w, rho) if each else rho
    in_place = w.clone()
    reweighted_step(penalty, in_place, rate * lam, out=in_place)
    for moved in (reweighted_step(penalty, w, rate * lam), in_place, penalty.prox(w, rate * lam)):
        assert (moved.shape, moved.dtype) == (w.shape, w.dtype)
        assert torch.equal(moved.isnan(), w.isnan())
        assert (moved[w == 0] == 0).all()
        finite = w[w.isfinite()].abs()
        assert (moved[w.isfinite()].abs() <= finite * (1 + 2 * torch.finfo(w.dtype).eps)).all()  # t * prox(w / t) of Scaled rounds twice
        assert (moved * w.sign())[~w.isnan()].ge(0).all()
    if w.numel():  # because a group without weights has no step size
        rests = proximal.in_zero_region(penalty, w, rate, lam, 10.0)
        assert not (rests & (w.isnan() | w.isinf())).any()
        assert rests[w == 0].all()


def test_live_weights_wait_in_their_own_memory_while_others_take_their_place() -> None:
    layer = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    w, place, order = layer.weight.detach().clone(), layer.weight.data_ptr(), layer.weight.stride()
    attachment = Attachment(layer, {"weight": layer.weight}, lambda name: attachment.live(name))
    for value in (torch.ones(w.shape, dtype=torch.float64), torch.full_like(w, 2.0)):  # of another dtype and memory order, and equal
        attachment.substitute("weight", value)
        assert (layer.weight.dtype, layer.weight.stride()) == (w.dtype, order)
        assert torch.equal(layer.weight, value.to(w.dtype))
        assert torch.equal(attachment.live("weight"), w)
    attachment.restore()
    assert (layer.weight.data_ptr(), layer.weight.stride()) == (place, order)
    assert torch.equal(layer.weight, w)


@pytest.mark.parametrize("kind", [noise.ScaledBernoulli(), noise.Gaussian()])
@quick
@given(alpha=st.lists(st.sampled_from([0.0, 1e-45, 1e-30, 1e-3, 0.5, 1.0, float("nan")]), max_size=6), seed=st.integers(0, 99))
def test_masks_are_nan_where_alpha_is_and_nowhere_else(kind: noise.Noise, alpha: list[float], seed: int) -> None:
    given = torch.tensor(alpha)
    mask = kind.sample(given, torch.Generator().manual_seed(seed))
    assert torch.equal(mask.isnan(), given.isnan())
    assert (mask[given == 0] == 0).all()
    assert (mask[given == 1] == 1).all()


@quick
@example(w=EVERY)
@given(w=weights())
def test_nan_does_not_count_as_zero(w: Tensor) -> None:
    expected = sum(1 for value in w.reshape(-1).tolist() if value == 0)
    assert counts.count_zeros({"w": w}) == {"w": (expected, w.numel())}
    assert counts.figures({"w": (expected, w.numel())})["sparsity/total"] == (expected / w.numel() if w.numel() else 0.0)
    histogram = counts.magnitude_histogram([w])
    assert sum(histogram.counts) == sum(1 for value in w.reshape(-1).tolist() if math.isfinite(value))


@quick
@given(
    eta=st.lists(st.sampled_from([0.0, 1e-45, 1.0, 3e38, float("inf")]), min_size=1, max_size=5),
    h=st.sampled_from([0.0, 1e-45, 1e-12, 1.0, 1e38]),
    lam=st.floats(1e-8, 1e3),
    ceiling=st.floats(1e-3, 1e3),
)
def test_calibration_makes_no_nan_and_bounds_the_strength(eta: list[float], h: float, lam: float, ceiling: float) -> None:
    value = curvature.calibrated(torch.tensor(eta), torch.full((len(eta),), h), lam, ceiling)
    assert not value.isnan().any()
    assert (value >= torch.tensor(eta) * (lam / ceiling) * (1 - 1e-5)).all()


@quick
@given(w=weights(), other=weights(), nan_only=st.booleans())
def test_nonfinite_values_are_found_everywhere_without_false_alarms(w: Tensor, other: Tensor, nan_only: bool) -> None:
    expected = {}
    for name, tensor in (("w", w), ("other", other)):
        values = tensor.reshape(-1).tolist()
        found = sum(map(math.isnan, values)), sum(map(math.isinf, values))
        if found[0] or (found[1] and not nan_only):
            expected[name] = found
    assert elementwise.count_nonfinite({"w": w, "other": other}, nan_only) == expected


@quick
@given(w=weights(), other=weights(), nan_only=st.booleans())
def test_gradients_are_in_doubt_unless_they_are_finite_and_keep_their_bits(w: Tensor, other: Tensor, nan_only: bool) -> None:
    gradients, before = {"w": w, "other": other}, {"w": w.clone(), "other": other.clone()}
    doubtful = elementwise.maybe_nonfinite(gradients)
    assert elementwise.count_nonfinite(doubtful, nan_only) == elementwise.count_nonfinite(before, nan_only)
    assert bool(doubtful) is not all(bool(tensor.isfinite().all()) for tensor in before.values())
    assert all(torch.equal(bits(gradients[name]), bits(tensor)) for name, tensor in before.items())


@pytest.mark.parametrize("turned", [False, True])
def test_zeros_are_held_in_weights_of_any_size_and_layout(turned: bool) -> None:
    w, kept = torch.arange(1.0, 1026 * 1025 + 1).reshape(1026, 1025), torch.arange(1026 * 1025).reshape(1026, 1025) % 3 == 0
    held, mask = w.clone(), kept.t().contiguous().t() if turned else kept
    elementwise.apply_mask_(held, mask)
    assert torch.equal(held, torch.where(kept, w, 0.0))
    many, marks = [w.clone(), w[:7, :5].clone(), nn.Parameter(w[:2].double())], [mask, kept[:7, :5], kept[:2]]
    elementwise.apply_masks_(zip(many, marks, strict=True))
    assert all(
        torch.equal(one, torch.where(mark, w[: len(one), : one.shape[1]].to(one), 0.0)) for one, mark in zip(many, marks, strict=True)
    )


HARD = {
    "sparse": lambda: torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2), check_invariants=True),
    "large": lambda: torch.ones(engine.SUMMED + 1),
    "expanded": lambda: torch.ones(1).expand(5),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", HARD)
def test_gradients_that_one_call_cannot_look_at_stay_in_doubt(kind: str) -> None:
    found = elementwise.maybe_nonfinite({"easy": torch.ones(3), "hard": HARD[kind]()})
    assert found.keys() - {"easy"} == {"hard"}
    assert elementwise.maybe_nonfinite({"one": torch.ones(3), "other": torch.ones(2, 2).double()}) == {}


def test_an_overflowing_sum_is_no_error_and_sparse_gradients_are_checked() -> None:
    large = torch.full((4,), 3e38)
    assert elementwise.count_nonfinite({"large": large, "half": torch.full((9,), 6e4, dtype=torch.float16)}) == {}
    rows = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[float("nan"), 1.0]]), (3, 2), check_invariants=True)
    assert elementwise.count_nonfinite({"rows": rows, "none": torch.zeros(0)}) == {"rows": (1, 0)}
    wide = torch.full((2,), 8e307, dtype=torch.float64)
    assert elementwise.count_nonfinite({"one": wide, "other": wide}) == {}
    inf = torch.tensor([1.0, float("inf")])
    assert elementwise.count_nonfinite({"up": inf, "down": -inf}) == {"up": (0, 1), "down": (0, 1)}  # because their sum is NaN


@pytest.mark.parametrize("eta", [torch.tensor(1.0), torch.tensor([1.0, 3.0]), torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).double()])
def test_a_number_over_a_tensor_keeps_its_type(eta: Tensor) -> None:
    assert scalar_div(0.3, eta).dtype == eta.dtype == duality.keep_probability(eta, 0.3).dtype
    torch.testing.assert_close(scalar_div(0.3, eta), 0.3 / eta)
    assert scalar_div(0.3, torch.tensor([3])).dtype == torch.float32
    with torch.device("meta"):
        torch.testing.assert_close(scalar_div(0.3, eta), 0.3 / eta)


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | weights() | st.just(torch.ones(3) > 0),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["w", "class_path", "init_args", "mean", "weight"]), inner),
    max_leaves=4,
)
STATE = {"step": 3, "offset": 0, "frozen": False, "taken": {"w": torch.ones(2)}, "seed": 1, "draws": 2}
ENTRIES = [*STATE, "begun", "averaged", "held", "recipe", "curvature", "ascent"]


@quick
@given(entry=st.sampled_from(ENTRIES), value=GARBAGE, whole=st.booleans())
def test_an_arbitrary_state_is_accepted_or_refused_with_a_clear_error(entry: str, value: object, whole: bool) -> None:
    form = AdaptiveMask(penalties.LogSum(2.0), 0.5)
    form.weights.parameters = {"w": nn.Parameter(torch.ones(2, 3))}
    try:
        form.check_state(value if whole else STATE | {entry: value})
    except ValueError as error:
        assert "the checkpoint's" in str(error)  # noqa: PT017 - either is right
    else:
        assert not whole or isinstance(value, dict)
    form.check_state(STATE)
