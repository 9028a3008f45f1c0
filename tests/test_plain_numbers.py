"""Numbers of numpy and torch as arguments become Python numbers in every object."""

from __future__ import annotations

import dataclasses
import enum
import pickle

import numpy as np
import pytest
import torch

from lightning_sparse import _checks, curvature, duality, gates, mask_rules, noise, penalties, plots, schedules
from lightning_sparse._plain import plain
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.noise import Noise
from lightning_sparse.schedules import Schedule

HALVES = [np.float16(0.5), np.float32(0.5), np.float64(0.5), np.longdouble(0.5), np.array(0.5), torch.tensor(0.5)]
HALVES += [torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5, dtype=torch.float64)]
TWOS = [np.int8(2), np.uint16(2), np.int64(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.int32)]


class Word(str):
    """A string type as from a YAML library that keeps quotes."""


class Number(float):
    """A number type as from a YAML library that keeps digits."""


class Mode(str, enum.Enum):
    FAST = "fast"


@pytest.mark.parametrize("given", HALVES, ids=lambda given: str(type(given)))
def test_a_fraction_of_any_width_is_a_float(given):
    assert (type(plain(given)), plain(given)) == (float, 0.5)
    assert type(_checks.positive("x", given)) is float


@pytest.mark.parametrize("given", TWOS, ids=lambda given: str(type(given)))
def test_a_whole_number_of_any_width_is_an_int(given):
    assert (type(plain(given)), plain(given)) == (int, 2)
    assert type(_checks.whole("x", given, 1)) is int


def test_strings_bools_and_containers_become_python_types():
    given = {np.str_("a"): [np.bool_(True), (np.str_("b"), Word("c"), Number(0.5))], "d": torch.tensor(False)}
    made = plain(given)
    assert made == {"a": [True, ("b", "c", 0.5)], "d": False}
    leaves = [*made, made["a"][0], *made["a"][1], made["d"]]
    assert {type(leaf) for leaf in leaves} == {str, bool, float}


def test_non_numbers_are_returned_unchanged():
    kept = [torch.ones(3), np.ones(1), torch.tensor(2.0, requires_grad=True), Mode.FAST, np.datetime64("2020-01-01"), object()]
    kept += [[1, "a"], {}]
    assert all(plain(given) is given for given in kept)


class Settled(Penalty):
    """A user's penalty that is not a dataclass."""

    def __init__(self, scale, *, words=()):
        self.scale, self.words = scale, words

    def omega(self, w):
        return self.scale * w.abs()

    def eta_hat(self, w):
        return w.abs() / self.scale


@dataclasses.dataclass(frozen=True)
class Own(Penalty):
    """A user's penalty with its own checks only."""

    scale: float
    rate: float = 1.0

    def __post_init__(self):
        assert type(self.scale) is float

    omega, eta_hat = Settled.omega, Settled.eta_hat


@dataclasses.dataclass(frozen=True)
class Steps(Schedule):
    """A user's schedule."""

    lam: float
    every: int

    def __call__(self, step, total):
        return self.lam * (step // self.every)


def numbers(made):
    """Return every number and string in an object, by name."""
    for name, value in vars(made).items():
        if isinstance(value, (Penalty, MaskRule, Noise, Schedule)):
            yield from numbers(value)
        elif isinstance(value, (int, float, str, np.generic)):
            yield name, value


PUBLIC = [getattr(room, name) for room in (penalties, mask_rules) for name in room.__all__]
BUILT = [(cls, example) for cls in PUBLIC for example in cls.examples]
BUILT += [(Settled, {"scale": 2.0, "words": ["a"]}), (Own, {"scale": 2.0}), (Steps, {"lam": 0.5, "every": 3})]
BUILT += [(schedules.Constant, {"lam": 0.5}), (schedules.LinearWarmup, {"lam": 0.5, "share": 0.25})]
BUILT += [(schedules.Cubic, {"lam": 0.5, "start": 0.25})]
BUILT += [(noise.Gaussian, {"local": True, "share": 0.5}), (duality.PenaltyRule, {"penalty": penalties.L1(), "lam": 0.5})]
BUILT += [(curvature.EmpiricalFisher, {"decay": 0.5, "every": 2, "samples": 4}), (curvature.InputMoment, {"scale": 2.0, "every": 3})]
BUILT += [(curvature.SampledFisher, {"likelihood": "gaussian", "output": "net"})]


def of_numpy(value):
    return {bool: np.bool_, int: np.int64, float: np.float32, str: np.str_}.get(type(value), lambda same: same)(value)


@pytest.mark.parametrize(("cls", "given"), BUILT, ids=lambda part: getattr(part, "__name__", ""))
def test_every_object_stores_python_types(cls, given):
    made = cls(**{name: of_numpy(value) for name, value in given.items()})
    assert {type(value) for _, value in numbers(made)} <= {int, float, str, bool}, dict(numbers(made))
    known = cls(**{name: value if type(value) is not float else float(np.float32(value)) for name, value in given.items()})
    if not any(isinstance(value, torch.Tensor) for value in given.values()):
        assert repr(made) == repr(known)
    assert repr(pickle.loads(pickle.dumps(made))) == repr(made)


def test_a_changed_copy_keeps_python_types():
    assert type(dataclasses.replace(penalties.LogSum(1.0), eps=np.float64(2)).eps) is float


def test_functions_take_them_too():
    assert float(duality.keep_probability(torch.ones(1), np.float32(1.0))) == 0.5
    assert type(schedules.as_schedule(np.float32(0.5)).lam) is float
    assert duality.to_mask_rule(penalties.L1(), lam=torch.tensor(0.5)) == duality.PenaltyRule(penalties.L1(), 0.5)
    assert plots.penalty_curves([penalties.L1()], lam=np.float32(1), w_max=np.int64(2)).axes
    assert gates.Gate(np.float64(0.5)).keep_probability(torch.zeros(1)).dtype == torch.float32
