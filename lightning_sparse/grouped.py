"""Show the groups of weights to a training method as if each were one weight: its size r_g, the root mean square.

A method works on :class:`GroupedWeights` as on single weights and does not know the structure. What it does to the sizes is then done
to the weights, along their own direction w_g / r_g: a gradient in r_g adds that gradient times w_g / r_g, a new size multiplies w_g by
its ratio to the old one, a mask of r_g multiplies all of w_g. (d_g omega(r_g) has the gradient omega'(r_g) w_g / r_g.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_sparse import elementwise
from lightning_sparse._parts import Part, check_whole, part_of
from lightning_sparse.scores import fewest
from lightning_sparse.step_sizes import Rate, StepSizes
from lightning_sparse.structure import Coupled, Structure, check_groups
from lightning_sparse.weights import Attachment, Member, Place, WeightStore

Values = Callable[[str], Tensor]
Tensors = Mapping[str, Tensor]


class Groups:
    """The groups of a run, by the name of the parameter that leads each set of them.

    Args:
        parts: the weights that make up the groups' sizes and carry their scale, by leader; a group may have weights in several parameters.
        along: further weights that are zero where the group is, by leader; no part of its size r_g or of its number of weights d_g.
        keeps_one: the largest group of a leader is never zero.
        elsewhere: parameters with weights in removable groups of another kind, which are not among these.
        costs: what a weight of a parameter costs, such as the multiply-adds of one call that it takes part in; None for 1 of each.
    """

    def __init__(
        self,
        parts: Mapping[str, list[Part]],
        along: Mapping[str, list[Part]] | None = None,
        keeps_one: bool = False,
        elsewhere: Iterable[str] = (),
        costs: Mapping[str, float] | None = None,
    ) -> None:
        self.parts, self.along, self.keeps_one, self.elsewhere = dict(parts), dict(along or {}), keeps_one, frozenset(elsewhere)
        self.costs = None if costs is None else dict(costs)
        self._counts: dict[tuple[str, bool], Tensor] = {}  # weights in each group, by leader and whether they are split

    def of(self, name: str) -> list[tuple[str, Part]]:
        """Return (leader, part) of each set of groups whose sizes a parameter's weights make up."""
        return [(leader, part) for leader, parts in self.parts.items() for part in parts if part.name == name]

    def leaders_of(self, names: Iterable[str]) -> list[str]:
        """Return the leaders whose groups have a weight in one of these parameters."""
        wanted = set(names)
        return [leader for leader in self.parts if any(part.name in wanted for part in self.members(leader))]

    def members(self, leader: str) -> list[Part]:
        """Return all parts that are zero together."""
        return [*self.parts[leader], *self.along.get(leader, ())]

    def names(self, leader: str) -> list[str]:
        """Return the parameters with weights that are zero together."""
        return list(dict.fromkeys(part.name for part in self.members(leader)))

    def total(self, leader: str, values: Values, function: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Return the sum over each group of ``function(weights, name)``, at least in float32."""
        sums = [part.pool(function(wide(values(part.name)), part.name)) for part in self.parts[leader]]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def count(self, leader: str, values: Values) -> Tensor:
        """Return the number d_g of weights that make up each group's size; weights that are zero along with it do not count."""
        key = leader, elementwise.is_sharded(values(self.parts[leader][0].name))
        if key not in self._counts:
            self._counts[key] = self.total(leader, values, lambda w, _: torch.ones_like(w))
        return self._counts[key]

    def mean(self, leader: str, values: Values) -> Tensor:
        """Return the mean of ``values`` over each group."""
        return self.total(leader, values, lambda value, _: value) / self.count(leader, values)

    def cost(self, leader: str, alive: Values) -> Tensor:
        """Return what the ``alive`` weights that are zero with each group cost."""
        costs = {part: 1.0 if self.costs is None else self.costs.get(part.name, 0.0) for part in self.members(leader)}
        return torch.stack([part.pool(wide(alive(part.name))) * cost for part, cost in costs.items()]).sum(0)

    def size(self, leader: str, values: Values) -> Tensor:
        """Return the root mean square of each group's weights."""
        return self.total(leader, values, lambda w, _: w * w).div_(self.count(leader, values)).sqrt_()

    def left(self, values: Values) -> dict[str, tuple[int, int]]:
        """Return (groups that are not zero, groups) of each leader; a collective for weights that are split over processes."""
        sizes = {leader: self.size(leader, values) for leader in self.parts}
        live = {leader: elementwise.sum_shards(elementwise.local_part(size).count_nonzero(), size) for leader, size in sizes.items()}
        return {leader: (int(live[leader]), size.numel()) for leader, size in sizes.items()}

    def zeros(self, found: Mapping[str, Tensor], values: Mapping[str, Tensor], sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks of the zeros of ``values`` where ``found`` says which groups are zero."""
        masks: dict[str, Tensor] = {}
        for leader, zero in found.items():
            gone = _without_largest(zero, sizes[leader]) if self.keeps_one else zero
            for part in self.members(leader):
                if part.name in values:
                    mask = part.spread(gone, values[part.name], False).expand_as(values[part.name])
                    masks[part.name] = masks[part.name] | mask if part.name in masks else mask
        return {name: masks[name].clone() if name in masks else torch.zeros_like(w, dtype=torch.bool) for name, w in values.items()}

    @staticmethod
    def staying(count: int, least: float) -> int:
        """Return how many of the ``count`` groups of a leader ranking never removes."""
        return min(max(1, fewest(least, count)), count)

    def keep_highest(
        self, scores: Tensors, values: Tensors, zeros: float, least: float = 0.0, held: Tensors | None = None
    ) -> dict[str, Tensor]:
        """Return the boolean masks of ``values`` that leave the share ``zeros`` of them zero, and up to one group more.

        The groups of the lowest score go first; of each leader at least one stays, and the share ``least``. A weight that is in several
        groups counts once.

        Args:
            scores: the scores of the groups, by leader.
            values: tensors of the parameters' shapes, by name.
            zeros: share of the weights.
            least: share of each leader's groups that stay.
            held: masks of the weights that may be non-zero, by name; the others count as zero also where their group stays.
        """
        known = {leader: score.float().reshape(-1) for leader, score in scores.items()}
        for leader, score in known.items():
            kept = score.argsort(descending=True, stable=True)[: self.staying(len(score), least)]
            known[leader] = score.index_fill(0, kept, torch.inf)
        every = torch.cat(list(known.values()))
        place = torch.empty(len(every), dtype=torch.long)  # of each group in the order of removal
        place[every.cpu().argsort(stable=True)] = torch.arange(len(every))

        def removed(count: int) -> dict[str, Tensor]:
            gone = (place < count) & every.cpu().isfinite()
            parts = zip(scores.items(), gone.split([len(score) for score in known.values()]), strict=True)
            return self.zeros({name: part.reshape(score.shape).to(score.device) for (name, score), part in parts}, values, scores)

        def reaches(count: int) -> bool:
            gone = (mask | ~held[name] if held and name in held else mask for name, mask in removed(count).items())
            return sum(int(mask.sum()) for mask in gone) >= round(zeros * sum(value.numel() for value in values.values()))

        count = bisect_left(range(len(every) + 1), True, key=reaches)
        return {name: ~mask for name, mask in removed(count).items()}


def _without_largest(zero: Tensor, size: Tensor) -> Tensor:
    flat = zero.clone().reshape(-1)
    flat[size.reshape(-1).argmax()] &= ~zero.all()
    return flat.reshape(zero.shape)


def wide(w: Tensor) -> Tensor:
    """Return ``w`` in float32 at least."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


def ratio(new: Tensor, old: Tensor, empty: float = 0.0) -> Tensor:
    """Return new / old, and ``empty`` where old is 0."""
    return torch.where(old > 0, new / old.clamp(min=torch.finfo(old.dtype).tiny), empty)


class GroupedWeights:
    """The sizes of groups in the place of weights, as a :class:`WeightStore` for a method: one parameter of sizes for each leader."""

    def __init__(self, real: WeightStore, groups: Groups) -> None:
        self.real, self.groups = real, groups
        self._sizes = {leader: Parameter(self.live(leader), requires_grad=False) for leader in groups.parts}
        self._attachment: GroupAttachment | None = None

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Return the sizes of the groups by leader; trainable where their weights are."""
        for leader, size in self._sizes.items():
            size.requires_grad_(self.real.parameters[self._first(leader)].requires_grad)
        return self._sizes

    def _first(self, leader: str) -> str:
        return self.groups.parts[leader][0].name

    @property
    def optimizers(self) -> list[Optimizer]:
        return self.real.optimizers

    @property
    def places(self) -> dict[str, Place]:
        """Return the optimiser and the number of its group that step a leader's weights."""
        firsts = {leader: self._first(leader) for leader in self._sizes}
        return {leader: self.real.places[name] for leader, name in firsts.items() if name in self.real.places}

    def members(self, optimizer: Optimizer) -> list[Member]:
        """Return (leader, sizes, group) of each leader whose weights ``optimizer`` updates."""
        groups = {name: group for name, _, group in self.real.members(optimizer)}
        return [(leader, size, groups[self._first(leader)]) for leader, size in self._sizes.items() if self._first(leader) in groups]

    @torch.no_grad()
    def live(self, leader: str) -> Tensor:
        """Return the sizes of the live weights' groups."""
        return self.groups.size(leader, self.real.live)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the weights."""
        return self.real.gradients()

    @property
    def attachment(self) -> GroupAttachment | None:
        """Return the hooks on the module during a fit."""
        real = self.real.attachment
        if real is None or self._attachment is None or self._attachment.real is not real:
            self._attachment = None if real is None else GroupAttachment(real, self)
        return self._attachment

    # -- steps -----------------------------------------------------------------------------------------------------------------

    def _trained(self, leader: str) -> list[tuple[Part, Parameter]]:
        found = [(part, self.real.parameters[part.name]) for part in self.groups.parts[leader]]
        return [(part, parameter) for part, parameter in found if parameter.grad is not None]

    @torch.no_grad()
    def before_optimizer(self, method: Any, step: Any) -> None:
        """Call the method's ``before_optimizer`` on sizes, and add what it adds to their gradients to those of the weights."""
        inner = self._step(step)
        method.before_optimizer(inner)
        for leader, size, _ in inner.members:
            if size.grad is not None and bool(elementwise.local_part(size.grad).any()):
                pull = elementwise.map_shards(ratio, size.grad, size)
                for part, parameter in self._trained(leader):
                    w = self.real.live(part.name)
                    grad, own, spread = map(elementwise.local_part, (parameter.grad, w, part.spread(pull, w, 0.0)))
                    grad.addcmul_(own.to(grad.dtype), spread.to(grad.dtype))
            size.grad = None

    @torch.no_grad()
    def after_optimizer(self, method: Any, step: Any) -> None:
        """Call the method's ``after_optimizer`` on sizes, and multiply the weights by the ratio of what it makes of them."""
        inner = self._step(step)
        before = {leader: size.detach().clone() for leader, size, _ in inner.members}
        method.after_optimizer(inner)
        for leader, size, _ in inner.members:
            if not torch.equal(*map(elementwise.local_part, (size.detach(), before[leader]))):
                factor = elementwise.map_shards(partial(ratio, empty=1.0), size, before[leader])
                for part, parameter in self._trained(leader):
                    own, spread = map(elementwise.local_part, (parameter.detach(), part.spread(factor, parameter, 1.0)))
                    own.mul_(spread.to(own.dtype))
            size.grad = None

    def _step(self, step: Any) -> Any:
        """Return the step on sizes: those of the live weights, with a gradient of zeros where the weights have one."""
        members = self.members(step.optimizer)
        for leader, size, _ in members:
            size.data.copy_(self.live(leader))
            size.grad = torch.zeros_like(size) if self._trained(leader) else None
        return replace(step, members=members, live=self.live, sizes=GroupStepSizes(step.sizes, self))


def mean_rate(
    groups: Groups, leader: str, weights: WeightStore, sizes: StepSizes, optimizer: Optimizer, group: dict[str, Any], added: bool
) -> Rate:
    """Return the step size of groups: that of the mean over a group of the state that each weight has."""
    parts = groups.parts[leader]
    rates = {part.name: sizes.of(optimizer, weights.parameters[part.name], group, added) for part in parts}
    first, group = rates[parts[0].name]
    state = dict(first)
    for key, value in first.items():
        if isinstance(value, Tensor) and value.shape == weights.parameters[parts[0].name].shape and value.dim():
            means = [part.pool(wide(rates[part.name].state[key])) for part in parts if key in rates[part.name].state]
            state[key] = sum(means) / groups.count(leader, weights.live)
    return Rate(state, group)


class GroupStepSizes(StepSizes):
    """The step sizes of groups."""

    def __init__(self, real: StepSizes, weights: GroupedWeights) -> None:
        self.real, self.weights = real, weights

    def of(self, optimizer: Optimizer, parameter: Tensor, group: dict[str, Any], added: bool = False) -> Rate:
        leader = next(name for name, size in self.weights.parameters.items() if size is parameter)
        return mean_rate(self.weights.groups, leader, self.weights.real, self.real, optimizer, group, added)


class GroupAttachment:
    """Masks groups in forwards, and reads the gradients of their sizes: a :class:`weights.Attachment` for a method."""

    def __init__(self, real: Attachment, weights: GroupedWeights) -> None:
        self.real, self.weights, self.groups = real, weights, weights.groups
        self._masks: dict[str, Tensor] = {}  # the last ones, by leader

    def __getattr__(self, name: str) -> Any:  # what does not depend on groups: hooks on layers, restore
        if name in ("real", "weights", "groups", "_masks"):
            raise AttributeError(name)
        return getattr(self.real, name)

    @property
    def parameters(self) -> dict[str, Parameter]:
        return self.weights.parameters

    def live(self, leader: str) -> Tensor:
        return self.weights.live(leader)

    @torch.no_grad()
    def multiply(self, leader: str, mask: Tensor, product: Tensor | None = None) -> None:
        """Multiply all weights of each group by its mask, and their gradients; a parameter of several leaders by all their masks."""
        self.parameters[leader].data.copy_(self.live(leader) * mask if product is None else product)
        self._masks[leader] = mask
        for part, w in self._masked(leader):
            found = [own.spread(self._masks[one], w, 1.0) for one, own in self.groups.of(part.name) if one in self._masks]
            self.real.multiply(part.name, reduce(torch.mul, found).to(w.dtype))

    @torch.no_grad()
    def substitute(self, leader: str, value: Tensor) -> None:
        """Give the groups these sizes; the gradient stays that of the changed weights."""
        self.parameters[leader].data.copy_(value)
        factor = ratio(value, self.live(leader), 1.0)
        for part, w in self._masked(leader):
            self.real.substitute(part.name, w * part.spread(factor, w, 1.0).to(w.dtype))

    def _masked(self, leader: str) -> Iterator[tuple[Part, Tensor]]:
        return ((part, self.real.live(part.name)) for part in self.groups.parts[leader] if part.is_masked)

    def on_gradient(self, leader: str, function: Callable[[Tensor], None]) -> None:
        """Call ``function`` with what each parameter adds to the gradient in the sizes, divided by the number of weights."""
        for part in self.groups.parts[leader]:
            if part.is_masked:
                self.real.on_gradient(part.name, partial(self._in_size, leader, part, function))

    def _in_size(self, leader: str, part: Part, function: Callable[[Tensor], None], grad: Tensor) -> None:
        w, size = self.real.live(part.name), self.live(leader)
        along = part.pool(wide(grad.detach()) * wide(w))
        function(ratio(along, size * self.groups.count(leader, self.real.live), 0.0))

    def live_in_evaluation(self, leaders: Iterable[str]) -> None:
        self.real.live_in_evaluation([part.name for leader in leaders for part in self.groups.parts[leader] if part.is_masked])


def groups_within(structure: Structure, parameters: Mapping[str, Tensor]) -> Groups:
    """Return the groups within each parameter; raise ValueError for those that it cannot group, or that processes cut."""
    if isinstance(structure, Coupled):
        raise TypeError(f"{structure!r} needs a module: Run.alone(..., module=module, example_inputs=inputs)")
    for name, parameter in parameters.items():
        check_groups(structure, name, parameter)
        check_whole(structure, name, parameter)
    return Groups({name: [part_of(structure, name)] for name in parameters})
