"""Optimisers that store step, betas, learning rate or moments differently from torch's: every callback runs, and lam keeps its meaning."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toys import Toy, data, several, trainer

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
from lightning_sparse.conformance import step_sizes
from lightning_sparse.conformance.step_sizes import FOREIGN, GroupStep, NoRate, Signs
from lightning_sparse.examples.digits import Digits
from lightning_sparse.methods.eta_trick import KEEP

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
rateless_warn = pytest.mark.filterwarnings("ignore:the step size of NoRate is not known in advance")
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


MEASURED = [key for key in FORMS if key not in ("loss", "pruning", *LEARNED)]
PAIRS = {f"{name}, {form}": (name, form) for name in FOREIGN for form in MEASURED}
FAST = [pair for pair, (name, form) in PAIRS.items() if form == "prox"]


@rateless_warn
@pytest.mark.parametrize(("name", "form"), several(PAIRS, *FAST))
def test_zeros_are_within_a_factor_of_two_of_adams(name: str, form: str) -> None:
    wanted = adams(form)
    found = zeros(fitted(FORMS[form](), FOREIGN[name]))
    assert 0.1 < wanted < 0.9
    assert wanted / 2 < found < wanted * 2


@learned_warn
@rateless_warn
@pytest.mark.parametrize("form", several({form: form for form in ("loss", "pruning", *LEARNED)}, "loss", "L0"))
@pytest.mark.parametrize("name", FOREIGN)
def test_every_form_runs(name: str, form: str) -> None:
    module = fitted(FORMS[form](), FOREIGN[name], epochs=2)
    assert all(bool(torch.isfinite(w).all()) for w in module.parameters())


@pytest.mark.parametrize("form", LEARNED)
def test_forms_that_learn_warn_of_optimizers_that_are_not_known(form: str) -> None:
    with pytest.warns(UserWarning, match="step size of Signs for those is not known.*learned_lr") as said:
        fitted(FORMS[form](), Signs, epochs=1)
    assert len([one for one in said if "step size" in str(one.message)]) == 1


def test_the_warning_proposes_a_target_only_where_none_is_given() -> None:
    for form, proposed in ((FORMS["L0"](), True), (HardConcrete(target_sparsity=0.5), False)):
        with pytest.warns(UserWarning, match="step size of Signs for those is not known") as said:
            fitted(form, Signs, epochs=1)
        (text,) = (str(one.message) for one in said if "step size of Signs" in str(one.message))
        assert ("give target_sparsity instead of lam" in text) is proposed
        assert ("fewer zeros than with Adam" in text) is proposed


class Modes(GroupStep):
    """An optimiser with modes, like schedule-free ones."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize("form", ["penalty", "prox", "mask"])
def test_optimizers_that_evaluate_other_weights_are_named_once(form: str) -> None:
    with pytest.warns(UserWarning, match="step size of Modes is not known: it trains other weights than it evaluates") as said:
        fitted(FORMS[form](), Modes, epochs=2)
    assert len([one for one in said if "step size" in str(one.message)]) == 1


def test_forms_that_learn_say_once_that_other_weights_are_evaluated() -> None:
    with pytest.warns(UserWarning, match="step size of Modes for those is not known") as said:
        fitted(FORMS["joint"](), Modes, epochs=2)
    assert len([one for one in said if "step size" in str(one.message)]) == 1


@pytest.mark.parametrize("form", ["penalty", "prox", "mask"])
def test_optimizers_that_find_their_rate_are_named_once(form: str) -> None:
    with pytest.warns(UserWarning, match="step size of NoRate is not known in advance: it has lr=None.*raise lam") as said:
        fitted(FORMS[form](), NoRate, epochs=2)
    assert len([one for one in said if "step size" in str(one.message)]) == 1


@pytest.mark.parametrize("make", [NoRate, Modes])
def test_a_target_needs_no_known_step_size(make: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fitted(ReweightedPenalty(LOG_SUM, target_sparsity=0.5), make, epochs=2)
    assert not [one for one in said if "step size" in str(one.message)]


START = math.log(0.03 * KEEP / (1 - KEEP))  # log eta at which the keep probability is KEEP


class Distance(GroupStep):
    """Adam whose rate is multiplied by a scale in its groups, like Prodigy."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1.0)
        for group in self.param_groups:
            group |= {"d": 0.01, "d0": 1e-6}

    def move(self, w: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().move(w, grad, state, group | {"lr": group["lr"] * group["d"]})


def test_a_learned_rate_beside_a_scale_that_is_found_is_advised_against() -> None:
    """The advice works: without learned_lr the learned parameters move as with Adam at its default rate."""
    forms = EtaTrick(LOG_SUM, 0.03, learned_lr=0.05), EtaTrick(LOG_SUM, 0.03), EtaTrick(LOG_SUM, 0.03)
    with pytest.warns(UserWarning, match="Distance multiplies lr by a scale.*learned_lr=0.05, too: omit learned_lr"):
        fitted(forms[0], Distance)
    with pytest.warns(UserWarning, match="Compare learned_lr values"):
        fitted(forms[1], Distance)
    fitted(forms[2], lambda p: torch.optim.Adam(p, 1e-2))
    moved = [float((form.method.learned.values["network.0.weight"].detach() - START).abs().mean()) for form in forms]
    assert moved[0] < 0.1 * moved[2]
    assert moved[1] == pytest.approx(moved[2], rel=0.1)


SCHEDULE_FREE = {
    "prox, a target": (AdaptiveProx, {"target_sparsity": 0.5, "lam": None}, 0.5, 0.51),
    "penalty, a threshold": (ReweightedPenalty, {"threshold": 1e-3}, 0.4, 1.0),
    "mask, a threshold": (AdaptiveMask, {"threshold": 1e-3}, 0.4, 1.0),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the step size of FreeAdam is not known")
@pytest.mark.parametrize(("form", "given", "least", "most"), SCHEDULE_FREE.values(), ids=SCHEDULE_FREE.keys())
def test_the_advice_for_schedule_free_optimizers_brings_zeros(form: Any, given: dict[str, Any], least: float, most: float) -> None:
    module = on_digits(form(LOG_SUM, **({"lam": 2e-3} | given)), FreeAdam)
    assert least <= zeros(module) <= most


class FreeAdam(step_sizes.Foreign):
    """Adam, schedule-free: gradients at y move z; evaluation at x, the mean of z. Parameters are y after train() and x after eval()."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-2, betas=(0.9, 0.999), k=0)
        self.training = True

    def train(self) -> None:
        self._to(True, 0.1)

    def eval(self) -> None:
        self._to(False, 1 - 1 / 0.9)

    def _to(self, training: bool, weight: float) -> None:
        if self.training != training:
            for w, state in self.state.items():
                w.data.lerp_(state["z"], weight)
        self.training = training

    def begin(self, group: dict[str, Any]) -> None:
        group["k"] += 1

    def move(self, w: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        z, square = state.setdefault("z", w.detach().clone()), state.setdefault("square", torch.zeros_like(w))
        square.lerp_(grad**2, 1e-3)
        step = group["lr"] * grad / ((square / (1 - 0.999 ** group["k"])).sqrt() + 1e-8)
        w.lerp_(z, 1 / group["k"]).sub_(step, alpha=1 - 0.9 * (1 - 1 / group["k"]))
        z.sub_(step)


@pytest.mark.parametrize(
    ("form", "make", "match"),
    [
        (partial(AdaptiveProx, LOG_SUM, 0.03, metric="adam"), GroupStep, "got GroupStep: one of torch's.*Use metric='auto'"),
        (partial(AdaptiveProx, LOG_SUM, 0.03, metric="plain"), NoRate, "NoRate has lr=None; use metric='auto'"),
        (partial(EtaTrick, LOG_SUM, 0.03, learned_lr=0.05), NoRate, "learned_lr=0.05.*NoRate has lr=None.*omit learned_lr"),
    ],
)
def test_unsupported_settings_are_refused_before_training(form: Any, make: Any, match: str) -> None:
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


def on_digits(form: Any, make: Any) -> Toy:
    digits = Digits(64)
    digits.setup("fit")
    torch.manual_seed(0)
    module = Toy(nn.Sequential(nn.Linear(64, 100, bias=False), nn.ReLU(), nn.Linear(100, 10, bias=False)), make)
    trainer(form, epochs=30).fit(module, digits.train_dataloader())
    return module


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_zeros_under_orthogonal_steps_are_within_a_factor_of_two_of_adams() -> None:
    makes = (partial(torch.optim.AdamW, lr=3e-3), partial(torch.optim.Muon, lr=1e-2, adjust_lr_fn="match_rms_adamw"))
    adams, muons = (zeros(on_digits(ReweightedPenalty(LOG_SUM, 2e-3), make)) for make in makes)
    assert adams > 0.5
    assert adams / 2 < muons < 2 * adams


class CubeRoots(step_sizes.Foreign):
    """Dual averaging over the cube root of the sum of squares, like MADGRAD; its momentum averages weights."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=3e-3, momentum=0.9, k=0)

    def begin(self, group: dict[str, Any]) -> None:
        group["k"] += 1

    def move(self, w: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        start = state.setdefault("start", w.detach().clone())
        total, squares = (state.setdefault(name, torch.zeros_like(w)) for name in ("total", "squares"))
        rate = group["lr"] * group["k"] ** 0.5
        total.add_(grad, alpha=rate)
        squares.addcmul_(grad, grad, value=rate)
        w.lerp_(start - total / (squares.pow(1 / 3) + 1e-6), 1 - group["momentum"])


@pytest.mark.slow
def test_zeros_without_averaged_gradients_are_near_adams() -> None:
    """Regression test: the zero test took one step of Adadelta, RMSprop and Adam without beta_1 for all that a weight at rest moves."""
    found = {}
    for name, make in {
        "Adam": partial(torch.optim.Adam, lr=3e-3),
        "Adam without beta_1": partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.999)),
        "Adadelta": partial(torch.optim.Adadelta, lr=1.0),
        "cube roots": CubeRoots,
    }.items():
        found[name] = zeros(on_digits(AdaptiveMask(LOG_SUM, 1e-3), make))
    wanted = found.pop("Adam")
    assert wanted > 0.45
    assert all(wanted / 1.5 < share < wanted * 1.5 for share in found.values()), found


# -- learned logarithms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["additive", "local"])
def test_variational_dropout_stays_finite_under_sgd(noise: Any) -> None:
    """Regression test: momentum raised log sigma, the noise's gradient lowered it by hundreds, and the loss became NaN."""
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
