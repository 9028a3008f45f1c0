"""Check contracts: run these functions on your own penalty, mask rule, score, structure or sparsity callback.

    from lightning_sparse import testing
    testing.check_penalty(MyPenalty(eps=0.1))
    testing.check_callback(MyCallback(amount=0.5))

Each raises :class:`ContractError`, naming what failed and the weight at which it did. A formula is compared with facts
that were not derived from it: autograd and quadrature with eta_hat, a grid search with the dual and the prox. A
callback is compared with the same runs without it, with its own uninterrupted run, and with counts of its files.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sparse import _checks, _penalty_contract, duality, numeric, scores
from lightning_sparse._contract import DTYPES, ContractError, close, described, same_kind, weights
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.scores import Ranked, Score
from lightning_sparse.structure import Structure

if TYPE_CHECKING:
    from lightning_sparse.conformance import Outcome

__all__ = ["ContractError", "check_callback", "check_mask_rule", "check_penalty", "check_score", "check_structure"]


def check_penalty(penalty: Penalty) -> None:
    """Raise ContractError unless ``penalty`` keeps the contract of :class:`~lightning_sparse.duality.Penalty`.

    Checked: that it is a frozen dataclass; shape and dtype (float64, float32, bfloat16), evenness, omega(0) == 0, no NaN at 0,
    denormals and inf, a prox that keeps NaN, eta_hat >= 0 and non-decreasing, autograd and integral of omega against w / eta_hat,
    the dual against a grid search, the eta-trick identity, the dual's slope against (w / eta)^2 and against the dual, and the prox
    against a grid search.
    TypeError unless given a Penalty.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"check_penalty takes a Penalty, got {_checks.shown(penalty, Penalty)}")
    described(penalty)
    if not penalty.separable:
        _penalty_contract.coupled(penalty)
        return
    for check in _penalty_contract.ALL:
        check(penalty)


def check_mask_rule(rule: MaskRule) -> None:
    """Raise ContractError unless ``rule`` keeps the contract of :class:`~lightning_sparse.duality.MaskRule`.

    Checked: that it is a frozen dataclass; alpha in [0, 1], even, non-decreasing in |w|, its shape and dtype,
    eta_hat = lam alpha / (1 - alpha), the penalty from ``to_penalty`` against the quadrature of t (1 - alpha) / alpha and by
    :func:`check_penalty`, and the conversion back. TypeError unless given a MaskRule.
    """
    if not isinstance(rule, MaskRule):
        raise TypeError(f"check_mask_rule takes a MaskRule, got {_checks.shown(rule, MaskRule)}")
    described(rule)
    try:
        numeric.check_rule(rule.keep_probability)
    except ValueError as error:
        raise ContractError(f"{rule!r}: {error}") from None
    w = weights(rule)
    alpha = rule.keep_probability(w)
    for dtype, allowed in DTYPES.items():
        value = rule.keep_probability(w.to(dtype))
        same_kind(rule, "keep_probability", value, w.to(dtype))
        if rule.separable:
            close(rule, f"keep_probability in {dtype}", w, value.double(), alpha, 4 * allowed)
    close(rule, "keep_probability is not even: at -w it", w, rule.keep_probability(-w), alpha, 0)
    inside = alpha < 1 - 1e-6  # 1 - alpha has lost its digits above
    close(rule, "eta_hat against lam alpha / (1 - alpha)", w[inside], rule.eta_hat(w)[inside], duality.eta(alpha, rule.lam)[inside], 1e-6)
    _penalty_of(rule, w, alpha)


def check_score(score: Score, shapes: Collection[tuple[int, ...]] = ((6, 8), (1, 1), (9,), (4, 6, 3, 3))) -> None:
    """Raise ContractError unless ``score`` keeps the contract of :class:`~lightning_sparse.scores.Score`.

    Checked on weights of these ``shapes`` in float32 and bfloat16, of which none, half or all are zero already: the scores are a floating
    tensor of the weights' shape, finite, >= 0 where a weight is alive, and the same when they are computed again; what is given does
    not change; ``given.squares`` is not used without ``needs_squares``. TypeError unless given a Score.
    """
    if not isinstance(score, Score):
        raise TypeError(f"check_score takes a Score, got {_checks.shown(score, Score)}")
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for dead in (0.0, 0.5, 1.0):
                alive = torch.rand(shape, generator=generator) >= dead
                w = torch.randn(shape, generator=generator).to(dtype) * alive
                alpha, squares = (torch.rand(shape, generator=generator).to(dtype) for _ in range(2))
                _check_score(score, Ranked("weight", w, alive, alpha, squares if score.needs_squares else None))


def _check_score(score: Score, given: Ranked) -> None:
    where = f"{score!r} on weights of shape {tuple(given.w.shape)} in {given.w.dtype}, of which {int((~given.alive).sum())} are zero"
    known = {name: value.clone() for name, value in vars(given).items() if isinstance(value, Tensor)}
    try:
        found = score.of(given)
        scores.check(score, given, found)
        again = score.of(Ranked(**(vars(given) | {name: value.clone() for name, value in known.items()})))
    except Exception as error:  # a score of one's own may raise any error
        lacks = scores.missing_squares(given, error)
        raise ContractError(f"{where}: {type(error).__name__}: {error}{f'; {lacks}' if lacks else ''}") from error
    changed = [name for name, value in known.items() if not torch.equal(getattr(given, name), value)]
    if changed:
        raise ContractError(f"{where}: of must not change given.{changed[0]}; work on a copy")
    if not torch.equal(found, again):
        raise ContractError(f"{where}: of must return the same scores for the same weights")


def check_structure(structure: Structure, shapes: Collection[tuple[int, ...]] = ((6, 8), (5, 7), (1, 9), (4, 6, 3, 3))) -> None:
    """Raise ContractError unless ``structure`` keeps the contract of :class:`~lightning_sparse.structure.Structure`.

    Checked on weights of these ``shapes`` (the rows and columns of a Linear layer, or those of a convolution) that the structure does
    not refuse: each weight is in one group, ``pool`` sums over it, ``spread`` returns each weight its group's value, and ``project``
    adds zeros and changes nothing the second time. TypeError unless given a Structure.
    """
    if not isinstance(structure, Structure):
        raise TypeError(f"check_structure takes a Structure, got {_checks.shown(structure, Structure)}")
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        w = torch.randn(shape, dtype=torch.float64, generator=generator)
        try:
            structure.check("weight", w)
        except ValueError:
            continue
        try:
            count = structure.pool(torch.ones_like(w))
        except Exception as error:  # a structure of one's own may raise any error
            cure = "mend it, or define check() to refuse weights that cannot be grouped"
            raise ContractError(
                f"{structure!r} on weights of shape {shape}: pool fails: {type(error).__name__}: {error}; {cure}"
            ) from error
        _must(bool((count >= 1).all()) and int(count.sum()) == w.numel(), structure, shape, "pool of ones must count each weight once")
        value = torch.randn(count.shape, dtype=torch.float64, generator=generator)
        try:
            spread = structure.spread(value, w).expand(shape)
        except RuntimeError as error:
            raise ContractError(f"{structure!r}: spread does not broadcast to {shape}: {error}") from None
        _must(torch.allclose(structure.pool(spread), value * count), structure, shape, "pool(spread(value, w)) must be count * value")
        inner = (structure.pool(w) * value).sum()
        _must(torch.allclose((w * spread).sum(), inner), structure, shape, "pool and spread must use the same groups")
        if (high := structure.height) is not None:
            parts = torch.cat([structure.pool(part) for part in w.split(high)])
            wrong = f"pool must return the groups of each {high} rows (its height) in order"
            _must(parts.shape == count.shape and torch.allclose(parts, structure.pool(w)), structure, shape, wrong)
        zeros = w.abs() < 0.3
        more = structure.project(zeros, w.abs())
        _must(bool((more | ~zeros).all()), structure, shape, "project must contain the zeros that it is given")
        _must(bool((structure.project(more, w.abs()) == more).all()), structure, shape, "project must not change what it has returned")


def _must(holds: bool, structure: Structure, shape: tuple[int, ...], what: str) -> None:
    if not holds:
        raise ContractError(f"{structure!r} on weights of shape {shape}: {what}")


def check_callback(callback: Any, only: Collection[str] | None = None, skip: Collection[str] = (), slow: bool = True) -> list[Outcome]:
    """Raise ContractError unless a sparsity callback passes the checks in ``lightning_sparse.conformance.CHECKS``.

    Each check fits small models on the CPU: resumed against uninterrupted runs, files and weights in every hook, logged figures
    against counts, precision, other callbacks, models of other libraries, faults. With ``slow`` the checks that start processes or
    compile are run too, about two minutes in all. A terminal shows the progress.

    Args:
        callback: a ``lightning.pytorch.Callback``, copied for each run, or a function without arguments that creates one
            or a list of them. It should set some, not all, of 176 weights to zero within 16 steps of Adam at rate 0.01, better a
            tenth or more: some checks have fewer steps or other networks, where a weaker lam leaves no zero.
            Checks that start processes need a callback, or a function, that can be pickled.
        only: names of the checks to run; all by default.
        skip: names of checks to leave out.

    Returns an ``Outcome(check, verdict, reason)`` for each check; the verdict is "pass", or "n/a" with the reason if a check does not
    apply to this callback.

    Raises ContractError listing all failures, ValueError for an unknown name, TypeError if ``callback`` is not a callback.
    """
    from rich.console import Console
    from rich.progress import Progress

    from lightning_sparse import conformance

    console, names = Console(stderr=True), conformance.chosen(only, skip, slow)
    # without a thread and with streams left alone, because checks start processes and read what is printed
    shown = Progress(
        console=console, transient=True, disable=not console.is_terminal, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )
    with shown as progress:
        outcomes = [
            conformance.outcome(conformance.subject(callback), name) for name in progress.track(names, description="check_callback")
        ]
    failed = [f"{result.check}: {result.reason}" for result in outcomes if result.verdict == "fail"]
    if failed:
        raise ContractError(f"{callback!r} fails {len(failed)} of {len(outcomes)} checks:\n  " + "\n  ".join(failed))
    return outcomes


def _penalty_of(rule: MaskRule, w: Tensor, alpha: Tensor) -> None:
    try:
        penalty = rule.to_penalty()
    except ValueError as error:
        raise ContractError(f"{rule!r}: no penalty: {error}") from None
    check_penalty(penalty)
    back = duality.to_mask_rule(penalty, rule.lam).keep_probability(w)
    close(rule, "keep_probability after conversion to the penalty and back", w, back, alpha, 1e-6)
    if rule.separable:
        integral = numeric.Antiderivative(lambda t: numeric.quotient(t, duality.eta(rule.keep_probability(t), rule.lam)))
        at = w[(w > 0) & (w < 1e3)]
        close(rule, "omega of to_penalty against the integral of t (1 - alpha) / alpha", at, penalty.omega(at), integral(at), 1e-4)
