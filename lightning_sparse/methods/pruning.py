"""Prune the weights of the lowest score permanently along a ramp during training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse import counts, duality, elementwise
from lightning_sparse.duality import Penalty
from lightning_sparse.methods.base import Method, Run
from lightning_sparse.schedules import Cubic

FEW, CUTS = 5, 30  # prunings on a ramp: the number below which to warn, and the recommended number
LONGEST, LEAST_CUTS = 100, 10  # by default: optimiser steps between prunings, and prunings on a shorter ramp
TRIAL = 100  # optimiser steps below which a run may be only a trial


class MagnitudePruning(Method):
    """Removes the smallest weights every ``every`` steps; the strength is the share of zeros that the ramp asks for.

    Which ones are the smallest, the support's score decides. Source: Zhu and Gupta, arXiv 1710.01878.

    Args:
        penalty: top-k's.
        sparsity: the share of zeros at the end.
        begin: where the ramp begins, as a share of the run.
        every: optimiser steps from one pruning to the next; None stands for LONGEST, or for fewer, so that the ramp holds LEAST_CUTS.
        scope: ``global`` ranks all selected weights together, ``layer`` each parameter.
    """

    needs_separable, takes_groups = False, False  # ranks groups itself

    def __init__(self, penalty: Penalty, sparsity: float, begin: float, every: int | None, scope: str) -> None:
        super().__init__(penalty)
        self.sparsity, self.begin_at, self.every, self.scope = sparsity, begin, every, scope

    # -- formulas ----------------------------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...]:
        """Return w and the mask of the kept weights, for any values ``w`` such as an average."""
        held = self.run.support.held
        return (w, held[name]) if name in held else (w, torch.ones_like(w, dtype=torch.bool))

    def eta(self, lam: float, *terms: Tensor) -> Tensor:
        """Return inf for kept weights, 0 for pruned ones."""
        return duality.eta(self.alpha(lam, *terms), 1.0)

    def alpha(self, lam: float, *terms: Tensor) -> Tensor:
        """Return 1 for kept weights and 0 for pruned ones."""
        w, kept = terms
        return kept.to(w)

    def penalty_value(self, weights: list[Tensor], lam: float) -> float:
        """Return 0, because the number of non-zero weights meets the constraint."""
        return 0.0

    # -- moments -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Warn if the ramp holds only a few prunings; only log it for a run of a few steps, which may be a trial."""
        total, ramp = self.run.strength.total, self._ramp()
        if self.run.strength.step or ramp is None or self.every is None:
            return
        cuts = math.ceil(ramp / self.every)
        if cuts < FEW and self.every > 1 and ramp > 1:
            notify = self.run.warn if total >= TRIAL else self.run.note
            notify(
                f"MagnitudePruning reaches {self.sparsity:.1%} zeros in {cuts} cut{'s' * (cuts != 1)}: its ramp is {ramp} optimiser steps "
                f"long and it prunes every {self.every} (every={self.every}). A network recovers better from many small cuts: give "
                f"every={max(ramp // CUTS, 1)}"
            )

    def _ramp(self) -> int | None:
        """Return the optimiser steps of the ramp; None if they are unknown."""
        total, schedule = self.run.strength.total, self.run.strength.schedule
        if not math.isfinite(total) or not isinstance(schedule, Cubic):
            return None
        return round(schedule.end * total) - round(schedule.begin * total)

    def _interval(self) -> int:
        """Return the optimiser steps from one pruning to the next."""
        if self.every is not None:
            return self.every
        ramp = self._ramp()
        return LONGEST if ramp is None else max(1, min(LONGEST, ramp // LEAST_CUTS))

    def reset(self, run: Run) -> None:
        super().reset(run)
        self._reached, self._ranked = 0.0, 0  # the last share pruned to, and the number of parameters then
        self._distinct: list[str] = []  # parameters, of tied ones the first

    def attach(self, module: nn.Module, wrappers: Iterable[Any] = ()) -> None:
        """Allow all weights to be non-zero at first."""
        held, weights = self.run.support.held, self.run.weights
        self._distinct = list(counts.distinct(weights.parameters))
        for name in (name for name in weights.parameters if name not in held):
            held[name] = elementwise.map_shards(lambda w: torch.ones_like(w, dtype=torch.bool), weights.live(name))

    def progress(self) -> None:
        """Prune when due: every ``every`` steps of the ramp, at its end, and when parameters were added after it."""
        strength, lam = self.run.strength, self.run.strength.lam
        since = strength.step - round(self.begin_at * strength.total)
        ends = self._reached < lam == self.sparsity
        more = self._reached != lam or self._ranked != len(self.run.weights.parameters)
        if self.run.support.frozen is None and since >= 0 and ((since % self._interval() == 0 and more) or ends):
            self._prune_to(lam, self._distinct)

    def freeze(self, names: Iterable[str]) -> None:
        """Prune to the final share, because nothing can be pruned later."""
        parameters = self.run.weights.parameters
        self._prune_to(self.sparsity, counts.distinct({name: parameters[name] for name in names}))

    @torch.no_grad()
    def _prune_to(self, share: float, names: Iterable[str]) -> None:
        """Prune up to ``share`` of these parameters, of tied ones the first; every process ranks the same full weights."""
        weights, held = self.run.support.weights, self.run.support.held
        before = {name: elementwise.full_tensor(held[name]) for name in names}
        for group in [before] if self.scope == "global" else [{name: kept} for name, kept in before.items()]:
            for name, kept in self.run.support.keep_highest(group, share).items():
                held[name] = weights.part(name, kept & before[name])
                elementwise.apply_mask_(weights.parameters[name], held[name])
        self._reached, self._ranked = share, len(weights.parameters)

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the lower bound of the ramp if the run was resumed as a longer one."""
        strength = self.run.strength
        above = strength.least > strength.schedule(strength.step, strength.total) and self.run.support.frozen is None
        return {"asked": strength.least} if above else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the lower bound of the ramp to the share that the saved run had asked for, because pruned weights stay pruned."""
        if self.run.support.frozen is None:
            self.run.strength.least = max(_asked_by(state), float(state.get("asked", 0.0)))

    def check_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise ValueError unless its own state of a run that has begun holds a mask for each weight; other methods' may hold none."""
        own = state.get("recipe", {}).get("class_path") == type(self).__name__
        if state.get("begun") and own and state.get("held", {}).keys() != state["taken"].keys():
            raise ValueError("'held' must be a mask for each of the weights taken")


def _asked_by(state: Mapping[str, Any]) -> float:
    """Return the share of zeros that the ramp of a pruning checkpoint asked for; 0 for another method's."""
    recipe = state.get("recipe", {})
    shape = [recipe.get("init_args", {}).get(name) for name in ("sparsity", "begin", "end", "start")]
    if recipe.get("class_path") != MagnitudePruning.__name__ or "total" not in state or None in shape:
        return 0.0
    return Cubic(*map(float, shape))(state["step"], state["total"])
