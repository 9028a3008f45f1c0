"""Bytes per selected weight of each callback, as documented."""

from __future__ import annotations

import pytest
from subjects import LOG_SUM, penalty, prox

from lightning_sparse import conformance, noise
from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.conformance import Subject, memory

pytestmark = pytest.mark.slow


def bernoulli(**options):
    return lambda: [AdaptiveMask(LOG_SUM, 0.5, noise=noise.ScaledBernoulli(), **options)]


# callback, bytes between batches, bytes from batch start to backward
HELD = {
    "penalty": (penalty, 0, 0),
    "prox": (prox, 0, 0),
    "Bernoulli": (bernoulli(curvature=None), 0, 8),
    "Bernoulli, with curvature": (bernoulli(), 4, 12),
}


@pytest.mark.parametrize(("make", "between", "within"), HELD.values(), ids=HELD.keys())
def test_extra_bytes_per_weight(make, between, within):
    with conformance.undisturbed():
        found = memory.extra_bytes(Subject("one", make))
    assert len(found["between"]) == len(found["within"]) == 6
    assert max(found["between"]) == pytest.approx(between, abs=0.02)
    assert max(found["within"]) == pytest.approx(within, abs=0.02)


def test_held_memory_is_measured():
    from test_check_callback import Hoards

    with conformance.undisturbed():
        found = memory.extra_bytes(Subject("hoards", lambda: [Hoards()]))
    assert found["between"] == pytest.approx([4 * step for step in range(2, 8)], abs=0.02)
