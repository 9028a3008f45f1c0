"""Factories of every callback, noise and curvature, for tests that run over all of them."""

from __future__ import annotations

from functools import partial

import pytest
from toys import several

from lightning_sparse import curvature, mask_rules, noise, penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    PenaltyLoss,
    ReweightedPenalty,
    VariationalDropout,
)

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.5),
    "frozen": partial(ReweightedPenalty, LOG_SUM, 0.5, freeze=0.9),
    "prox": partial(AdaptiveProx, LOG_SUM, 0.2),
    "exact prox": partial(AdaptiveProx, LOG_SUM, 0.2, exact=True),
    "mask": partial(AdaptiveMask, LOG_SUM, 0.5),
    "mask, Bernoulli": partial(AdaptiveMask, LOG_SUM, 0.5, noise=noise.ScaledBernoulli(), curvature=None),
    "mask, each step": partial(AdaptiveMask, LOG_SUM, 0.5, curvature=curvature.EmpiricalFisher(every=1)),
    "mask, top-k": partial(AdaptiveMask, mask_rules.TopK(0.5)),
    "mask, sampled": partial(AdaptiveMask, LOG_SUM, 0.5, curvature=curvature.SampledFisher(output="network", every=1)),
    "loss": partial(PenaltyLoss, LOG_SUM, 0.5),
    "joint": partial(EtaTrick, LOG_SUM, 0.3, tol=0.3, learned_lr=0.4, keep_start=0.303),
    "VarDrop": partial(VariationalDropout, 0.1, noise="weight", log_start=2.93, learned_lr=0.3),
    "VarDrop, local": partial(VariationalDropout, 0.1, "molchanov", noise="local", log_start=2.94, learned_lr=0.3),
    "VarDrop, additive": partial(VariationalDropout, 0.02, "empirical_bayes", log_start=-1.0, learned_lr=0.05),
    "L0": partial(HardConcrete, 0.03, tol=0.5, log_start=-0.578, learned_lr=0.3),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
one_of_each_kind = several(FORMS, "penalty", "prox", "mask", "L0")  # the others are marked slow
each_kind = pytest.mark.parametrize("form", one_of_each_kind)
