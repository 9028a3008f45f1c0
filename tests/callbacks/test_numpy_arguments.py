"""Callbacks with numpy numbers as arguments: safe files, resumes, recipes and state keys as with Python numbers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from toys import Toy, data, several, trainer

from lightning_sparse import curvature, noise, penalties, schedules
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    ReweightedPenalty,
    SparseCheckpoint,
    SparsityMonitor,
    VariationalDropout,
)

F, N, B, S = np.float32, np.int64, np.bool_, np.str_
LOG_SUM = partial(penalties.LogSum, F(2))
FORMS = {
    "penalty": lambda: ReweightedPenalty(
        LOG_SUM(),
        F(0.5),
        select=[S("*"), S("!network.2.*")],
        tol=F(0.0625),
        freeze=F(0.25),
        threshold=F(0),
        gap_samples=N(2),
        keep_zeros=B(False),
    ),
    "target": lambda: ReweightedPenalty(LOG_SUM(), target_sparsity=np.linspace(0.5, 0.9, 5)[2], freeze=F(0.25)),
    "schedule": lambda: ReweightedPenalty(LOG_SUM(), schedules.LinearWarmup(np.float64(0.5), F(0.5))),
    "0-d tensor": lambda: ReweightedPenalty(LOG_SUM(), torch.tensor(0.5)),
    "mask": lambda: AdaptiveMask(
        LOG_SUM(), F(0.5), noise=noise.Gaussian(B(True), F(0.5)), curvature=curvature.EmpiricalFisher(F(0.5), N(2), N(4)), ceiling=N(10)
    ),
    "prox": lambda: AdaptiveProx(LOG_SUM(), F(0.25), metric=S("plain"), exact=B(True)),
    "joint": lambda: EtaTrick(LOG_SUM(), F(0.25), learned_lr=F(0.5), keep_start=F(0.25)),
    "learned": lambda: VariationalDropout(F(0.125), S("molchanov"), noise=S("weight"), learned_lr=F(0.25), log_start=N(2)),
    "gates": lambda: HardConcrete(F(0.0625), beta=F(0.5), learned_lr=torch.tensor(0.25), log_start=N(0)),
    "pruning": lambda: MagnitudePruning(F(0.5), end=F(0.5), every=N(2), scope=S("layer")),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # records of the run
@pytest.mark.parametrize("make", several(FORMS, "gates", "target"))
def test_the_file_loads_safely_and_resumes(make, tmp_path):
    epochs = 8 if make is FORMS["target"] else 2
    run = trainer(make(), epochs=epochs)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    trainer(make(), epochs=epochs).fit(Toy(), data(), ckpt_path=tmp_path / "end.ckpt")


def test_the_recipe_equals_that_with_python_numbers():
    given = ReweightedPenalty(LOG_SUM(), F(0.5), select=[S("a")], keep_zeros=B(True), gap_samples=N(3)).recipe()
    assert repr(given) == repr(ReweightedPenalty(penalties.LogSum(2.0), 0.5, select=["a"], keep_zeros=True, gap_samples=3).recipe())


def test_an_attribute_that_is_set_later_is_checked_and_stays_out_of_the_file():
    callback = ReweightedPenalty(LOG_SUM(), 0.5)
    callback.tol = np.float64(0.1)
    assert type(callback.recipe()["init_args"]["tol"]) is float
    with pytest.raises(ValueError, match="tol must lie in"):
        callback.tol = 1.5
    with pytest.raises(AttributeError, match="target_sparsity"):
        callback.target_sparsity = 0.9
    assert callback.recipe()["init_args"]["tol"] == 0.1


def test_a_users_arguments_become_python_types():
    class Twice(ReweightedPenalty):
        def __init__(self, penalty, lam, factor=2):
            super().__init__(penalty, lam)
            self.factor = factor

        def own_settings(self):
            return {"factor": self.factor}

    assert type(Twice(LOG_SUM(), F(1), np.int16(3)).recipe()["init_args"]["factor"]) is int


def test_keys_of_states_are_the_same():
    assert SparsityMonitor([S("a")], N(2)).state_key == SparsityMonitor(["a"], 2).state_key
    assert SparseCheckpoint(F(0.5), every_n_epochs=N(2)).state_key == SparseCheckpoint(0.5, every_n_epochs=2).state_key
    assert ReweightedPenalty(LOG_SUM(), 1.0, select=(S("a"),)).state_key == ReweightedPenalty(LOG_SUM(), 1.0, select=["a"]).state_key


def test_non_numbers_are_still_refused():
    with pytest.raises(TypeError, match="lam must be a number"):
        ReweightedPenalty(LOG_SUM(), np.ones(2))
    with pytest.raises(ValueError, match="every_n_epochs must be a whole number"):
        SparsityMonitor(every_n_epochs=np.float64(1.5))
    with pytest.raises(TypeError, match="keep_zeros must be True or False"):
        ReweightedPenalty(LOG_SUM(), 1.0, keep_zeros=N(1))
