"""Decide which weights count as zero, and keep zeros: those present at the start, removed by rank, or frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import counts, elementwise
from lightning_sparse import optimizer as steps
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import Engine
from lightning_sparse.gradient_squares import GradientSquares
from lightning_sparse.grouped import Groups, mean_rate
from lightning_sparse.optimizer import ClipFactor
from lightning_sparse.scores import LAMP, Magnitude, Ranked, Score, check_weights, checked, keep_highest
from lightning_sparse.step import Strength
from lightning_sparse.step_sizes import StepSizes
from lightning_sparse.structure import Element, Structure
from lightning_sparse.weights import WeightStore

RESTING = 0.5  # a parameter is left to train if more than this share of its remaining weights counts as zero without being removed


class Formulas(Protocol):
    """The elementwise formulas of a method (see :class:`lightning_sparse.methods.base.Method`)."""

    penalty: Penalty
    adds_gradients: ClassVar[bool]
    takes_groups: ClassVar[bool]
    solvable: ClassVar[bool]

    @property
    def oscillates(self) -> bool: ...
    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None: ...
    def eta(self, lam: float, *terms: Tensor) -> Tensor: ...
    def alpha(self, lam: float, *terms: Tensor) -> Tensor: ...
    def is_at_rest(self, lam: float, rho: Tensor | float, memory: float, *terms: Tensor) -> Tensor: ...
    def penalty_value(self, weights: list[Tensor], lam: float) -> float: ...


class Support:
    """Decides which of the selected weights are zero, and keeps pruned weights at zero.

    Args:
        weights: the selected weights.
        method: its keep probability and zero region.
        strength: lam in force.
        engine: runs the formulas over many tensors.
        sizes: step sizes of the optimisers.
        clipping: the factor by which gradients are clipped.
        tol: a weight counts as zero when its keep probability is below ``tol``.
        threshold: weights of at most this magnitude also count as zero; None for no threshold.
        score: ranks the weights that are removed towards a target.
        least: share of each parameter's weights that ranking keeps, and at least one.
        structure: which weights are zero together.
    """

    def __init__(
        self,
        weights: WeightStore,
        method: Formulas,
        strength: Strength,
        engine: Engine,
        sizes: StepSizes,
        clipping: ClipFactor,
        tol: float = 0.05,
        threshold: float | None = None,
        score: Score = LAMP(),  # noqa: B008 - frozen
        least: float = 0.0,
        structure: Structure = Element(),  # noqa: B008 - frozen
    ) -> None:
        self.weights, self.method, self.strength, self.engine = weights, method, strength, engine
        self.sizes, self.clipping, self.tol, self.threshold = sizes, clipping, tol, threshold
        self.score, self.least, self.structure = score, least, structure
        self.squares = GradientSquares(score, weights)
        self._scored: set[str] = set()  # parameters or groups whose scores have been checked
        self.groups: Groups | None = None  # in a run, of a structure that groups weights
        # masks of the weights that may be non-zero, by name:
        self.frozen: dict[str, Tensor] | None = None  # for the rest of the run
        self.held: dict[str, Tensor] = {}  # by keep_zeros, or after pruning
        self.cut: dict[str, Tensor] = {}  # after removal by rank towards a target

    @property
    def is_frozen(self) -> bool:
        """Return True if the support no longer changes."""
        return self.frozen is not None

    @property
    def asked(self) -> float | None:
        """Return the share of zeros that the target asks for now; None without a target."""
        return self.strength.share_asked(self.is_frozen)

    @property
    def needs_step_sizes(self) -> bool:
        """Return True if the zero test depends on the optimiser's step size."""
        return self.method.oscillates and self.method.penalty.separable

    # -- formulas ------------------------------------------------------------------------------------------------------------

    def eta(self, name: str, w: Tensor) -> Tensor:
        """Return the eta that the method uses for values ``w`` of a parameter."""
        return self._of_weights(name, w, self._eta, torch.inf)

    def keep_probability(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return alpha of each weight of a parameter, as the method uses it, or of other values ``w`` such as an average."""
        return self._of_weights(name, (self.weights.live(name) if w is None else w).detach(), self._alpha, 1.0)

    @property
    def _groups(self) -> Groups | None:
        """Return the groups that the formulas are of; None for single weights."""
        return self.groups if self.method.takes_groups else None

    def _of_weights(self, name: str, w: Tensor, formula: Callable[..., Tensor], unknown: float) -> Tensor:
        """Return a formula of each weight of a parameter, or of its group's size; ``unknown`` for weights that are in no group."""
        if self._groups is None:
            return self._of_terms(name, w, formula, unknown)
        found = torch.full_like(w, unknown)
        with torch.no_grad():
            for leader, part in self._groups.of(name):
                value = self._of_terms(leader, self._groups.size(leader, self._with({name: w})), formula, unknown)
                found = torch.minimum(found, part.spread(value, w, unknown).expand_as(w).to(w.dtype))
        return found

    def _of_terms(self, name: str, w: Tensor, formula: Callable[..., Tensor], unknown: float) -> Tensor:
        """Return a formula of values ``w``, weights or sizes; ``unknown`` where the method has no terms for them yet."""
        terms = self.method.terms(name, w)
        return torch.full_like(w, unknown) if terms is None else self._map([terms], formula)[0]

    def _with(self, values: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        """Return a lookup of these values, and of the live weights of other parameters."""
        return lambda name: values[name].detach() if name in values else self.weights.live(name)

    def penalty_value(self, values: Mapping[str, Tensor]) -> float:
        """Return lam * Omega of the parameters' weights; a collective for weights that are split over processes."""
        if self._groups is None:
            return self.method.penalty_value([*values.values()], self.strength.lam)
        known, total = self._with(values), 0.0
        for leader in self._groups.parts:
            size, count = self._groups.size(leader, known), elementwise.local_part(self._groups.count(leader, known))
            cost = self.method.penalty.omega(elementwise.local_part(size)) * count
            total += float(elementwise.sum_shards(cost.sum(dtype=torch.float64), size))
        return self.strength.lam * total

    def _eta(self, *terms: Tensor) -> Tensor:
        return self.method.eta(self.strength.lam, *terms)

    def _alpha(self, *terms: Tensor) -> Tensor:
        return self.method.alpha(self.strength.lam, *terms)

    def _map(self, rows: Sequence[tuple[Tensor, ...]], function: Callable[..., Tensor], scalars: Sequence[float] = ()) -> list[Tensor]:
        return self.engine.map(list(zip(*rows, strict=True)), function, scalars, separable=self.method.penalty.separable)

    # -- what counts as zero -----------------------------------------------------------------------------------------------

    def zeros(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return which weights of a parameter (or other values ``w`` for it) count as zero: see :meth:`zeros_of`."""
        return self.zeros_of({name: self.weights.live(name) if w is None else w})[name]

    def all_zeros(self) -> dict[str, Tensor]:
        """Return :meth:`zeros_of` the weights of every parameter."""
        return self.zeros_of(self.weights.all_live())

    @torch.no_grad()
    def zeros_of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which of these values of parameters' weights count as zero.

        Once the support is frozen: all weights outside of it. Before: weights with alpha < ``tol`` or |w| <= ``threshold``, those in
        the penalty's zero region (the optimiser's steps only oscillate around zero there), and those removed by rank.
        """
        if self.frozen is not None:
            return {name: ~self.frozen[name].to(w.device) for name, w in values.items()}
        found = self._tested(values) if self._groups is None else self._tested_groups(self._groups, values)
        if self.structure.ranks_within:
            scores = {name: self.keep_probability(name, w) * w.detach().abs() for name, w in values.items()}
            found = {name: elementwise.map_shards(self.structure.project, zeros, scores[name]) for name, zeros in found.items()}
        return {name: found[name] | ~self.cut[name].to(found[name].device) if name in self.cut else found[name] for name in values}

    def _tested_groups(self, groups: Groups, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Test the sizes of the groups that these values belong to."""
        known = self._with(values)
        sizes = {leader: groups.size(leader, known) for leader in groups.leaders_of(values)}
        found = groups.zeros(self._tested(sizes), values, sizes)
        return {name: zeros | ~self.held[name].to(zeros.device) if name in self.held else zeros for name, zeros in found.items()}

    def _tested(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Test weights, or sizes of groups by their leader."""
        kinds: dict[tuple[Any, ...], list[tuple[str, tuple[Tensor, ...]]]] = {}
        for name, w in values.items():
            terms = self.method.terms(name, w.detach())
            sizes, scalars = self._step_size(name)
            kind = (-1 if terms is None else len(terms), len(sizes), scalars)
            kinds.setdefault(kind, []).append((name, (*(terms or (w.detach(),)), *sizes)))
        found: dict[str, Tensor] = {}
        for (count, _, scalars), members in kinds.items():
            zeros = self._map([row for _, row in members], partial(self._is_zero, count), scalars)
            found |= zip((name for name, _ in members), zeros, strict=True)
        return found

    def _is_zero(self, count: int, *row: Any) -> Tensor:
        """Test for zero; ``row`` holds ``count`` terms (or only w if unknown), then the step size's terms and the memory, if any."""
        w, terms, size = row[0], row[: max(count, 0)], row[max(count, 1) :]
        below: Tensor = w == 0
        if count > 0:
            below = below | (self._alpha(*terms) < self.tol)
        if size:
            lam = self.strength.lam * self.clipping.mean
            below = below | self.method.is_at_rest(lam, steps.step_size(*size[:-1]), size[-1], *(terms or (w,)))
        return below if self.threshold is None else below | (w.abs() <= self.threshold)

    def _step_size(self, name: str) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """Return tensors and numbers that the zero region of a parameter's weights depends on; empty if there is no such region."""
        first = name if self._groups is None else self._groups.parts[name][0].name
        if first not in self.weights.places or self.strength.lam <= 0 or not self.needs_step_sizes:
            return (), ()
        optimizer, number = self.weights.places[first]
        parameter, group, added = self.weights.parameters[first], optimizer.param_groups[number], self.method.adds_gradients
        if self._groups is None:
            state, group = self.sizes.of(optimizer, parameter, group, added=added)
        else:
            state, group = mean_rate(self._groups, name, self.weights, self.sizes, optimizer, group, added)
        sizes, scalars = steps.step_size_terms(state, group, "auto")
        return sizes, (*scalars, steps.settling_steps(group, scaled=bool(sizes)))

    def thresholded(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return a parameter's weights (or other values ``w`` for it) with true zeros, as in evaluation and in files."""
        w = self.weights.live(name) if w is None else w
        return w.masked_fill(self.zeros(name, w), 0.0)

    def groups_left(self, values: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Return, for each set of groups, how many are not zero in these values with true zeros, and how many there are."""
        return {} if self.groups is None else self.groups.left(self._with(values))

    def group_members(self, leader: str) -> list[str]:
        """Return the parameters that have weights in the groups of a leader."""
        return [] if self.groups is None else self.groups.names(leader)

    def share_of_zeros(self) -> float:
        """Return the share of the selected weights that count as zero; tied ones count once."""
        return counts.share(counts.count_zeros(self.weights.parameters, self.all_zeros()))

    @torch.no_grad()
    def prune(self) -> None:
        """Set the weights that count as zero to zero in every selected parameter, permanently."""
        self.weights.restore()
        zeros = self.all_zeros()
        self.weights.write((name, self.weights.live(name).masked_fill(zeros[name], 0.0)) for name in self.weights.parameters)

    @torch.no_grad()
    def lost(self) -> float:
        """Return the share of the weights' squared norm that pruning would remove."""
        zeros = self.all_zeros()
        taken = norm = 0.0
        for name, w in self.weights.all_live().items():
            squares = elementwise.local_part(w).double().square()
            taken += float(elementwise.sum_shards(squares[elementwise.local_part(zeros[name])].sum(), w))
            norm += float(elementwise.sum_shards(squares.sum(), w))
        return taken / norm if norm > 0 else 0.0

    # -- zeros that stay -------------------------------------------------------------------------------------------------------

    def keep_zeros(self, names: Iterable[str]) -> None:
        """Keep the weights that are zero now at zero."""
        self.held |= {name: self.weights.live(name) != 0 for name in names}

    @torch.no_grad()
    def hold_(self, optimizer: Optimizer) -> None:
        """Set the pruned weights of ``optimizer`` to zero again after its step."""
        for masks in (self.held, self.cut) if self.frozen is None else (self.frozen,):
            if masks:
                members = self.weights.members(optimizer)
                elementwise.apply_masks_((parameter, masks[name]) for name, parameter, _ in members if name in masks)

    @torch.no_grad()
    def freeze(self, names: Iterable[str], target: float | None = None) -> None:
        """Freeze the supports of these parameters: their non-zero weights, or the highest ranks that leave ``target`` zeros."""
        self.weights.restore()
        before, self.frozen = self.frozen or {}, None
        fresh = {name: ~self.zeros(name) for name in names} if target is None else self.highest_ranked(target)
        elementwise.apply_masks_((self.weights.parameters[name], kept) for name, kept in fresh.items())
        self.frozen, self.cut = before | fresh, {}

    @torch.no_grad()
    def freeze_zeros(self, besides: Mapping[str, Tensor] | None = None) -> None:
        """Freeze the supports to the parameters' non-zero data, and to the weights ``besides``, which are zero and may grow."""
        self.frozen = {name: parameter.detach() != 0 for name, parameter in self.weights.parameters.items()}
        for name, where in (besides or {}).items():
            self.frozen[name] |= where.to(self.frozen[name].device)

    @torch.no_grad()
    def prune_to(self, share: float) -> None:
        """Remove the weights of the lowest rank, so that ``share`` of all is zero; they stay zero until the support is frozen.

        Weights that count as zero already go first, but not in a parameter most of whose remaining weights do: it may have started at zero,
        and learn later. Groups always go as a whole.
        """
        self.weights.restore()
        before, resting = self.cut, self.all_zeros()
        self.cut = self.highest_ranked(share)
        for name, kept in self.cut.items() if self.groups is None else ():
            left = before.get(name, torch.ones_like(kept))
            rest = resting[name] & left
            if elementwise.sum_shards(elementwise.local_part(rest.float() - RESTING * left.float()).sum(), kept) > 0:
                kept |= rest
        elementwise.apply_masks_((self.weights.parameters[name], kept) for name, kept in self.cut.items())

    def highest_ranked(self, zeros: float) -> dict[str, Tensor]:
        """Return the masks that leave this share of zeros over all parameters: weights that count as zero go first, then the lowest scores.

        The score ranks alpha * w. See :func:`lightning_sparse.scores.keep_highest`.
        """
        alive = {name: ~elementwise.full_tensor(where) for name, where in self.all_zeros().items()}
        everywhere = {name: torch.ones_like(whole) for name, whole in alive.items()}
        distinct = counts.distinct(self.weights.parameters)  # tied parameters share the mask
        kept = everywhere | self.keep_highest({name: alive[name] for name in distinct}, zeros)
        if self.groups is not None:  # because zeros that are held may lie in groups that stay
            kept |= {name: kept[name] & elementwise.full_tensor(held) for name, held in self.held.items() if name in kept}
        return {name: self.weights.part(name, whole) for name, whole in kept.items()}

    def keep_highest(self, alive: Mapping[str, Tensor], zeros: float) -> dict[str, Tensor]:
        """Return the masks of these whole parameters that leave a share of ``zeros``, ranked by the score; a collective."""
        if self.groups is not None:
            held = {name: elementwise.full_tensor(self.held[name]).to(alive[name].device) for name in alive if name in self.held}
            return self.groups.keep_highest(self._scores_of_groups(self.groups, alive), alive, zeros, self.least, held)
        scores = {name: self._score(self._ranked(name, where)) for name, where in alive.items()}
        if self.structure.ranks_within:  # what the structure keeps ranks above all that it does not
            gone = {name: self.structure.project(torch.zeros_like(alive[name]), score) for name, score in scores.items()}
            scores = {name: score.float().masked_fill(~gone[name], torch.inf) for name, score in scores.items()}
        return keep_highest(scores, alive, zeros, self.least, self._left(alive) if self.least else None)

    def _left(self, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return where these whole parameters have weights that are not zero and have not been removed, at rest or not."""
        left = {name: elementwise.full_tensor(self.weights.live(name)) != 0 for name in alive}
        for masks in (self.cut, self.held):
            for name in left.keys() & masks.keys():
                left[name] &= elementwise.full_tensor(masks[name]).to(left[name].device)
        return {name: where.to(alive[name].device) for name, where in left.items()}

    @torch.no_grad()
    def check_score(self) -> None:
        """Raise TypeError or ValueError before training if a score of one's own does not fit the weights."""
        known = self.weights.live
        live = self.weights.all_live() if self.groups is None else {leader: self.groups.size(leader, known) for leader in self.groups.parts}
        check_weights(self.score, {name: elementwise.full_tensor(w) for name, w in live.items()})

    def _score(self, given: Ranked) -> Tensor:
        """Return the scores of a parameter or of groups: |w| where the score needs its gradients and none has been measured."""
        known = given.squares is not None or not self.score.needs_squares
        return checked(self.score, given, self._scored) if known else Magnitude().of(given)

    @torch.no_grad()
    def _scores_of_groups(self, groups: Groups, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores of the groups of these parameters, by leader: of their sizes, -1 where the group is zero already."""
        scores = {}

        def left(name: str) -> Tensor:
            return alive[name].float() if name in alive else (elementwise.full_tensor(self.weights.live(name)) != 0).float()

        for leader in groups.leaders_of(alive):
            size = elementwise.full_tensor(groups.size(leader, self.weights.live))
            alpha = self._of_terms(leader, size, self._alpha, 1.0) if self.method.takes_groups else torch.ones_like(size)
            share = groups.mean(leader, left)
            score = self._score(Ranked(leader, alpha * size, share > 0, alpha, self.squares.of(leader)))
            if self.score.is_loss:
                score = score / groups.cost(leader, left).clamp(min=1.0)
            scores[leader] = score.masked_fill(share == 0, -1.0)
        return scores

    def _ranked(self, name: str, alive: Tensor) -> Ranked:
        alpha, w = (elementwise.full_tensor(part) for part in (self.keep_probability(name), self.weights.live(name)))
        return Ranked(name, alpha * w, alive, alpha, self.squares.of(name) if self.score.needs_squares else None)
