"""Refuse unsupported settings before training, and warn of skipped weights and of weights that never learn."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import _checks, counts, coverage, duality, reach
from lightning_sparse.callbacks.compatibility import is_a, overrides
from lightning_sparse.callbacks.form import SparsityCallback, peers_of
from lightning_sparse.callbacks.options import Options, check_moments
from lightning_sparse.callbacks.progress import choose, unfreezes
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.methods.base import Method
from lightning_sparse.schedules import NEAR
from lightning_sparse.select import default_selection, left_out, owners
from lightning_sparse.step import Strength
from lightning_sparse.step_sizes import Doubt
from lightning_sparse.structure import Coupled, Heads
from lightning_sparse.support import Support
from lightning_sparse.weights import WeightStore

MANY = 0.2  # share of zeros at the start from which it is logged that they are trained again

# -- refused settings ------------------------------------------------------------------------------------------------------


def check_setup(options: Options, method: Method, strength: Strength, given: Penalty | MaskRule, trainer: Trainer) -> None:
    """Refuse runs and settings that are not supported, before parameters are chosen: strategies, a duality gap without a loss."""
    form, strategy = options.form, trainer.strategy
    check_moments(form, method)
    other = type(strategy).__name__
    if is_a(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{form} does not support {other}, which flattens the parameters; use DDPStrategy or ModelParallelStrategy (FSDP2)"
        )
    if is_a(strategy, "ModelParallelStrategy") and not method.takes_parts:
        raise ValueError(
            f"{form} does not support {other}: {method.whole_because}; use the same penalty as to_penalty() or to_prox(), or DDPStrategy"
        )
    if is_a(strategy, "ModelParallelStrategy") and isinstance(options.structure, Coupled):
        raise ValueError(
            f"{form} with structure={options.structure!r} does not support {other}: a group has rows of one weight and columns of "
            "others, and each process holds some rows of all; use Rows(), whose groups stay whole, or DDPStrategy"
        )
    if is_a(strategy, "ModelParallelStrategy") and options.gap_samples:
        raise ValueError(f"gap_samples runs the model with other weights, which {other} does not support; set gap_samples=0")
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise ValueError(
            f"{form} does not support a model_averaging_period: between averages the ranks have different weights and zeros; "
            "use DDPStrategy without it"
        )
    if options.gap_samples and trainer.lightning_module is not None and not trainer.lightning_module.automatic_optimization:
        raise ValueError("gap_samples needs a training_step that returns its loss; manual optimisation has none: set gap_samples=0")
    check_reachable(options, method, strength, given)


def check_fit(options: Options, method: Method, weights: WeightStore, trainer: Trainer, module: LightningModule) -> bool:
    """Check parameters, optimisers and the method before training; return True if the method has warned of an optimiser."""
    check_optimizers(options, weights, trainer.optimizers, module)
    check_overlap(weights, trainer)
    warn_skipped(options, module)
    warn_coverage(options, weights, trainer, module)
    doubts = [method.check(optimizer, weights.members(optimizer)) for optimizer in trainer.optimizers]
    for doubt in filter(None, doubts):
        rank_zero_warn(doubt)
    return any(doubts)


def check_reachable(options: Options, method: Method, strength: Strength, given: Penalty | MaskRule) -> None:
    """Refuse a keep probability that never falls below ``tol``, unless a magnitude threshold is given."""
    near = method.penalty.eta_hat(torch.linspace(0, 1, 101, dtype=torch.float64))[0]
    alpha = float(duality.keep_probability(near, strength.schedule.lam))
    if options.threshold is None and alpha >= options.tol:
        raise ValueError(
            f"{given!r} only shrinks: its keep probability is {alpha:.3g} at w = 0, never below tol={options.tol:g}, so no "
            "weight would become zero; give a magnitude threshold, for example threshold=1e-2 (threshold=0 accepts that nothing is removed)"
        )


def check_optimizers(options: Options, weights: WeightStore, optimizers: Iterable[Optimizer], module: LightningModule) -> None:
    """Refuse an optimiser that calls its closure several times, and selected weights that no optimiser updates."""
    for optimizer in optimizers:
        check_optimizer(options.form, type(optimizer))
    updated = {name for optimizer in optimizers for name, *_ in weights.members(optimizer)}
    missing = [name for name, parameter in weights.parameters.items() if parameter.requires_grad and name not in updated]
    if missing:
        whole = dict.fromkeys(_below(name, missing, weights.parameters) for name in missing)
        left = [name for name in whole if name in weights.parameters]
        patterns = [pattern for pattern in whole if pattern not in left] + _patterns(left, module)
        cure = f"exclude them with select={_excluding(options, patterns)}, or "
        rest = "" if len(missing) == len(weights.parameters) else cure
        names = f"{missing[:5]}{_checks.more(missing)}"
        raise ValueError(f"no optimiser updates the selected {names}; {rest}add them to an optimiser in configure_optimizers")


def _below(name: str, missing: list[str], selected: Iterable[str]) -> str:
    """Return the pattern of the outermost module around ``name`` with several selected parameters, all ``missing``; else the name."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        prefix = ".".join(parts[:depth])
        inside = [other for other in selected if other.startswith(f"{prefix}.")]
        if len(inside) > 1 and set(inside) <= set(missing):
            return f"{glob.escape(prefix)}.*"
    return name


def check_optimizer(form: str, kind: type[Any] | None) -> None:
    """Refuse a class of optimisers that is known not to work."""
    if kind is not None and issubclass(kind, torch.optim.LBFGS):
        raise ValueError(f"{form} cannot work with LBFGS, which calls the closure several times a step; use a first-order optimiser")


def check_overlap(weights: WeightStore, trainer: Trainer) -> None:
    """Refuse a weight that another sparsity callback has selected."""
    for other in _others(weights, trainer):
        taken = {id(parameter) for parameter in other.parameters.values()}
        names = sorted(name for name, parameter in weights.parameters.items() if id(parameter) in taken)  # includes tied parameters
        if names:
            raise ValueError(f"two sparsity callbacks select {names[:5]}; give each callback its own weights with select=[...]")


def _others(weights: WeightStore, trainer: Trainer) -> list[SparsityCallback]:
    """Return the run's sparsity callbacks but the one with these weights."""
    return [peer for peer in peers_of(trainer) if peer.weights is not weights]


def check_target(options: Options, support: Support, strength: Strength, trainer: Trainer) -> None:
    """Refuse a target below the share of zeros that keep_zeros=True keeps; pruning's only where it begins, later they are its own."""
    target = options.target_sparsity
    if target is None or not options.keep_zeros or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if strength.target is None and strength.step:
        return
    if (zeros := support.share_of_zeros()) > target + NEAR:
        raise ValueError(
            f"target_sparsity={target:g} is out of reach: {zeros:.2%} of the selected weights are zero already and "
            "keep_zeros=True keeps them at zero; raise the target, or set keep_zeros=False"
        )


def check_reach(options: Options, support: Support, trainer: Trainer, module: LightningModule) -> None:
    """Refuse a target above the share of the selected weights that the groups of a structure can make zero."""
    target = options.target_sparsity
    found = None if target is None or support.is_frozen or unfreezes(trainer) else reach.of(support)
    if target is None or found is None or found.suffices(target):
        return
    stays = f", and least_kept={options.least_kept:g} of them" if options.least_kept else ""
    why, ways = f"one group of each axis stays{stays}", []
    if found.outside:
        more = f" (and {len(found.outside) - 1} more)" if len(found.outside) > 1 else ""
        why = f"{(found.elsewhere or found.outside)[0]}{more} lie{'' if more else 's'} in no group, and {why}"
        rest = f" (at most {_percent(found.zeros / max(found.inside, 1))} of the others)" if found.inside else ""
        ways.append(f"exclude them with select={_without(options, found.outside, module)}{rest}")
    if found.elsewhere:
        ways.append(f"add a callback with structure={'Channels()' if options.structure == Heads() else 'Heads()'} for them")
    most = math.floor(100 * found.share) / 100
    ways.append(f"give at most {most:g}" if most > 0 else "use a structure with smaller groups")
    raise ValueError(
        f"target_sparsity={target:g} cannot be reached: {options.structure!r} can make at most {_percent(found.share)} of the "
        f"{found.size:,} selected weights zero; {why}. {_either(ways)}"
    )


def _either(ways: list[str]) -> str:
    """Join ways out to a sentence."""
    return f"Either {', or '.join(ways)}" if len(ways) > 1 else "".join(way[0].upper() + way[1:] for way in ways)


def _percent(share: float) -> str:
    return f"{math.floor(1000 * share) / 10:g} %"


def check_closures(form: str, module: LightningModule, optimizer: Optimizer) -> None:
    """Refuse an optimiser that evaluates its closure more than once a step: penalty and masks are defined for one evaluation."""
    if module.automatic_optimization and len(module.trainer.optimizers) == 1:
        raise RuntimeError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, which {form} does not support; "
            "use an optimiser that calls its closure once"
        )


def refuse_unhooked(form: str, optimizer: Optimizer) -> None:
    """Raise RuntimeError for an optimiser stepped without Lightning's hook, so that nothing was added to its gradients."""
    raise RuntimeError(
        f"{type(optimizer).__name__}.step() was called without Lightning's on_before_optimizer_step, where "
        f"{form} adds its gradient; step the optimisers of self.optimizers(), or use AdaptiveProx"
    )


def is_built_later(module: LightningModule) -> bool:
    """Return True if the module may still gain layers, because it overrides setup or configure_model."""
    return overrides("setup", module) or overrides("configure_model", module)


def saves_on_exception(trainer: Trainer) -> bool:
    """Return True if a callback writes a checkpoint when training fails."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(getattr(other, "save_on_exception", False) or is_a(other, "OnExceptionCheckpoint") for other in callbacks)


# -- warnings --------------------------------------------------------------------------------------------------------------


def warn_skipped(options: Options, module: LightningModule) -> None:
    """Warn, once on rank 0, of weights that match the selection but are not parameters."""
    if reasons := left_out(module, options.select):
        first, reason = next(iter(reasons.items()))
        more = f" ({_checks.counted(len(reasons) - 1, 'more weight is', 'more weights are')} left out)" if len(reasons) > 1 else ""
        excluded = _excluding(options, list(reasons)[:5])
        rank_zero_warn(f"{options.form} leaves {first!r} out: it {reason}, or exclude it with select={excluded}{more}")


def warn_coverage(options: Options, weights: WeightStore, trainer: Trainer, module: LightningModule) -> None:
    """Report the weights that a selection skips, and warn if it covers only a small share of the module."""
    who, patterns = f"{options.form} selects", options.select
    chosen = [peer.parameters or choose(peer.options.select, trainer, module) for peer in _others(weights, trainer)]
    found = coverage.measure(module, weights.parameters, patterns, [parameter for own in chosen for parameter in own.values()])
    _report_skipped(found, who, patterns, module)
    if coverage.is_general(patterns):
        _warn(coverage.tied_message(found, who, patterns))
    if options.keep_zeros:
        _warn_of_lost_zeros(options, {id(parameter) for own in [weights.parameters, *chosen] for parameter in own.values()}, module)
    if not unfreezes(trainer):
        _warn(coverage.frozen_message(found, who, patterns))
        if note := coverage.frozen_note(found, who):
            rank_zero_info(note)


def _warn_of_lost_zeros(options: Options, selected: set[int], module: LightningModule) -> None:
    """Warn that ``keep_zeros`` does not keep the zeros of weights that no callback selects."""
    others = {name: parameter for name, parameter in default_selection(module).items() if id(parameter) not in selected}
    found = {name: (zeros, size) for name, (zeros, size) in counts.count_zeros(others).items() if zeros < size}  # no zero-initialised head
    zeros, size = counts.share(found), sum(size for _, size in found.values())
    if size and zeros >= MANY:
        rank_zero_warn(
            f"keep_zeros=True keeps the zeros of the weights that {options.form} selects; {zeros:.1%} of the {size} others are zero and "
            f"are trained again, such as {_listed(list(found)[:1], module)}: select them too, or give them a callback of their own"
        )


def warn_counted(who: str, patterns: list[str] | None, module: LightningModule, names: Iterable[str]) -> None:
    """Report the weights that are skipped by a selection that is only counted."""
    counted = dict(counts.weight_in_use(module, name) for name in names)
    _report_skipped(coverage.measure(module, counted, patterns), f"{who} counts", patterns, module)


class ZeroStart:
    """Warns of parameters whose weights are all zero when training starts, and of those of them that still are at its end."""

    def __init__(self, options: Options, support: Support) -> None:
        self.options, self.support = options, support
        self.names: list[str] = []  # all zero at the start, and not held there

    def check(self, names: Iterable[str], module: LightningModule) -> None:
        """Check parameters that start to be trained; zeros that are held may have one weight beside them, which ranking keeps."""
        held = {name: self.support.held[name] for name in names if name in self.support.held}
        live = {name: self.support.weights.live(name) for name in names}
        dead = _all_zero(held, but=1)
        if dead:
            form = self.options.form
            why = "keep_zeros=True keeps" if self.options.keep_zeros else f"{form} prunes them before the first step and keeps"
            rank_zero_warn(
                f"all weights of {_listed(dead, module)} are zero at the start, and {why} them there: they never learn. If they should "
                f"learn (a zero-initialised head, LoRA's B), exclude them with select={_without(self.options, dead, module)} or "
                "initialise them with other values"
            )
        self.names += [name for name in _all_zero(live) if name not in dead]
        if not self.support.is_frozen:
            self._tell_many(held | {name: self.support.cut[name] for name in names if name in self.support.cut}, live)

    def _tell_many(self, held: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
        """Log that many weights start at zero and are trained again; parameters that are all zero, as LoRA's B, do not count."""
        found = counts.count_zeros({name: w for name, w in live.items() if w.dim() > 1})
        kept = counts.count_zeros({name: mask for name, mask in held.items() if name in found})
        again = sum(zeros - kept.get(name, (0, 0))[0] for name, (zeros, size) in found.items() if zeros < size)
        share = again / max(sum(size for _, size in found.values()), 1)
        if share >= MANY and not self.options.keep_zeros:
            text = f"{share:.1%} of the selected weights are zero at the start and are trained again"
            rank_zero_info(f"{self.options.form}: {text}; keep_zeros=True keeps them")

    def check_end(self, module: LightningModule) -> None:
        """Check them again when training has ended."""
        if dead := _all_zero({name: self.support.weights.parameters[name] for name in self.names}, but=1):
            rank_zero_warn(
                f"all weights of {_listed(dead, module)} were zero at the start and are zero at the end: {self.options.form} may have "
                "removed them before they could learn. If they should learn (a zero-initialised head, LoRA's B), exclude them with "
                f"select={_without(self.options, dead, module)}"
            )


def _all_zero(weights: Mapping[str, Tensor], but: int = 0) -> list[str]:
    """Return the names of matrices in which at most ``but`` values are not zero; biases of batch norms start at zero as a rule."""
    found = counts.count_zeros({name: w for name, w in weights.items() if w.dim() > 1})
    return [name for name, (zeros, size) in found.items() if zeros >= size - but and zeros > 0]


def _patterns(names: Iterable[str], module: LightningModule) -> list[str]:
    return list(coverage.grouped(dict.fromkeys(names, ""), [name for name, *_ in owners(module)]))


def _listed(names: Iterable[str], module: LightningModule) -> str:
    patterns = _patterns(names, module)
    return ", ".join(map(repr, patterns[: coverage.LISTED])) + _checks.more(patterns, coverage.LISTED)


def _without(options: Options, names: Iterable[str], module: LightningModule) -> list[str]:
    return _excluding(options, _patterns(names, module))


def _excluding(options: Options, patterns: Iterable[str]) -> list[str]:
    """Return a ``select`` that leaves out what these patterns match."""
    return [*(options.select or []), *("!" + pattern for pattern in patterns)]


def warn_unknown_step_sizes(options: Options, doubt: Doubt, adds_gradients: bool) -> None:
    """Warn, once on rank 0, that the step size of an optimiser, and so the effect of lam, is unknown."""
    if options.target_sparsity is not None:
        return
    if doubt.is_measured:
        remedy = "raise lam, give target_sparsity in its place, or give the optimiser a learning rate"
    elif adds_gradients:
        remedy = "give target_sparsity instead of lam, set a magnitude threshold such as threshold=1e-3, or use another optimiser"
    else:  # weights that are moved after the step do not come near zero
        remedy = (
            "give target_sparsity instead of lam, use ReweightedPenalty with a magnitude threshold such as threshold=1e-3, or use another "
            "optimiser"
        )
    rank_zero_warn(f"{doubt.reason}. At the same lam {options.form} may find fewer zeros than with Adam: {remedy}")


def _report_skipped(found: coverage.Coverage, who: str, patterns: list[str] | None, module: LightningModule) -> None:
    text = coverage.skipped_message(found, who, patterns, [name for name, *_ in owners(module)])
    if found.is_partial:
        _warn(text)
    elif text:
        rank_zero_info(text)


def _warn(text: str) -> None:
    if text:
        rank_zero_warn(text)
