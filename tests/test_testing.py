"""The public contract checks accept all penalties and reject every mutant for the right reason."""

from __future__ import annotations

import dataclasses
import inspect
import types

import mutants
import pytest
import torch

from lightning_sparse import mask_rules, penalties, scores, testing
from lightning_sparse._contract import ContractError, close
from lightning_sparse.callbacks import ReweightedPenalty
from lightning_sparse.duality import CallableRule, MaskRule, Penalty, PenaltyRule

NUMERIC = ("VariationalDropout", "HardConcrete", "Standout")  # tables and quadrature: more than half a second each


def built(module: types.ModuleType) -> list[object]:
    every = [(name, at, cls(**kwargs)) for name, cls in exported(module) for at, kwargs in enumerate(cls.examples)]
    return [pytest.param(one, id=f"{name}-{at}", marks=pytest.mark.slow if name in NUMERIC else ()) for name, at, one in every]


def exported(module: types.ModuleType) -> list[tuple[str, type]]:
    return [(name, getattr(module, name)) for name in module.__all__]


def missing_lines(package: str, exported: list[str], classes: list[type]) -> list[str]:
    """Return the missing exports and examples of a catalogue's classes."""
    lines = []
    for cls in classes:
        if cls.__name__ not in exported:
            lines.append(f"{package}/__init__.py: from {cls.__module__} import {cls.__name__}")
        if not cls.examples:
            lines.append(f"{cls.__module__}.{cls.__name__}: examples: ClassVar[Examples] = ({{...}},)")
    return lines


def classes_below(base: type, package: str) -> list[type]:
    found = [cls for cls in base.__subclasses__() if cls.__module__.startswith(package) and not inspect.isabstract(cls)]
    return found + [deep for cls in base.__subclasses__() for deep in classes_below(cls, package)]


@pytest.mark.parametrize("penalty", built(penalties))
def test_every_penalty_keeps_the_contract(penalty: Penalty) -> None:
    assert testing.check_penalty(penalty) is None


@pytest.mark.parametrize("rule", built(mask_rules))
def test_every_mask_rule_keeps_the_contract(rule: MaskRule) -> None:
    assert testing.check_mask_rule(rule) is None


@pytest.mark.parametrize(
    "rule", [PenaltyRule(penalties.LogSum(2.0), 0.3), pytest.param(CallableRule(lambda w: w / (1 + w)), marks=pytest.mark.slow)]
)
def test_a_users_rule_keeps_the_contract(rule: MaskRule) -> None:
    assert testing.check_mask_rule(rule) is None


@pytest.mark.parametrize(("penalty", "reason"), mutants.PENALTIES, ids=lambda value: type(value).__name__)
def test_a_mutant_penalty_is_rejected_with_the_reason(penalty: Penalty, reason: str) -> None:
    with pytest.raises(testing.ContractError, match=reason):
        testing.check_penalty(penalty)


def test_the_largest_difference_is_named_not_the_first() -> None:
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    with pytest.raises(ContractError, match=r"slope: 1.5 against 1 at w = 2"):
        close("mine", "slope", w, torch.tensor([1.001, 1.5, 1.0]).double(), torch.ones(3).double(), 1e-6)
    with pytest.raises(ContractError, match=r"slope: nan against 1 at w = 4"):
        close("mine", "slope", w, torch.tensor([1.001, 1.5, float("nan")]).double(), torch.ones(3).double(), 1e-6)
    close("mine", "slope", w, torch.tensor([1.0, float("inf"), 1.0]).double(), torch.tensor([1.0, float("inf"), 1.0]).double(), 1e-6)


@pytest.mark.parametrize(("rule", "reason"), mutants.RULES, ids=lambda value: type(value).__name__)
def test_a_mutant_rule_is_rejected_with_the_reason(rule: MaskRule, reason: str) -> None:
    with pytest.raises(testing.ContractError, match=reason):
        testing.check_mask_rule(rule)


@pytest.mark.parametrize(("score", "reason"), mutants.SCORES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mutant_score_is_rejected_with_the_reason(score: scores.Score, reason: str) -> None:
    with pytest.raises(testing.ContractError, match=reason):
        testing.check_score(score)


def test_the_contract_checks_refuse_other_objects() -> None:
    with pytest.raises(TypeError, match=r"check_score takes a Score, got the class LAMP; did you mean LAMP\(\)\?"):
        testing.check_score(scores.LAMP)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a Penalty"):
        testing.check_penalty(mask_rules.Standout())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got the class ReweightedPenalty; did you mean ReweightedPenalty\(penalty=...\)\?"):
        testing.check_callback(ReweightedPenalty)
    with pytest.raises(TypeError, match="takes a MaskRule"):
        testing.check_mask_rule(penalties.L1())  # type: ignore[arg-type]


class Bare(Penalty):
    """L1 as a plain class."""

    def omega(self, w):
        return w.abs()

    def eta_hat(self, w):
        return w.abs()


@dataclasses.dataclass
class Thawed(Penalty):
    """L1 as a dataclass whose fields may change."""

    omega, eta_hat = Bare.omega, Bare.eta_hat


def test_a_penalty_that_recipes_cannot_describe_is_rejected() -> None:
    with pytest.raises(testing.ContractError, match=r"Bare is no dataclass: .* Write @dataclass\(frozen=True\)"):
        testing.check_penalty(Bare())
    with pytest.raises(testing.ContractError, match="Thawed is a dataclass that is not frozen"):
        testing.check_penalty(Thawed())
    testing.check_penalty(dataclasses.dataclass(frozen=True)(type("Described", (Bare,), {}))())


def test_every_class_is_exported_and_has_examples() -> None:
    found = classes_below(Penalty, "lightning_sparse.penalties")
    assert len(found) >= 12
    assert not missing_lines("lightning_sparse/penalties", penalties.__all__, found)
    rules = classes_below(MaskRule, "lightning_sparse.mask_rules")
    assert len(rules) >= 4
    assert not missing_lines("lightning_sparse/mask_rules", mask_rules.__all__, rules)


def test_a_forgotten_export_is_named_by_its_line() -> None:
    class Forgotten(penalties.L1):
        examples = ()

    Forgotten.__module__ = "lightning_sparse.penalties.forgotten"
    lines = missing_lines("lightning_sparse/penalties", penalties.__all__, [Forgotten])
    assert lines[0] == "lightning_sparse/penalties/__init__.py: from lightning_sparse.penalties.forgotten import Forgotten"
    assert lines[1].startswith("lightning_sparse.penalties.forgotten.Forgotten: examples")
