"""Invalid arguments, models and checkpoint states: the error, and the module left unchanged."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from toys import Toy, data, hooks, trainer, weights

from lightning_sparse import curvature, mask_rules, noise, penalties, schedules
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    BestAfterTarget,
    HardConcrete,
    MagnitudePruning,
    ReweightedPenalty,
    SparseCheckpoint,
    Sparsifier,
    Sparsify,
    SparsityMonitor,
    VariationalDropout,
)
from lightning_sparse.duality import MaskRule
from lightning_sparse.structure import Blocks

NAN, INF = float("nan"), float("inf")
LOG_SUM = penalties.LogSum(eps=2.0)
penalty, mask, prox = (partial(form, LOG_SUM) for form in (ReweightedPenalty, AdaptiveMask, AdaptiveProx))


class Rounded(MaskRule):
    def keep_probability(self, w):
        return 1 + w.abs()


class Eager(MaskRule):
    def keep_probability(self, w):
        return torch.full_like(w, 1.5)


ARGUMENTS = {
    "NaN lam": (lambda: penalty(NAN), ValueError, "lam must be a finite number > 0, got nan"),
    "infinite lam": (lambda: mask(INF), ValueError, "lam must be a finite number > 0, got inf"),
    "boolean lam": (lambda: penalty(True), TypeError, "lam must be a number, got True of type bool"),
    "text for a share": (lambda: Sparsify("0.9"), TypeError, r"must be a number, got '0.9' of type str; did you mean 0.9\?$"),
    "no share": (lambda: Sparsify(None), TypeError, "Sparsify needs target_sparsity, the share of zeros to reach, such as 0.9; got None"),
    "a penalty for gates": (lambda: HardConcrete(penalty=LOG_SUM), TypeError, "takes no 'penalty'; its penalty follows from beta, gamma"),
    "a penalty for learned noise": (lambda: VariationalDropout(penalty=LOG_SUM), TypeError, "its penalty follows from prior"),
    "an empty block": (lambda: Blocks((0, 4)), ValueError, "the rows in shape must be a whole number >= 1, got 0"),
    "tensor lam": (lambda: penalty(torch.ones(2)), TypeError, "lam must be a number, got tensor"),
    "share": (lambda: schedules.LinearWarmup(1.0, share=0.0), ValueError, r"share must lie in \(0, 1\], got 0.0"),
    "long share": (lambda: schedules.LinearWarmup(1.0, share=2), ValueError, r"share must lie in \(0, 1\], got 2"),
    "NaN share": (lambda: schedules.LinearWarmup(1.0, share=NAN), ValueError, r"share must lie in \(0, 1\], got nan"),
    "begin after end": (lambda: schedules.Cubic(1.0, begin=0.7, end=0.5), ValueError, r"end must lie in \(0.7, 1\], got 0.5"),
    "begin": (lambda: schedules.Cubic(1.0, begin=-0.1), ValueError, r"begin must lie in \[0, 1\), got -0.1"),
    "schedule of text": (lambda: schedules.Constant("1"), TypeError, "lam must be a number, got '1'"),
    "NaN eps": (lambda: penalties.LogSum(NAN), ValueError, "eps must be a finite number > 0, got nan"),
    "no eps": (lambda: penalties.LogSum(None), TypeError, "eps must be a number, got None"),
    "c": (lambda: penalties.MCP(-1), ValueError, "c must be a finite number > 0, got -1"),
    "a": (lambda: penalties.SCAD(a=2.0, k=1.0), ValueError, r"a must lie in \(2, inf\), got 2.0"),
    "tau": (lambda: penalties.HardThreshold(0), ValueError, "tau must be a finite number > 0, got 0"),
    "gamma": (lambda: penalties.HardConcrete(gamma=0.1), ValueError, r"gamma must lie in \(-inf, 0\), got 0.1"),
    "zeta": (lambda: penalties.HardConcrete(zeta=1.0), ValueError, r"zeta must lie in \(1, inf\), got 1.0"),
    "prior": (lambda: penalties.VariationalDropout("log_unifrom"), ValueError, "closest: 'log_uniform'"),
    "scaled by 0": (lambda: penalties.Scaled(LOG_SUM, 0.0), ValueError, "t must be a finite number > 0, got 0.0"),
    "a scaled rule": (lambda: penalties.Scaled(mask_rules.Standout(), 1.0), TypeError, "p must be a Penalty, got Standout"),
    "density": (lambda: mask_rules.TopK(0.0), ValueError, r"density must lie in \(0, 1\], got 0.0"),
    "rate": (lambda: mask_rules.TargetedDropout(1.0, 0.5), ValueError, r"rate must lie in \(0, 1\), got 1.0"),
    "ramp": (lambda: mask_rules.LinearRamp(-1.0), ValueError, "tau must be a finite number > 0, got -1.0"),
    "alpha a little above 1": (lambda: ReweightedPenalty(Rounded()), ValueError, r"must lie in \[0, 1\]: it is 1.00000001 at w = 1e-08"),
    "a misspelt penalty": (lambda: ReweightedPenalty("LogSumm", 1.0), TypeError, r"got 'LogSumm'; closest: 'LogSum\(\)'$"),
    "alpha above 1": (lambda: ReweightedPenalty(Eager()), ValueError, r"keep_probability must lie in \[0, 1\]: it is 1.5"),
    "NaN tol": (lambda: penalty(1.0, tol=NAN), ValueError, r"tol must lie in \(0, 1\), got nan"),
    "negative freeze": (lambda: mask(1.0, freeze=-0.1), ValueError, r"freeze must lie in \[0, 1\), got -0.1"),
    "threshold": (lambda: penalty(1.0, threshold=-1e-3), ValueError, r"threshold must lie in \[0, inf\), got -0.001"),
    "infinite threshold": (lambda: penalty(1.0, threshold=INF), ValueError, r"threshold must lie in \[0, inf\), got inf"),
    "gap_samples": (lambda: penalty(1.0, gap_samples=-1), ValueError, "gap_samples must be a whole number >= 0, got -1"),
    "a share of a sample": (lambda: penalty(1.0, gap_samples=0.9), ValueError, "gap_samples must be a whole number >= 0, got 0.9"),
    "empty select": (lambda: penalty(1.0, select=[]), ValueError, r"select=\[\] selects nothing"),
    "select of numbers": (lambda: mask(1.0, select=[3]), TypeError, r"select must be a list of patterns .* got \[3\]"),
    "noise as a class": (lambda: mask(1.0, noise=noise.Gaussian), TypeError, "noise must be a Noise such as"),
    "curvature as text": (lambda: mask(1.0, curvature="fisher"), TypeError, "curvature must be a Curvature such as"),
    "decay": (lambda: curvature.EmpiricalFisher(decay=1.0), ValueError, r"decay must lie in \[0, 1\), got 1.0"),
    "every": (lambda: curvature.EmpiricalFisher(every=0), ValueError, "every must be a whole number >= 1, got 0"),
    "samples": (lambda: curvature.SampledFisher(samples=-1), ValueError, "samples must be a whole number >= 1, got -1"),
    "likelihood": (lambda: curvature.SampledFisher("poisson"), ValueError, "likelihood must be 'categorical' or 'gaussian', got 'poisson'"),
    "reduction": (lambda: curvature.EmpiricalFisher(reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    "scale": (lambda: curvature.InputMoment(scale=INF), ValueError, "scale must be a finite number > 0, got inf"),
    "ceiling": (lambda: mask(1.0, ceiling=0.0), ValueError, "ceiling must be a finite number > 0, got 0.0"),
    "large alpha_min": (lambda: mask(1.0, alpha_min=1.0), ValueError, r"alpha_min must lie in \(0, 1\), got 1.0"),
    "metric": (lambda: prox(1.0, metric=None), ValueError, "metric must be 'auto', 'adam' or 'plain', got None"),
    "a number as penalty": (lambda: AdaptiveProx(3, 1.0), TypeError, "AdaptiveProx takes a Penalty or a MaskRule such as .*, got 3"),
    "per cent": (lambda: penalty(target_sparsity=90), ValueError, r"target_sparsity must lie in \(0, 1\), got 90; did you mean 0.9\?"),
    "per cent to prune": (lambda: MagnitudePruning(97.5), ValueError, r"sparsity must lie in \(0, 1\), got 97.5; did you mean 0.975\?"),
    "a share above 1": (lambda: mask(1.0, freeze=1.5), ValueError, r"freeze must lie in \[0, 1\), got 1.5: it is a share$"),
    "epochs": (lambda: MagnitudePruning(0.9, begin=2, end=10), ValueError, r"begin must lie in .*, got 2: it is a share of the run's "),
    "end is the default": (
        lambda: MagnitudePruning(0.9, begin=0.8),
        ValueError,
        r"^begin=0.8 is not below end=0.75, its default: also give end, a share of the run in \(0.8, 1\]$",
    ),
    "a structure by name": (
        lambda: penalty(1.0, structure="channels"),
        TypeError,
        r"such as structure.Channels\(\) or structure.Rows\(\), got 'channels'; closest: 'Channels\(\)'$",
    ),
    "per cent in files": (lambda: SparseCheckpoint(target=99), ValueError, r"target must lie in \[0, 1\], got 99; did you mean 0.99\?"),
    "per cent, then best": (lambda: BestAfterTarget(80), ValueError, r"got 80; did you mean 0.8\?"),
    "per cent to freeze": (lambda: penalty(1.0, freeze=25), ValueError, r"freeze must lie in \[0, 1\), got 25; did you mean 0.25\?"),
    "a thousand": (lambda: penalty(target_sparsity=1000), ValueError, r"got 1000: it is a share$"),
    "another form's argument": (lambda: penalty(1.0).to_prox(ceiling=1.0), TypeError, "ceiling"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case):
    make, kind, message = ARGUMENTS[case]
    with pytest.raises(kind, match=message):
        make()


class Holding(nn.Module):
    """A layer with an additional unsupported parameter."""

    def __init__(self, odd):
        super().__init__()
        self.layer, self.odd = nn.Linear(8, 3), odd

    def forward(self, x):
        return self.layer(x)


class NotReached(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 3))
        self[0].weight.requires_grad_(False)


def holding(value, requires_grad=True):
    return lambda: Holding(nn.Parameter(value, requires_grad=requires_grad))


ODD = ["network.odd"]
MODELS = {
    "complex": (penalty, ODD, holding(torch.ones(2, dtype=torch.complex64)), ValueError, "'network.odd' is complex"),
    "whole numbers": (mask, ODD, holding(torch.ones(2, dtype=torch.long), False), ValueError, "'network.odd' is torch.int64"),
    "frozen": (prox, ODD, holding(torch.ones(2), False), ValueError, "'network.odd' is torch.float32 with requires_grad=False"),
    "no such name": (mask, ["network.layr.weight"], holding(torch.ones(2)), ValueError, "closest: 'network.layer.weight'"),
    "excluded": (mask, ["!*"], holding(torch.ones(2)), ValueError, "leaves no parameter"),
    "a norm by pattern": (penalty, ["network.o*"], holding(torch.ones(2)), ValueError, "name them in full"),
    "all frozen": (penalty, None, NotReached, ValueError, "has no selectable weight"),
    "no parameter": (penalty, None, nn.Identity, ValueError, "has no selectable weight"),
    "an abstract form": (partial(Sparsifier, LOG_SUM), None, lambda: nn.Linear(8, 3), TypeError, "trains no zeros; use Sparsify"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    form, select, network, kind, message = MODELS[case]
    module = Toy(network(), optimizer=lambda p: torch.optim.SGD([*p] or [torch.nn.Parameter(torch.ones(1))], 0.1))
    before, count, keys = weights(module), hooks(module), list(module.state_dict())
    with pytest.raises(kind, match=message):
        trainer(form(1.0, select=select)).fit(module, data())
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())
    assert (hooks(module), list(module.state_dict())) == (count, keys)


W = "network.0.weight"
STATES = {
    "a list": ([1], "it must be a dict, got [1]"),
    "a later version": ({"version": 99}, "'version' must be a whole number up to 1, or the file is of a later release, got 99"),
    "no step": ({"step": None}, "'step' must be a whole number >= 0, got None"),
    "a negative step": ({"step": -1}, "'step' must be a whole number >= 0, got -1"),
    "a true step": ({"step": True}, "'step' must be a whole number >= 0, got True"),
    "half an offset": ({"offset": 0.5}, "'offset' must be a whole number >= 0, got 0.5"),
    "frozen of text": ({"frozen": "no"}, "'frozen' must be True or False, got 'no'"),
    "begun of numbers": ({"begun": 3}, "'begun' must be True or False, got 3"),
    "taken of a list": ({"taken": [1]}, "'taken' must be a dict of finite 1-dimensional floating tensors"),
    "taken of lists": ({"taken": {W: [1.0]}}, "'taken' must be a dict of finite"),
    "taken in rows": ({"taken": {W: torch.ones(2, 2)}}, "'taken' must be a dict of finite"),
    "taken of whole numbers": ({"taken": {W: torch.ones(2, dtype=torch.long)}}, "'taken' must be a dict of finite"),
    "taken of NaN": ({"taken": {W: torch.tensor([NAN])}}, "'taken' must be a dict of finite"),
    "taken by number": ({"taken": {3: torch.ones(2)}}, "'taken' must be a dict of finite"),
    "taken of others": ({"taken": {"network.9.weight": torch.ones(2)}}, "written for other parameters"),
    "taken of another size": ({"taken": {W: torch.ones(2), "network.2.weight": torch.ones(3)}}, "its weights were changed after"),
    "averaged of text": ({"averaged": "all"}, "'averaged' must be a dict of finite"),
    "held of numbers": ({"held": {W: torch.ones(16, 8)}}, "'held' must be a dict of boolean tensors"),
    "held of another shape": ({"held": {W: torch.ones(3) > 0}}, "the weight has shape (16, 8)"),
    "a recipe of text": ({"recipe": "LogSum"}, "'recipe' must be a dict with 'class_path' and 'init_args'"),
    "a recipe without arguments": ({"recipe": {"class_path": "X", "init_args": {"a": {"class_path": "Y"}}}}, "'recipe' must be a dict"),
    "a seed of text": ({"seed": "0"}, "'seed' must be a whole number >= 0, got '0'"),
    "negative draws": ({"draws": -2}, "'draws' must be a whole number >= 0, got -2"),
    "curvature of numbers": ({"curvature": 3}, "curvature must be a dict of 'mean' and 'weight'"),
    "curvature of others": ({"curvature": {"mean": {"a": torch.ones(1)}, "weight": {"a": 1.0}}}, "curvature is of other parameters: ['a']"),
    "curvature of another shape": ({"curvature": {"mean": {W: torch.ones(3)}, "weight": {W: 0.5}}}, f"curvature of {W!r} is damaged"),
    "negative curvature": ({"curvature": {"mean": {W: -torch.ones(16, 8)}, "weight": {W: 0.5}}}, f"curvature of {W!r} is damaged"),
    "curvature of NaN": ({"curvature": {"mean": {W: torch.full((16, 8), NAN)}, "weight": {W: 0.5}}}, f"curvature of {W!r} is damaged"),
    "curvature without weight": ({"curvature": {"mean": {W: torch.ones(16, 8)}, "weight": {W: 0.0}}}, f"curvature of {W!r} is damaged"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run, callback = trainer(mask(0.5), epochs=1), mask(0.5)
    run.fit(Toy(), data())
    path = tmp_path_factory.mktemp("saved") / "whole.ckpt"
    run.save_checkpoint(path)
    return torch.load(path, weights_only=True), callback.state_key


def resumed(content, path):
    """Return the error of a run resumed from ``content``; check that nothing was trained and all hooks are removed."""
    torch.save(content, path)
    raw, module = path.read_bytes(), Toy(seed=1)
    own, count = weights(module), hooks(module)
    module.training_step = lambda *args: pytest.fail("training began")
    with pytest.raises(ValueError, match="checkpoint") as error:
        trainer(mask(0.5), epochs=3).fit(module, data(), data(), ckpt_path=path)
    assert hooks(module) == count
    assert path.read_bytes() == raw
    loaded = [torch.equal(w, content["state_dict"][name]) for name, w in weights(module).items()]
    assert all(loaded) or all(torch.equal(w, own[name]) for name, w in weights(module).items())
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("case", STATES)
def test_states(case, saved, tmp_path):
    content, key = copy.deepcopy(saved[0]), saved[1]
    change, message = STATES[case]
    content["callbacks"][key] = content["callbacks"][key] | change if isinstance(change, dict) else change
    assert message in resumed(content, tmp_path / "bad.ckpt")


@pytest.mark.parametrize("name", ["step", "offset", "frozen", "taken"])
def test_a_state_that_lacks_an_entry(name, saved, tmp_path):
    content, key = copy.deepcopy(saved[0]), saved[1]
    del content["callbacks"][key][name]
    assert f"it lacks {name!r}; it has [" in resumed(content, tmp_path / "bad.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_invalid_states_of_other_callbacks_are_ignored(saved, tmp_path):
    content = saved[0] | {"callbacks": {"elsewhere": [1, 2], "there": {"taken": 3}}}
    torch.save(content, tmp_path / "odd.ckpt")
    own = mask(0.5)
    trainer(own, epochs=2).fit(Toy(seed=1), data(), ckpt_path=tmp_path / "odd.ckpt")
    assert own.step == 4


def test_the_tables_are_as_long_as_promised():
    assert len(ARGUMENTS) + len(MODELS) + len(STATES) > 60


@pytest.mark.parametrize("kind", [Sparsify, BestAfterTarget, SparsityMonitor, SparseCheckpoint])
def test_a_class_among_the_callbacks_is_refused_by_name(kind):
    with pytest.raises(TypeError, match=rf"callbacks hold the class {kind.__name__}: create an instance, {kind.__name__}\(...\)"):
        trainer(kind).fit(Toy(), data())
    with pytest.raises(TypeError, match=rf"callbacks={kind.__name__} is a class: create an instance, callbacks=\[{kind.__name__}\(...\)\]"):
        Trainer(callbacks=kind, logger=False, accelerator="cpu")
    assert not hasattr(kind, "state_key")  # so that help() and tools like it pass over it
