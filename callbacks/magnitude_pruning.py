"""MagnitudePruning: gradual magnitude pruning, the baseline that others are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from lightning_sparse import _checks, counts, duality, elementwise
from lightning_sparse._construction import typed
from lightning_sparse.callbacks import _states, _strengths
from lightning_sparse.callbacks._arguments import Arguments, Finish
from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.mask_rules.ranked import TopK, shrunk
from lightning_sparse.schedules import Cubic

Scope = Literal["global", "layer"]


class MagnitudePruning(Sparsifier):
    """Prunes the smallest |w| for good while training goes on, until a given share is zero; then fine-tunes what is left.

    The share of zeros asked for rises as s(u) = sparsity + (start - sparsity) (1 - u)^3, u from 0 to 1 between the shares
    ``begin`` and ``end`` of the run's optimiser steps (of its batches under manual optimisation); every ``every`` of them,
    and where the ramp ends, the round(s n) smallest of n weights are pruned, among equal ones the last, but never all.
    Pruned weights are true zeros after each optimiser step, whatever momentum or decay do. ``sparsity/target`` logs s (so does
    ``sparsity/lam``), which the zeros follow by up to ``every`` steps; ``sparsity/penalty`` is 0: top-k's penalty is a
    constraint, which holds.

    Source: Zhu and Gupta, arXiv 1710.01878. Raises ValueError for an argument out of its range.

    Args:
        sparsity: the old name of ``target_sparsity``, the share of zeros at the end, in (0, 1).
        begin: where the ramp begins, as a share of the run in [0, 1).
        end: where it ends, in (begin, 1 - freeze]; the default leaves a quarter of the run for fine-tuning.
        every: optimiser steps from one pruning to the next, >= 1.
        scope: ``global`` ranks all selected weights together (and may leave little of one layer), ``layer`` each parameter.
        start: the share of zeros at the ramp's beginning, in [0, sparsity).
        select: glob patterns on parameter names, a leading ``!`` excludes; by default every weight matrix of torch's own layers.
            Wildcards reach those of other layers, too (GPT-2's Conv1D, 3-D experts); embeddings and norms need their full name.
        freeze: as in the other forms; the support no longer changes after the ramp without it, too.
        keep_zeros: weights that are zero when the fit starts stay zero, and count among the pruned.
        target_sparsity: the share of zeros at the end, under the name that it has in the other forms.
        finish: where training ends before the ramp does, "keep" leaves the zeros that there are, with a warning, and "prune" prunes to
            the target.

    It has no ``tol``, ``threshold`` or ``gap_samples``: its keep probability is 0 or 1, and it draws no noise.
    """

    needs_separable = False

    def __init__(
        self,
        sparsity: float | None = None,
        begin: float = 0.0,
        end: float = 0.75,
        every: int = 100,
        scope: Scope = "global",
        start: float = 0.0,
        select: Sequence[str] | None = None,
        freeze: float = 0.0,
        keep_zeros: bool = False,
        target_sparsity: float | None = None,
        finish: Finish = "keep",
    ) -> None:
        name = "sparsity" if target_sparsity is None else "target_sparsity"
        self.sparsity = _checks.between(name, _strengths.only_one("MagnitudePruning", "sparsity", sparsity, target_sparsity), 0, 1)
        ramp = Cubic(self.sparsity, begin, end, _checks.between("start", start, 0, self.sparsity, closed="l"))
        rule = TopK(density=float(f"{1 - self.sparsity:.12g}"))  # 0.1, not 0.09999999999999998
        # threshold=0 takes nothing more; without one a form must show that its keep probability falls with |w|
        super().__init__(rule, ramp, select, freeze=freeze, threshold=0.0, keep_zeros=keep_zeros)
        self.begin, self.end, self.start = ramp.begin, ramp.end, ramp.start
        self.target_sparsity, self.finish = self.sparsity, _strengths.check_finish(finish, self.sparsity)
        self.every, self.scope = _checks.whole("every", every, 1), _checks.one_of("scope", scope, ("global", "layer"))
        if self.end + self.freeze > 1 + 1e-9:
            raise ValueError(
                f"the ramp must end before the support is frozen: end must be at most {1 - freeze:g} with freeze={freeze:g}, got {end:g}; "
                "or set freeze=0, since the support is fixed after the ramp anyway"
            )

    def _forget(self) -> None:
        super()._forget()
        self._reached, self._ranked = 0.0, 0  # the share that was last pruned to, and of how many parameters

    # -- conversion ---------------------------------------------------------------------------------------------------

    def _shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("select", "freeze", "keep_zeros", "finish")}

    def own_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sparsity", "begin", "end", "every", "scope", "start")}

    def __repr__(self) -> str:
        return typed(self, self.settings() | {"target_sparsity": None})  # which sparsity is, too

    def to_mask(self, **changes: Any) -> Arguments:
        """The AdaptiveMask of TopK(1 - sparsity) on the same selection: the final density at once, in each parameter."""
        return super().to_mask(**({"penalty": self.given, "finish": "keep"} | changes))

    def to_penalty(self, **changes: Any) -> NoReturn:
        """Raises ValueError: top-k's penalty has no slope."""
        raise ValueError(f"{_NO_SLOPE} or a penalty that has one, such as ReweightedPenalty(penalties.LogSum(eps=2.0), lam=1e-3)")

    def to_prox(self, **changes: Any) -> NoReturn:
        """Raises ValueError: top-k's prox is the pruning itself, and not separable."""
        raise ValueError(f"{_NO_SLOPE} or a fixed threshold, such as AdaptiveProx(penalties.HardThreshold(tau=0.5), lam=1.0, exact=True)")

    # -- what the form uses ---------------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...]:
        """Return w and which weights are kept, whatever values ``w`` (an average's, say) they have."""
        return (w, self.held[name]) if name in self.held else (w, torch.ones_like(w, dtype=torch.bool))

    def eta_of(self, *terms: Tensor) -> Tensor:
        """Infinite for what is kept, 0 for what is pruned."""
        return duality.eta(self.alpha_of(*terms), 1.0)

    def alpha_of(self, *terms: Tensor) -> Tensor:
        """1 for what is kept and 0 for what is pruned."""
        w, kept = terms
        return kept.to(w)

    def cost(self, weights: list[Tensor]) -> float:
        """0: at most as many weights are non-zero as are asked for."""
        return 0.0

    # -- life cycle -------------------------------------------------------------------------------------------------------

    def _hold_zeros(self, names: Iterable[str]) -> None:
        """All weights may live at first, but for zeros that are to be kept."""
        everywhere = {name: elementwise.map_shards(lambda w: torch.ones_like(w, dtype=torch.bool), self._live(name)) for name in names}
        self.held |= everywhere
        super()._hold_zeros(names)

    def _maybe_freeze(self, arrived: bool = False) -> None:
        """Asked whenever the clock has moved."""
        if not self.frozen and self._is_due():
            self._shrink(self.lam, self.parameters)
        super()._maybe_freeze(arrived)

    def _is_due(self) -> bool:
        """Every so many steps of the ramp; at its end; and after it for parameters that came later, since others' zeros stay."""
        since = self.step - round(self.begin * self.total)
        ends = self._reached < self.lam == self.sparsity
        more = self._reached != self.lam or self._ranked != len(self.parameters)
        return since >= 0 and ((since % self.every == 0 and more) or ends)

    def _freeze(self, names: Iterable[str]) -> None:
        if self.frozen:  # no more can be pruned later
            self._shrink(self.sparsity, names)
        super()._freeze(names)

    @torch.no_grad()
    def _shrink(self, share: float, names: Iterable[str]) -> None:
        """Prune up to ``share`` of these parameters, tied ones once; every process ranks the same whole weights."""
        distinct = counts.distinct({name: self.parameters[name] for name in names})
        live = {name: elementwise.full_tensor(self._live(name)) for name in distinct}
        held = {name: elementwise.full_tensor(self.held[name]) for name in live}
        for group in [live] if self.scope == "global" else [{name: w} for name, w in live.items()]:
            for name, kept in shrunk(group, held, share).items():
                self.held[name] = self._part(name, kept)
                elementwise.apply_mask_(self.parameters[name], self.held[name])
        self._reached, self._ranked = share, len(self.parameters)

    @property
    def asked(self) -> float:
        """The share of zeros that the ramp asks for at this step."""
        return self.sparsity if self.frozen else self.lam

    @property
    def planned_end(self) -> float:
        """The ramp's."""
        return self.end

    def unreached(self) -> list[str]:
        """Where the ramp has not ended."""
        if self.frozen or self.lam >= self.sparsity:
            return []
        zeros = f"{self.share_of_zeros():.2%} of the selected weights are zero"
        return [f"{zeros}, its ramp asks for {self.lam:.1%} zeros, not {self.sparsity:.1%}; a smaller end= finishes the ramp earlier"]

    def check_state(self, state: Any) -> None:
        """Its own state of a run that has begun holds a mask for each of the weights; another form's may hold none."""
        super().check_state(state)
        if state.get("begun") and state.get("recipe", {}).get("class_path") == type(self).__name__:
            masks = {"held": state.get("held", {})}
            _states.entry(self, masks, "held", lambda held: held.keys() == state["taken"].keys(), "a mask for each of the weights taken")


_NO_SLOPE = (
    "top-k's penalty is the indicator of 'at most k non-zeros': it has no slope that could be added to a gradient and no prox of its "
    "own at one weight; use to_mask(),"
)
