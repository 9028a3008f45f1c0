"""Define the base of the training methods, and the run that a method works in.

Torch only: any training loop can call a method's moments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import duality, proximal
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import Engine
from lightning_sparse.grouped import GroupedWeights, groups_within
from lightning_sparse.optimizer import ClipFactor
from lightning_sparse.step import Scale, Step, Strength
from lightning_sparse.step_sizes import StepSizes
from lightning_sparse.structure import Coupled, Element, Structure
from lightning_sparse.support import Support
from lightning_sparse.weights import Member, WeightStore

__all__ = ["Member", "Method", "Run", "Scale", "Step"]

Reduce = Callable[[Tensor], Tensor]
# of a step, in order
MOMENTS = ("before_forward", "before_backward", "after_backward", "before_optimizer", "after_optimizer", "progress", "after_batch")


class OnGroups:
    """A method that works on the sizes of groups in an optimiser's step."""

    def __init__(self, weights: GroupedWeights, method: Any) -> None:
        self.before_optimizer = partial(weights.before_optimizer, method)
        self.after_optimizer = partial(weights.after_optimizer, method)


@dataclass
class Run:
    """Gives a method the objects of a training run, and its connections to other processes and to the user.

    Args:
        weights: the selected weights, or the sizes of their groups.
        strength: lam and the current step.
        engine: runs functions over many tensors.
        support: decides what counts as zero.
        manual: manual optimisation, with several backwards and steps a batch.
        seed: the seed of the noise, equal in all processes.
        rank: this process's number.
        mean: averages a tensor over processes; None for a single process.
        total: sums a tensor over processes.
        batches: batches of an epoch, or of the run if its loader has no length; inf if both are unknown.
        warn: issues a warning once, on one process.
        info: logs a message once, on one process.
        note: logs what is a warning in a longer run.
    """

    weights: WeightStore | GroupedWeights
    strength: Strength
    engine: Engine
    support: Support
    manual: bool = False
    seed: int = 0
    rank: int = 0
    mean: Reduce | None = None
    total: Reduce = torch.clone
    batches: float = 1.0
    warn: Callable[[str], None] = warnings.warn
    info: Callable[[str], None] = print
    note: Callable[[str], None] = print
    acting: Any = None  # what changes gradients and weights in an optimiser's step: the method, or the method on groups

    @classmethod
    def alone(
        cls,
        method: Method,
        parameters: Mapping[str, nn.Parameter],
        strength: Strength,
        structure: Structure = Element(),  # noqa: B008 - frozen
        module: nn.Module | None = None,
        example_inputs: Any = None,
        **more: Any,
    ) -> Run:
        """Return the run of a bare training loop in one process, with ``method`` on these parameters.

        Channels() and Heads() need ``module``, which holds these parameters, and ``example_inputs`` for its forward.
        With a structure other than Element() call :meth:`before_optimizer` and :meth:`after_optimizer` of the run in the place of
        the method's.
        """
        weights, engine = WeightStore(), Engine()
        weights.parameters = dict(parameters)
        support = Support(weights, method, strength, engine, StepSizes(), ClipFactor(), structure=structure)
        run = cls(weights, strength, engine, support, **more)
        if isinstance(structure, Coupled) and module is not None:
            run.couple(structure, module, example_inputs)
        run.group(method)
        return run

    def couple(self, structure: Coupled, module: nn.Module, example_inputs: Any) -> None:
        """Find the groups of ``module`` that have producers among the selected parameters, and add the other parameters they have."""
        from lightning_sparse import _coupled  # because the tracer takes a while to import

        found = _coupled.find(structure, module, self.support.weights.parameters, example_inputs)
        self.support.weights.parameters |= found.parameters
        self.support.groups = found.groups
        if found.left_out:
            self.info(found.message(structure))

    def group(self, method: Method) -> None:
        """Let ``method`` work on the groups of the support's structure; called again when parameters are added."""
        real = self.weights.real if isinstance(self.weights, GroupedWeights) else self.weights
        structure = self.support.structure
        if not structure.elementwise:
            coupled = self.support.groups if isinstance(structure, Coupled) else None
            self.support.groups = coupled or groups_within(structure, real.parameters)
            self.weights = GroupedWeights(real, self.support.groups) if method.takes_groups else real
        elif structure.ranks_within:
            groups_within(structure, real.parameters)
        self.acting = method if isinstance(self.weights, WeightStore) else OnGroups(self.weights, method)

    def before_optimizer(self, method: Method, step: Step) -> None:
        """Call the method's :meth:`Method.before_optimizer`, on groups if there are any."""
        if isinstance(self.weights, WeightStore):
            method.before_optimizer(step)
        elif type(method).before_optimizer is not Method.before_optimizer:
            self.weights.before_optimizer(method, step)

    def after_optimizer(self, method: Method, step: Step) -> None:
        """Call the method's :meth:`Method.after_optimizer`, on groups if there are any."""
        if isinstance(self.weights, WeightStore):
            method.after_optimizer(step)
        elif type(method).after_optimizer is not Method.after_optimizer:
            self.weights.after_optimizer(method, step)


class Method:
    """A training method: what it does at each moment of a step, and its eta, keep probability and zero region.

    The moments of a run are :meth:`reset`, :meth:`prepare`, :meth:`attach`, :meth:`begin` and, at its end, :meth:`finish` and
    :meth:`release`; those of a step, in order: :meth:`before_forward`, :meth:`before_backward`, :meth:`after_backward`,
    :meth:`before_optimizer` (before clipping), :meth:`after_optimizer`, :meth:`progress` and :meth:`after_batch`. All do nothing by
    default. The formulas are elementwise functions of :meth:`terms`, so that one call serves many tensors.
    """

    needs_separable: ClassVar[bool] = True  # accepts only separable penalties
    compiles: ClassVar[bool] = False  # has kernels to compile
    takes_groups: ClassVar[bool] = True  # works on the sizes of groups as on weights
    takes_parts: ClassVar[bool] = True  # works on weights that FSDP2 splits over processes
    whole_because: ClassVar[str] = ""  # why it does not
    adds_gradients: ClassVar[bool] = True  # the penalty acts through the optimiser's gradients
    solvable: ClassVar[bool] = True  # at fixed weights lam decides which of them are zero
    requires_hook: ClassVar[bool] = False  # an optimiser step without before_optimizer is refused

    run: Run  # the current run

    @classmethod
    def moments(cls) -> frozenset[str]:
        """Return the moments of a step at which the method acts; its other moments need no call."""
        return frozenset(name for name in MOMENTS if getattr(cls, name) is not getattr(Method, name))

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    # -- moments of a run ------------------------------------------------------------------------------------------------------

    def reset(self, run: Run) -> None:
        """Reset the method before a new ``run``."""
        self.run = run

    def prepare(self) -> None:
        """Prepare for a run; its parameters are known."""

    def check(self, optimizer: Optimizer, members: list[Member]) -> str:
        """Raise ValueError for an unsupported optimiser, before training; return a warning, or ""."""
        return ""

    def compile(self, engine: Engine, optimizers: Iterable[tuple[Optimizer, list[Member]]]) -> None:
        """Compile the method's kernels; raise RuntimeError if that fails."""

    def attach(self, module: nn.Module, wrappers: Iterable[Any] = ()) -> None:
        """Attach to the module of the weights; called again when parameters become trainable. ``wrappers`` hold optimisers."""

    def begin(self) -> None:
        """Start training; the run's length is known."""

    def progress(self) -> None:
        """Update after each counted step of the run."""

    def freeze(self, names: Iterable[str]) -> None:
        """Prepare for freezing the supports of these parameters."""

    def release(self) -> None:
        """Remove hooks and release buffers when training has ended or failed."""

    def finish(self) -> None:
        """Drop the references to the optimisers, before :meth:`release`."""

    # -- moments of a step -----------------------------------------------------------------------------------------------------

    def before_forward(self, batch: Any) -> None:
        """Start a batch."""

    def before_backward(self, loss: Tensor, scale: Scale) -> None:
        """Use the loss before its backward; ``scale`` returns the factor that the loss is multiplied by."""

    def after_backward(self, scale: Scale, overflowed: Callable[[bool], bool] | None = None) -> None:
        """Use the gradients; under a GradScaler ``overflowed`` tells if any process has infinite ones."""

    def before_optimizer(self, step: Step) -> None:
        """Change the gradients, before they are clipped and the optimiser steps."""

    def after_optimizer(self, step: Step) -> None:
        """Change the weights, after the optimiser has stepped."""

    def after_batch(self) -> None:
        """End the batch."""

    # -- formulas, element by element -------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None:
        """Return the tensors that eta is computed from, first ``w``, values of a parameter's weights; None while eta is infinite.

        With groups ``name`` is the leader of some, and ``w`` holds their sizes.
        """
        return (w,)

    def eta(self, lam: float, *terms: Tensor) -> Tensor:
        """Return the eta that the method uses, computed from :meth:`terms`."""
        return self.penalty.eta_hat(terms[0])

    def alpha(self, lam: float, *terms: Tensor) -> Tensor:
        """Return the keep probability that the method uses, computed from :meth:`terms`."""
        eta = self.eta(lam, *terms)
        return duality.alpha_of(eta, lam) if lam > 0 else torch.ones_like(eta)

    @property
    def oscillates(self) -> bool:
        """Return True if the method's steps oscillate around zero inside the penalty's zero region."""
        return True

    def is_at_rest(self, lam: float, rho: Tensor | float, memory: float, *terms: Tensor) -> Tensor:
        """Return which weights are in the penalty's zero region, at a step size ``rho`` and a momentum of ``memory`` steps."""
        return proximal.in_zero_region(self.penalty, terms[0], rho, lam, memory)

    def penalty_value(self, weights: list[Tensor], lam: float) -> float:
        """Return lam * Omega of ``weights``; a collective for weights that are split over processes."""
        return duality.penalty_value(self.penalty, weights, lam)

    @property
    def needs_step_sizes(self) -> bool:
        """Return True if the method's own steps depend on the optimiser's step size."""
        return False

    def movement(self) -> str:
        """Describe, to complete a sentence, how far the method's own parameters have moved; empty without any."""
        return ""

    # -- state -----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers that continue the method exactly."""
        return {}

    def check_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise ValueError, naming the entry, unless ``state`` may be loaded for these parameters (any, if empty)."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; entries may be missing, as in another method's."""
