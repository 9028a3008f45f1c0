"""Properties of every separable penalty on arbitrary weights: finite floats, 0-d, empty, inf, denormals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sparse import duality, mask_rules, penalties
from lightning_sparse.duality import Penalty

ROWS = [getattr(penalties, name)(**kwargs) for name in penalties.__all__ for kwargs in getattr(penalties, name).examples[:1]]
ROWS += [
    getattr(mask_rules, name)(**kwargs).to_penalty() for name in mask_rules.__all__ for kwargs in getattr(mask_rules, name).examples[:1]
]
SEPARABLE = [row for row in ROWS if row.separable]
floats = st.floats(allow_nan=False, width=32)


@pytest.mark.parametrize("penalty", SEPARABLE, ids=repr)
@settings(max_examples=40, deadline=None, database=None)
@given(values=st.lists(floats, max_size=6), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_anywhere(penalty: Penalty, values: list[float], dtype: torch.dtype) -> None:
    w = torch.tensor(values, dtype=dtype)
    omega, eta, pull = penalty.omega(w), penalty.eta_hat(w), penalty.gradient(w)
    for value in (omega, eta, pull, penalty.dual(w.abs())):
        assert value.shape == w.shape
        assert value.dtype == dtype
        assert not value.isnan().any()
    assert (omega >= 0).all()
    assert (eta >= 0).all()
    assert (pull * w.sign() >= 0).all()
    alpha = duality.keep_probability(eta, 1e-3)
    assert ((alpha >= 0) & (alpha <= 1)).all()


@pytest.mark.parametrize("penalty", SEPARABLE, ids=repr)
@settings(max_examples=40, deadline=None, database=None)
@given(one=st.floats(0, 1e4), other=st.floats(0, 1e4), log_eta=st.floats(-20, 20))
def test_monotone_and_below_its_bound(penalty: Penalty, one: float, other: float, log_eta: float) -> None:
    w = torch.tensor(sorted([one, other]), dtype=torch.float64)
    omega, eta = penalty.omega(w), penalty.eta_hat(w)
    assert omega[0] <= omega[1] * (1 + 1e-6)
    assert eta[0] <= eta[1] * (1 + 1e-6)
    gap = duality.gap(penalty, w, torch.full_like(w, log_eta).exp())
    assert (gap >= -1e-6 * omega - 1e-12).all()


@pytest.mark.parametrize("penalty", SEPARABLE, ids=repr)
def test_a_scalar_tensor_and_an_empty_one(penalty: Penalty) -> None:
    assert penalty.omega(torch.tensor(0.3)).shape == ()
    assert penalty.prox(torch.tensor(0.3), 0.1).shape == ()
    assert penalty.omega(torch.zeros(0, 3)).shape == (0, 3)
    assert penalty.prox(torch.zeros(0, 3), 0.1).shape == (0, 3)


@pytest.mark.parametrize("penalty", SEPARABLE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_is_never_taken_for_a_zero(penalty: Penalty, dtype: torch.dtype) -> None:
    w = torch.tensor([float("nan"), -float("nan"), 0.5], dtype=dtype)
    for step in (1e-3, 0.3, torch.full_like(w, 0.3)):
        assert penalty.prox(w, step).isnan().tolist() == [True, True, False]
    assert not (duality.keep_probability(penalty.eta_hat(w), 0.5)[:2] < 0.5).any()


def test_nan_ranks_first() -> None:
    w = torch.tensor([3.0, float("nan"), 1.0, float("inf"), 2.0])
    assert mask_rules.TopK(0.4).kept(w).tolist() == [False, True, False, True, False]
    assert mask_rules.TopK(0.6).kept(w).tolist() == [True, True, False, True, False]
