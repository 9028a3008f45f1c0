"""Define MagnitudePruning: gradual magnitude pruning, the baseline of the comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sparse import _checks, _roles, methods
from lightning_sparse._construction import typed
from lightning_sparse.callbacks import endings
from lightning_sparse.callbacks.form import SparsityCallback
from lightning_sparse.callbacks.options import Finish, only_one
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.duality import Penalty
from lightning_sparse.mask_rules.ranked import TopK
from lightning_sparse.schedules import FINE_TUNED_AGAIN, Cubic
from lightning_sparse.scores import Magnitude, Score
from lightning_sparse.step import ShareOfZeros, Strength
from lightning_sparse.structure import Element, Structure

Scope = Literal["global", "layer"]
END = 0.75  # default share of the run at which the ramp ends


class MagnitudePruning(Sparsifier):
    """Prunes the smallest weights permanently during training until a given share is zero, then fine-tunes the remaining weights.

    The required share of zeros rises as s(u) = sparsity + (start - sparsity) (1 - u)^3, with u from 0 to 1 between the shares
    ``begin`` and ``end`` of the run's optimiser steps (of its batches under manual optimisation). Every ``every`` steps, and at the
    end of the ramp, the round(s n) of n weights with the lowest ``score`` are pruned, by default those of the smallest |w| (of equal
    ones the last), but never all of a parameter.
    Pruned weights are true zeros after each optimiser step, whatever momentum or decay do. ``sparsity/target`` and ``sparsity/lam``
    log s; the zeros lag behind it by up to ``every`` steps. ``sparsity/penalty`` is 0, because top-k's penalty is a constraint,
    which is met.

    Source: Zhu and Gupta, arXiv 1710.01878. Raises ValueError for an argument out of its range.

    Args:
        sparsity: the old name of ``target_sparsity``, the share of zeros at the end, in (0, 1).
        begin: where the ramp begins, as a share of the run in [0, 1).
        end: where the ramp ends, in (begin, 1 - freeze]; the default leaves a quarter of the run for fine-tuning; 0.3 is better for a
            network that was trained before.
        every: optimiser steps from one pruning to the next, >= 1; fewer than 5 prunings in the ramp give a warning. None stands for 100
            steps, or for a tenth of a ramp that is shorter than 1,000.
        scope: ``global`` ranks all selected weights together (and may leave few in one layer), ``layer`` ranks within each parameter.
        start: the share of zeros at the ramp's beginning, in [0, sparsity).
        freeze: as in the other callbacks, but 0 stays 0: the support does not change after the ramp either.
        keep_zeros: weights that are zero when the fit starts stay zero, and count as pruned.
        target_sparsity: the share of zeros at the end, by the name used in the other callbacks.
        score: ranks the weights, the lowest first: Magnitude(), LAMP(), Fisher() and others of lightning_sparse.scores, or your own.
        structure: which weights are zero together, see lightning_sparse.structure. Groups are ranked by the root mean square of their
            weights; the share counts weights.

    It has no ``tol``, ``threshold`` or ``gap_samples``: its keep probability is 0 or 1, and it draws no noise.
    """

    method_type, own_arguments = methods.MagnitudePruning, ("sparsity", "begin", "end", "every", "scope", "start")

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        begin: float = 0.0,
        end: float = END,
        every: int | None = None,
        scope: Scope = "global",
        start: float = 0.0,
        select: Sequence[str] | None = None,
        freeze: float = 0.0,
        keep_zeros: bool = False,
        target_sparsity: float | None = None,
        finish: Finish = "keep",
        score: Score = Magnitude(),  # noqa: B008 - frozen
        least_kept: float = 0.0,
        structure: Structure = Element(),  # noqa: B008 - frozen
    ) -> None:
        name = "sparsity" if target_sparsity is None else "target_sparsity"
        self.sparsity = _checks.share(name, only_one("MagnitudePruning", "sparsity", sparsity, target_sparsity))
        self.every = None if every is None else _checks.whole("every", every, 1)
        self.scope = _checks.one_of("scope", scope, ("global", "layer"))
        if end == END <= _checks.number("begin", begin) < 1:
            raise ValueError(f"begin={begin:g} is not below end={end:g}, its default: also give end, a share of the run in ({begin:g}, 1]")
        ramp = Cubic(self.sparsity, begin, end, _checks.between("start", start, 0, self.sparsity, closed="l"))
        self.begin, self.end, self.start = ramp.begin, ramp.end, ramp.start
        rule = TopK(density=float(f"{1 - self.sparsity:.12g}"))  # 0.1, not 0.09999999999999998
        # threshold=0 removes nothing more; without a threshold the keep probability would have to fall with |w|
        shared: dict[str, Any] = {"select": select, "freeze": freeze, "keep_zeros": keep_zeros, "finish": finish}
        shared |= {"score": score, "least_kept": least_kept, "structure": structure}
        super().__init__(rule, ramp, threshold=0.0, target_sparsity=self.sparsity, **shared)
        if self.end + self.freeze > 1 + 1e-9:
            raise ValueError(
                f"the ramp must end before the support is frozen: end must be at most {1 - freeze:g} with freeze={freeze:g}, got {end:g}; "
                "or set freeze=0, since the support is fixed after the ramp anyway"
            )

    def _make_strength(self, penalty: Penalty, lam: Any, target: float | None) -> Strength:
        return ShareOfZeros(lam)

    def _make_method(self, penalty: Penalty) -> methods.MagnitudePruning:
        return methods.MagnitudePruning(penalty, self.sparsity, self.begin, self.every, self.scope)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.step and self.end == END and _roles.is_trained(pl_module):
            rank_zero_info(
                f"MagnitudePruning: the network was trained before (the biases of a norm are not all equal), and its ramp takes the first "
                f"{END:.0%} of the run. end={1 - FINE_TUNED_AGAIN:.2g} leaves more steps for fine-tuning, which was better in docs/race.md"
            )

    # -- conversion ----------------------------------------------------------------------------------------------------------

    def _shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("select", "freeze", "keep_zeros", "finish", "score", "least_kept", "structure")}

    def __repr__(self) -> str:
        return typed(self, self.settings() | {"target_sparsity": None})  # because sparsity is the same argument

    def to_mask(self, **changes: Any) -> SparsityCallback:
        """Return the AdaptiveMask of TopK(1 - sparsity) on the same selection: the final density from the start, in each parameter."""
        return super().to_mask(**({"penalty": self.given, "finish": "keep"} | changes))

    def to_penalty(self, **changes: Any) -> NoReturn:
        """Raise ValueError: top-k's penalty has no slope."""
        raise ValueError(f"{_NO_SLOPE} or a penalty that has one, such as ReweightedPenalty(penalties.LogSum(eps=2.0), lam=1e-3)")

    def to_prox(self, **changes: Any) -> NoReturn:
        """Raise ValueError: top-k's prox is the pruning itself, and not separable."""
        raise ValueError(f"{_NO_SLOPE} or a fixed threshold, such as AdaptiveProx(penalties.HardThreshold(tau=0.5), lam=1.0, exact=True)")

    # -- goals ---------------------------------------------------------------------------------------------------------------

    @property
    def planned_end(self) -> float:
        """Return the share of the run at which the ramp ends."""
        return self.end

    def unreached(self) -> list[str]:
        """Describe what is missing if the ramp has not ended, or has ended with fewer zeros than it asked for; empty otherwise."""
        if self.frozen or self.lam >= self.sparsity:
            return endings.short_of_target(self.options, self.support, self.strength)
        zeros = f"{self.share_of_zeros():.2%} of the selected weights are zero"
        return [f"{zeros}, its ramp has reached {self.lam:.1%} zeros, not {self.sparsity:.1%}; a smaller end= finishes the ramp earlier"]


_NO_SLOPE = (
    "top-k's penalty is the indicator of 'at most k non-zeros': it has no slope that could be added to a gradient and no prox of its "
    "own at one weight; use to_mask(),"
)
