"""Optimisers that keep step, betas, rate or moments elsewhere than torch's: every form runs, and lam means the same."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toys import Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    PenaltyLoss,
    ReweightedPenalty,
    VariationalDropout,
)
from lightning_sparse.conformance.step_sizes import FOREIGN, GroupStep, NoRate, Signs
from lightning_sparse.examples.digits import Digits

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.03),
    "loss": partial(PenaltyLoss, LOG_SUM, 0.03),
    "prox": partial(AdaptiveProx, LOG_SUM, 0.03),
    "exact prox": partial(AdaptiveProx, LOG_SUM, 0.03, exact=True),
    "mask": partial(AdaptiveMask, LOG_SUM, 0.03),
    "joint": partial(EtaTrick, LOG_SUM, 0.03),
    "VarDrop": partial(VariationalDropout, 1e-2),
    "L0": partial(HardConcrete, 0.03),
    "pruning": partial(MagnitudePruning, 0.5, every=2),
}
LEARNED = ("joint", "VarDrop", "L0")
learned_warn = pytest.mark.filterwarnings("ignore:.*trains parameters of its own")


def zeros(module: Toy) -> float:
    weights = [w for w in module.parameters() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def fitted(form: Any, make: Any, epochs: int = 12) -> Toy:
    module = Toy(optimizer=make)
    torch.manual_seed(0)
    trainer(form, epochs=epochs).fit(module, data())
    return module


@lru_cache
def adams(form: str) -> float:
    return zeros(fitted(FORMS[form](), lambda p: torch.optim.Adam(p, 1e-2)))


@pytest.mark.parametrize("form", [key for key in FORMS if key not in ("loss", "pruning", *LEARNED)])
@pytest.mark.parametrize("name", FOREIGN)
def test_zeros_are_within_a_factor_of_two_of_adams(name: str, form: str) -> None:
    wanted = adams(form)
    found = zeros(fitted(FORMS[form](), FOREIGN[name]))
    assert 0.1 < wanted < 0.9
    assert wanted / 2 < found < wanted * 2


@learned_warn
@pytest.mark.parametrize("form", ["loss", "pruning", *LEARNED])
@pytest.mark.parametrize("name", FOREIGN)
def test_every_form_runs(name: str, form: str) -> None:
    module = fitted(FORMS[form](), FOREIGN[name], epochs=2)
    assert all(bool(torch.isfinite(w).all()) for w in module.parameters())


@pytest.mark.parametrize("form", LEARNED)
def test_forms_that_learn_warn_of_optimizers_that_are_not_known(form: str) -> None:
    with pytest.warns(UserWarning, match="step size of Signs for those is not known.*learned_lr") as said:
        fitted(FORMS[form](), Signs, epochs=1)
    assert len([one for one in said if "step size" in str(one.message)]) == 1


class Modes(GroupStep):
    """With modes, as schedule-free ones."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize("form", ["penalty", "prox", "mask"])
def test_optimizers_that_evaluate_other_weights_are_named_once(form: str) -> None:
    with pytest.warns(UserWarning, match="step size of Modes is not known: it trains other weights than it evaluates") as said:
        fitted(FORMS[form](), Modes, epochs=2)
    assert len([one for one in said if "step size" in str(one.message)]) == 1


@pytest.mark.parametrize(
    ("form", "make", "match"),
    [
        (partial(AdaptiveProx, LOG_SUM, 0.03, metric="adam"), GroupStep, "got GroupStep: one of torch's.*Use metric='auto'"),
        (partial(AdaptiveProx, LOG_SUM, 0.03, metric="plain"), NoRate, "NoRate has lr=None; use metric='auto'"),
        (partial(EtaTrick, LOG_SUM, 0.03, learned_lr=0.05), NoRate, "learned_lr=0.05.*NoRate has lr=None.*leave learned_lr out"),
    ],
)
def test_what_cannot_work_is_refused_before_training(form: Any, make: Any, match: str) -> None:
    module = Toy(optimizer=make)
    with pytest.raises(ValueError, match=match):
        trainer(form()).fit(module, data())
    assert module.trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("form", ["penalty", "prox"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(form: str, tmp_path: Any) -> None:
    whole = fitted(FORMS[form](), Signs, epochs=6)
    first, keeper = Toy(optimizer=Signs), ModelCheckpoint(tmp_path, save_last=True)
    torch.manual_seed(0)
    trainer(FORMS[form](), keeper, epochs=3, enable_checkpointing=True).fit(first, data())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert any(one.get("step_sizes") for one in state.values() if isinstance(one, dict))
    second = Toy(optimizer=Signs)
    trainer(FORMS[form](), epochs=6).fit(second, data(), ckpt_path=tmp_path / "last.ckpt")
    assert zeros(whole) > 0
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), second.parameters(), strict=True))


def test_damaged_step_sizes_are_refused() -> None:
    form = FORMS["prox"]()
    state = {"step": 1, "offset": 0, "frozen": False, "taken": {}, "step_sizes": {"network.0.weight": {"fit": torch.full((4,), torch.nan)}}}
    with pytest.raises(ValueError, match="'step_sizes' must be a dict of the tensors of measured step sizes"):
        form.load_state_dict(state)


# -- learned logarithms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["additive", "local"])
def test_variational_dropout_stays_finite_under_sgd(noise: Any) -> None:
    """Momentum carried log sigma up, the noise's gradient threw it down by hundreds, and the loss became NaN."""
    digits = Digits(64)
    digits.setup("fit")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 100, bias=False), nn.ReLU(), nn.Linear(100, 10, bias=False))
    module = Toy(network, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    trainer(VariationalDropout(0.3, noise=noise), epochs=4).fit(module, digits.train_dataloader())
    assert all(bool(torch.isfinite(w).all()) for w in module.parameters())


def test_the_advice_names_the_arguments_that_a_form_has() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sum() * torch.nan

    for form, given, absent in (
        (VariationalDropout(1e-3), "kl_weight or learned_lr", " lam"),
        (VariationalDropout(target_sparsity=0.5), "lower the learning rate or learned_lr", "kl_weight"),
        (ReweightedPenalty(LOG_SUM, 0.1), "lower the learning rate or lam, or clip gradients", "kl_weight"),
    ):
        with pytest.raises(FloatingPointError) as error:
            trainer(form, epochs=30).fit(Toy(loss=loss), data())
        assert given in str(error.value)
        assert absent not in str(error.value)
