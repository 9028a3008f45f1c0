"""Invalid input: a clear error, before training if possible, and an unchanged model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from toys import Repeated, Toy, data, hooks, trainer, weights

from lightning_sparse import duality, mask_rules, penalties, schedules
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, Sparsify, SparsityMonitor, VariationalDropout
from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.duality import Penalty
from lightning_sparse.noise import Gaussian
from lightning_sparse.schedules import LinearWarmup
from lightning_sparse.scores import LAMP
from lightning_sparse.structure import Channels, Rows

LOG_SUM = penalties.LogSum(eps=2.0)


@dataclass(frozen=True)
class Quartic(Penalty):
    """omega = w^4 / 4, not subquadratic: eta_hat = w^-2 decreases."""

    def omega(self, w):
        return w**4 / 4

    def eta_hat(self, w):
        return w.abs() ** -2.0


CONSTRUCTORS = {
    "zero lam": (lambda: ReweightedPenalty(LOG_SUM, lam=0), ValueError, "lam must be a finite number > 0, got 0"),
    "negative lam": (lambda: AdaptiveMask(LOG_SUM, lam=-1.0), ValueError, "lam must be a finite number > 0, got -1.0"),
    "text lam": (lambda: AdaptiveMask(LOG_SUM, lam="1"), TypeError, "lam must be a number, got '1' of type str"),
    "no lam": (lambda: ReweightedPenalty(LOG_SUM), TypeError, "ReweightedPenalty needs lam, its strength"),
    "eps": (lambda: penalties.LogSum(eps=0.0), ValueError, "eps must be a finite number > 0, got 0.0"),
    "p": (lambda: penalties.Lp(p=2.0), ValueError, r"p must lie in \(0, 2\), got 2.0"),
    "a penalty's class": (
        lambda: ReweightedPenalty(penalties.LogSum, lam=1.0),
        TypeError,
        r"takes a Penalty or a MaskRule such as .*, got the class LogSum; did you mean LogSum\(eps=...\)\?",
    ),
    "a rule's class": (lambda: AdaptiveMask(mask_rules.Standout, lam=1.0), TypeError, r"the class Standout; did you mean Standout\(\)\?"),
    "a penalty's base": (lambda: ReweightedPenalty(duality.Penalty, lam=1.0), TypeError, r"got <class '.*Penalty'>$"),
    "a class inside": (lambda: penalties.Scaled(penalties.LogSum, 0.1), TypeError, r"did you mean LogSum\(eps=...\)\?"),
    "a structure's class": (lambda: AdaptiveMask(LOG_SUM, 1.0, structure=Rows), TypeError, r"the class Rows; did you mean Rows\(\)\?"),
    "a score's class": (lambda: AdaptiveProx(LOG_SUM, 1.0, score=LAMP), TypeError, r"the class LAMP; did you mean LAMP\(\)\?"),
    "a noise's class": (lambda: AdaptiveMask(LOG_SUM, 1.0, noise=Gaussian), TypeError, r"the class Gaussian; did you mean Gaussian\(\)\?"),
    "a curvature's class": (
        lambda: AdaptiveMask(LOG_SUM, 1.0, curvature=EmpiricalFisher),
        TypeError,
        r"the class EmpiricalFisher; did you mean EmpiricalFisher\(\)\?",
    ),
    "a schedule's class": (
        lambda: AdaptiveMask(LOG_SUM, LinearWarmup),
        TypeError,
        r"lam must be a number or a Schedule .*; did you mean LinearWarmup\(lam=...\)\?",
    ),
    "a function": (
        lambda: AdaptiveMask(LOG_SUM, lambda step: 1.0),
        TypeError,
        "a Schedule of lightning_sparse.schedules such as",
    ),
    "kl_weight": (lambda: VariationalDropout(-1), ValueError, "^kl_weight must be a finite number > 0, got -1"),
    "a tensor to select": (
        lambda: ReweightedPenalty(LOG_SUM, 1.0, select=["*", torch.ones(3, 4)]),
        TypeError,
        r"got \['\*', a Tensor of shape \(3, 4\)\]$",
    ),
    "another class": (lambda: ReweightedPenalty(LOG_SUM, 1.0, structure=int), TypeError, r"got <class 'int'>"),
    "not subquadratic": (lambda: ReweightedPenalty(Quartic(), lam=1.0), ValueError, r"not subquadratic: eta_hat decreases at w = 1e-08"),
    "not separable": (lambda: AdaptiveProx(mask_rules.TopK(0.5)), ValueError, "needs a separable penalty"),
    "tol": (lambda: ReweightedPenalty(LOG_SUM, 1.0, tol=1.0), ValueError, r"tol must lie in \(0, 1\), got 1.0"),
    "freeze": (lambda: ReweightedPenalty(LOG_SUM, 1.0, freeze=1.0), ValueError, r"freeze must lie in \[0, 1\), got 1.0"),
    "select text": (lambda: ReweightedPenalty(LOG_SUM, 1.0, select="*"), TypeError, "select must be a list of patterns"),
    "metric": (lambda: AdaptiveProx(LOG_SUM, 1.0, metric="adamw"), ValueError, "metric must be 'auto', 'adam' or 'plain', got 'adamw'"),
    "noise": (lambda: AdaptiveMask(LOG_SUM, 1.0, noise="gaussian"), TypeError, "noise must be a Noise"),
    "curvature": (lambda: AdaptiveMask(LOG_SUM, 1.0, curvature=True), TypeError, "curvature must be a Curvature"),
    "alpha_min": (lambda: AdaptiveMask(LOG_SUM, 1.0, alpha_min=0.0), ValueError, r"alpha_min must lie in \(0, 1\), got 0.0"),
}


@pytest.mark.parametrize(("make", "kind", "message"), CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_constructors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters)


def only_biases(parameters):
    return torch.optim.SGD([p for p in parameters if p.dim() == 1], 0.1)


class Frozen(nn.Module):
    """Six layers of an encoder, and two more."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.tail = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.tail(self.head(self.encoder(x)))


def test_all_weights_that_no_optimiser_updates_are_excluded_by_the_pattern_that_is_named():
    module = Toy(Frozen())
    module.make = lambda p: torch.optim.SGD(module.network.head.parameters(), 0.1)
    wanted = (
        r"no optimiser updates the selected \['network.encoder.0.weight', .*'network.encoder.4.weight'\] and 2 more; exclude them with "
        r"select=\['!network.encoder.\*', '!network.tail.weight'\], or add them to an optimiser in configure_optimizers$"
    )
    with pytest.raises(ValueError, match=wanted):
        trainer(Sparsify(0.5)).fit(module, data())
    trainer(Sparsify(0.5, select=["!network.encoder.*", "!network.tail.weight"])).fit(module, data())
    with pytest.raises(ValueError, match=r"\['network.tail.weight'\]; add them to an optimiser in configure_optimizers$"):
        trainer(Sparsify(0.5, select=["network.tail.*"])).fit(module, data())


RUNS = {
    "no match": (lambda: ReweightedPenalty(LOG_SUM, 1.0, select=["netwrk.*"]), {}, {}, "closest: 'network"),
    "no weights": (lambda: ReweightedPenalty(LOG_SUM, 1.0), {"network": nn.BatchNorm1d(8)}, {}, "Toy has no selectable weight"),
    "LBFGS": (lambda: ReweightedPenalty(LOG_SUM, 1.0), {"optimizer": lbfgs}, {}, "cannot work with LBFGS"),
    "not optimised": (lambda: ReweightedPenalty(LOG_SUM, 1.0), {"optimizer": only_biases}, {}, r"no optimiser updates"),
    "shrinks only": (lambda: ReweightedPenalty(penalties.Ridge(c=1.0), 0.1), {}, {}, r"only shrinks: .* give a magnitude threshold"),
    "shrinking rule": (lambda: AdaptiveMask(mask_rules.Standout()), {}, {}, "only shrinks"),
    "endless": (lambda: ReweightedPenalty(LOG_SUM, schedules.LinearWarmup(1.0)), {}, {"epochs": -1}, "needs the length of the run"),
    "endless target": (
        lambda: Sparsify(0.9),
        {},
        {"epochs": -1},
        "neither epochs nor steps are given: give the Trainer max_epochs, such as max_epochs=20, or max_steps",
    ),
    "endless freeze": (lambda: ReweightedPenalty(LOG_SUM, 1.0, freeze=0.5), {}, {"epochs": -1}, "needs the length of the run"),
    "adam metric": (
        lambda: AdaptiveProx(LOG_SUM, 1.0, metric="adam"),
        {"optimizer": lambda p: torch.optim.SGD(p, 0.1)},
        {},
        "metric='adam' needs an optimiser with second moments, got SGD",
    ),
}


@pytest.mark.parametrize(("callback", "model", "options", "message"), RUNS.values(), ids=RUNS.keys())
def test_runs_that_are_refused_before_training(callback, model, options, message):
    module = Toy(**model)
    before, count = weights(module), hooks(module)
    with pytest.raises(ValueError, match=message):
        trainer(callback(), **options).fit(module, data())
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())
    assert hooks(module) == count


def test_two_callbacks_on_one_weight_are_refused_and_on_disjoint_ones_not():
    first = ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"])
    with pytest.raises(ValueError, match=r"two sparsity callbacks select \['network.0.weight'\]"):
        trainer(first, ReweightedPenalty(LOG_SUM, 0.5)).fit(Toy(), data())
    assert first.state_key != ReweightedPenalty(LOG_SUM, 0.5, select=["network.2.*"]).state_key


STRATEGIES = [
    (ReweightedPenalty, {}, FSDPStrategy, "does not support Posed, which flattens the parameters; use DDPStrategy or ModelParallel"),
    (AdaptiveProx, {}, DeepSpeedStrategy, "does not support Posed, which flattens the parameters"),
    (AdaptiveMask, {}, ModelParallelStrategy, r"does not support Posed: FSDP2 gathers .* use the same penalty as to_penalty\(\)"),
    (ReweightedPenalty, {"gap_samples": 2}, ModelParallelStrategy, "set gap_samples=0"),
    (ReweightedPenalty, {}, DDPStrategy, "does not support a model_averaging_period"),
]


@pytest.mark.parametrize(("form", "options", "strategy", "message"), STRATEGIES)
def test_strategies_under_which_ranks_would_disagree_are_refused(form, options, strategy, message):
    run = trainer(form(LOG_SUM, 0.5, **options))
    run.strategy.__class__ = type("Posed", (strategy,), {"_model_averaging_period": 4} if strategy is DDPStrategy else {})
    with pytest.raises(ValueError, match=message):
        run.callbacks[0].setup(run, Toy(), "fit")


class Twice(torch.optim.SGD):
    """An optimiser that evaluates its closure twice per step, like line searches and sharpness-aware steps."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveMask, AdaptiveProx])
def test_an_optimiser_that_calls_its_closure_twice_is_refused(form):
    module = Toy(optimizer=lambda p: Twice(p, 0.1))
    before = weights(module)
    with pytest.raises(RuntimeError, match="Twice evaluates the loss several times a step"):
        trainer(form(LOG_SUM, 0.5)).fit(module, data())
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())


@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveMask, AdaptiveProx])
def test_a_nan_loss_stops_the_run_with_the_previous_weights(form):
    module = Toy()
    before, count = weights(module), hooks(module)
    x = torch.full((4, 8), torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at optimiser step 0; the weights are those before this batch"):
        trainer(form(LOG_SUM, 0.5)).fit(module, Repeated((x, torch.zeros(4, dtype=torch.long))))
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())
    assert hooks(module) == count


def test_a_checkpoint_of_another_selection_is_refused(tmp_path):
    run = trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "first.ckpt")
    other = ReweightedPenalty(LOG_SUM, 0.5)
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)
    state["callbacks"][other.state_key]["taken"].pop("network.2.weight")
    torch.save(state, tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match=r"was written for other parameters; they differ in \['network.2.weight'\]"):
        trainer(other, epochs=2).fit(Toy(), data(), ckpt_path=tmp_path / "first.ckpt")


@pytest.mark.parametrize("resumed", [{"structure": Rows()}, {}], ids=["other", "none"])
def test_resuming_with_another_structure_names_both(resumed, tmp_path):
    run = trainer(Sparsify(0.5, structure=Channels()), epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "first.ckpt")
    now = repr(resumed.get("structure", "Element()")).strip("'")
    with pytest.raises(
        ValueError, match=re.escape(f"was written with structure=Channels(cost=weights), and this one has structure={now}. Resume")
    ):
        trainer(Sparsify(0.5, **resumed), epochs=2).fit(Toy(), data(), ckpt_path=tmp_path / "first.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.", "ignore:Sparsify .*continues for")
def test_resuming_with_another_select_is_refused_with_the_difference(tmp_path):
    run = trainer(Sparsify(0.5), epochs=4, max_steps=6)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "first.ckpt")
    resume = {"ckpt_path": tmp_path / "first.ckpt"}
    wanted = (
        r"the checkpoint's Sparsify was written with the default select, and Sparsify has select=\['network.0.\*'\]: they differ in "
        r"\['network.2.weight'\]. Resume with the same selection; to train another one, load the weights"
    )
    with pytest.raises(ValueError, match=wanted):
        trainer(Sparsify(0.5, select=["network.0.*"]), epochs=4).fit(Toy(), data(), **resume)
    other = trainer(Sparsify(0.5), Sparsify(0.5, select=["network.0.*"]), epochs=4)
    with pytest.raises(ValueError, match="two sparsity callbacks select"):  # the first one continues, so that no state is lost
        other.fit(Toy(), data(), **resume)
    same = Sparsify(0.5, select=["network.*.weight"])
    with pytest.warns(UserWarning, match=r"with other settings: select: None -> "):  # other patterns for the same weights
        trainer(same, epochs=4).fit(Toy(), data(), **resume)
    assert same.step > 6
    trainer(Sparsify(0.5, select=["network.0.*"]), epochs=4).validate(Toy(), data(), verbose=False, **resume)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_the_state_of_another_class_and_selection_is_reported_once_as_not_used(tmp_path):
    run = trainer(AdaptiveMask(LOG_SUM, 0.5), epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "first.ckpt")
    others = [ReweightedPenalty(LOG_SUM, 0.5, select=[f"network.{layer}.*"]) for layer in (0, 2)]
    with pytest.warns(UserWarning, match="was not used") as caught:
        trainer(*others, epochs=2).fit(Toy(), data(), ckpt_path=tmp_path / "first.ckpt")
    (said,) = [str(one.message) for one in caught if "was not used" in str(one.message)]
    assert said == (
        "the state of AdaptiveMask in the checkpoint was not used, because it was written with the default select, and ReweightedPenalty "
        "has select=['network.0.*']: they differ in ['network.2.weight']. ReweightedPenalty starts anew from the loaded weights; to "
        "continue the ramp and the zeros, resume with the same selection"
    )
    assert others[0].step == 4


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "first.ckpt")
    wider = Toy(nn.Sequential(nn.Linear(8, 17), nn.ReLU(), nn.Linear(17, 3)))
    with pytest.raises(RuntimeError, match=r"size mismatch for network.0.weight"):
        trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=2).fit(wider, data(), ckpt_path=tmp_path / "first.ckpt")


def test_importing_the_folder_under_another_name_says_what_to_do(tmp_path):
    import importlib.util

    import lightning_sparse.callbacks as installed

    spec = importlib.util.spec_from_file_location("callbacks", installed.__file__)
    with pytest.raises(ImportError, match=r"installed as 'lightning_sparse.callbacks': run 'pip install -e .'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_monitor_needs_a_list():
    with pytest.raises(TypeError, match=r"select must be a list of patterns or None, got the string '\*'"):
        SparsityMonitor(select="*")
