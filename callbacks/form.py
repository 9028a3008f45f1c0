"""Define SparsityCallback: the shared arguments, the queries about a weight, and the conversion between callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Parameter

from lightning_sparse._construction import typed
from lightning_sparse.callbacks.compatibility import AnyCallback, CallbackClass
from lightning_sparse.callbacks.logging import Measured
from lightning_sparse.callbacks.options import (
    Finish,
    Options,
    check_compile,
    check_structure,
    describe,
    penalty_of,
    strength_of,
)
from lightning_sparse.callbacks.wandb_run import Pictures
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.elementwise import Engine
from lightning_sparse.methods.base import Method
from lightning_sparse.optimizer import ClipFactor
from lightning_sparse.schedules import Constant, Schedule, TargetSparsity
from lightning_sparse.scores import Score
from lightning_sparse.step import Strength
from lightning_sparse.step_sizes import StepSizes
from lightning_sparse.structure import Element, Structure
from lightning_sparse.support import Support
from lightning_sparse.weights import Attachment, WeightStore


def forwarded(path: str, doc: str) -> Any:
    """Return a read-only property for an attribute of a collaborator."""
    return property(attrgetter(path), doc=doc)


def _option(name: str, doc: str) -> Any:
    """Return a property for a shared argument; setting it checks the value, before a fit: a running one may keep the old one."""

    def set_option(callback: SparsityCallback, value: Any) -> None:
        callback.options = callback.options.changed(name, value)
        callback.support.tol, callback.support.threshold = callback.options.tol, callback.options.threshold
        callback.support.score, callback.support.least = callback.options.ranking, callback.options.least_kept

    return property(attrgetter(f"options.{name}"), set_option, doc=doc)


class SparsityCallback(AnyCallback, metaclass=CallbackClass):
    """Base of the sparsity callbacks, without the Lightning hooks; other callbacks recognise sparsity callbacks by it.

    Args:
        penalty: a Penalty, or a MaskRule (whose penalty is then used).
        lam: strength, a number or a Schedule; by default a MaskRule's own.
        select: glob patterns on parameter names, a leading ``!`` excludes; by default every weight matrix of torch's own layers.
            Wildcards also match those of other layers (GPT-2's Conv1D, 3-D experts); embeddings and norms need their full name.
            Callbacks of one class on one network need different ones.
        tol: a weight counts as zero when its keep probability is below ``tol``.
        freeze: the last share of the optimiser steps, trained without penalty or noise and with the support frozen. With a
            ``target_sparsity`` 0 stands for 0.25, or for 0.7 where the network was trained before: where the biases of a norm are not all
            equal.
        threshold: weights of at most this magnitude also count as zero; required by penalties that only shrink.
        gap_samples: masks drawn at each epoch's end to log ``sparsity/duality_gap``; 0 does not measure it.
        keep_zeros: weights that are zero when the fit starts stay zero (one byte a weight); else they may become non-zero again.
        target_sparsity: the share of zeros to reach, instead of a value for lam. At each point of a ramp lam is solved for, so that the
            share of zeros is the ramp's, but bounded by a scale read off gradients and weights; it starts at a ``lam`` that is given and
            below the bound. Zeros that are then missing are removed by rank along the same ramp. The ramp ends where the last share
            ``freeze`` of the run begins: the target is met there and the support frozen.
        compile: compute the work on each weight by a kernel that torch's AOTInductor compiles before training starts. Steps take less
            time, the start takes ten to forty seconds, and a compiler is needed, on the CPU a C++ one. Results differ by rounding, and
            masks on weights use other random numbers. For ReweightedPenalty, AdaptiveProx and AdaptiveMask.
        finish: what to do if training ends before the target is met (EarlyStopping, max_time). "keep" leaves the zeros as they are and
            warns; "prune" removes the weights of the lowest rank to meet target_sparsity, without fine-tuning. Files that were
            written before do not change.
        score: ranks the weights that are removed by rank towards target_sparsity, the lowest first; see lightning_sparse.scores. None is
            LAMP(), which empties no layer.
        least_kept: share of each parameter's weights, in [0, 1 - target_sparsity], that ranking keeps; 0 keeps one weight.
        structure: which weights are zero together, see lightning_sparse.structure: Element(), Rows(), Columns(), Channels(), Heads(),
            Blocks((16, 16)), NM(2, 4), or one of your own. lam means the same for all; target_sparsity counts weights.
    """

    method_type: ClassVar[type[Method]] = Method
    _forms: ClassVar[dict[str, type[SparsityCallback]]] = {}  # this package's callbacks by name, for conversion
    sample: ClassVar[dict[str, str]] = {"penalty": "penalties.LogSum(eps=2.0)", "lam": "1e-3"}  # a call, for errors
    own_arguments: ClassVar[tuple[str, ...]] = ()  # attributes that hold the arguments beyond the shared ones
    fills: ClassVar[tuple[str, ...]] = ()  # shared arguments that a class sets itself

    def __init__(
        self,
        penalty: Penalty | MaskRule,
        lam: float | Schedule | None = None,
        *,
        select: Sequence[str] | None = None,
        tol: float = 0.05,
        freeze: float = 0.0,
        threshold: float | None = None,
        gap_samples: int = 0,
        keep_zeros: bool = False,
        target_sparsity: float | None = None,
        compile: bool = False,
        finish: Finish = "keep",
        score: Score | None = None,
        least_kept: float = 0.0,
        structure: Structure = Element(),  # noqa: B008 - frozen
    ) -> None:
        form = type(self).__name__
        self.given = penalty
        admitted = penalty_of(penalty, self.method_type.needs_separable, form)
        self.strength = self._make_strength(admitted, lam, target_sparsity)
        self.options = Options.checked(
            form,
            select=select, tol=tol, freeze=freeze, threshold=threshold, gap_samples=gap_samples, keep_zeros=keep_zeros,
            target_sparsity=target_sparsity, compile=compile, finish=finish, score=score, least_kept=least_kept, structure=structure,
        )  # fmt: skip
        self.method = self._make_method(admitted)
        check_structure(self.options, self.method, penalty)
        if self.options.compile:
            check_compile(form, self.method, penalty)
        self._reset()

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if cls.__module__.startswith("lightning_sparse.callbacks."):
            cls._forms[cls.__name__] = cls

    def _make_strength(self, penalty: Penalty, lam: float | Schedule | None, target: float | None) -> Strength:
        return strength_of(type(self).__name__, self.given, penalty, lam, target)

    def _make_method(self, penalty: Penalty) -> Method:
        """Create the method: its changes to gradients and weights, and its formulas."""
        return self.method_type(penalty)

    def _reset(self) -> None:
        """Reset the state to that of a callback that is not fitting."""
        self.strength.reset()
        self.weights, self.engine, self.sizes, self.clipping = WeightStore(), Engine(), StepSizes(), ClipFactor()
        given = self.options.tol, self.options.threshold, self.options.ranking, self.options.least_kept, self.options.structure
        self.support = Support(self.weights, self.method, self.strength, self.engine, self.sizes, self.clipping, *given)
        self.measured = Measured(self.support, self.evaluated, Pictures())

    # -- attributes and queries ------------------------------------------------------------------------------------------------

    select: list[str] | None = _option("select", "The patterns on parameter names.")
    tol: float = _option("tol", "The keep probability below which a weight is zero.")
    freeze: float = _option("freeze", "The last share of the run, trained with a frozen support.")
    threshold: float | None = _option("threshold", "The magnitude up to which weights are zero.")
    gap_samples: int = _option("gap_samples", "Masks drawn for the duality gap.")
    keep_zeros: bool = _option("keep_zeros", "Whether weights that are zero at the start stay zero.")
    target_sparsity: float | None = forwarded("options.target_sparsity", "The share of zeros to reach.")
    finish: str = _option("finish", "What to do if training ends before the target is met.")
    score: Score | None = _option("score", "The score that ranks weights to remove.")
    least_kept: float = _option("least_kept", "The share of each parameter's weights that ranking keeps.")
    structure: Structure = forwarded("options.structure", "Which weights are zero together.")
    compile: bool = forwarded("options.compile", "Whether kernels are compiled.")
    penalty: Penalty = forwarded("method.penalty", "The penalty whose eta_hat is used.")
    schedule: Schedule = forwarded("strength.schedule", "The schedule of lam.")
    lam: float = forwarded("strength.lam", "The strength in force; before a fit the schedule's final value.")
    step: int = forwarded("strength.step", "The callback's own optimiser steps so far.")
    total: float = forwarded("strength.total", "The run's optimiser steps; inf where unknown.")
    asked: float | None = forwarded("support.asked", "The share of zeros that the target asks for now; None without a target.")
    frozen: bool = forwarded("support.is_frozen", "Whether the support no longer changes.")
    ascent: TargetSparsity | None = forwarded("strength.target", "The search for lam towards a target; None without a target.")
    attachment: Attachment | None = forwarded("weights.attachment", "The hooks on the module during a fit.")

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Return the selected parameters, by name."""
        return self.weights.parameters

    def evaluated(self, name: str) -> Tensor:
        """Return the values of a parameter that are evaluated and saved, before the threshold: an average if one replaces it."""
        return self.weights.live(name)

    def eta(self, name: str, w: Tensor) -> Tensor:
        """Return the eta that the method uses for values ``w`` of a parameter."""
        return self.support.eta(name, w)

    def keep_probability(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return alpha of each weight of a parameter, as the method uses it, or of other values ``w`` such as an average."""
        return self.support.keep_probability(name, w)

    def zeros(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return which weights of a parameter (or other values ``w`` for it) count as zero."""
        return self.support.zeros(name, w)

    def all_zeros(self) -> dict[str, Tensor]:
        """Return :meth:`zeros` of every parameter, by name."""
        return self.support.all_zeros()

    def thresholded(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return a parameter's weights (or other values ``w`` for it) with true zeros, as in evaluation and in files."""
        return self.support.thresholded(name, w)

    def share_of_zeros(self) -> float:
        """Return the share of the selected weights that count as zero; tied ones count once."""
        return self.support.share_of_zeros()

    def groups_left(self) -> dict[str, tuple[int, int]]:
        """Return (groups that are not zero, groups) by the parameter or axis that they belong to; empty for single weights."""
        return self.support.groups_left({name: self.thresholded(name) for name in self.parameters})

    def prune(self) -> None:
        """Set the weights that count as zero to zero in every selected parameter, permanently."""
        self.support.prune()

    @property
    def planned_end(self) -> float:
        """Return the share of the run by which all goals are to be met."""
        return 1 - self.strength.frozen_share(self.options.freeze)

    # -- conversion ----------------------------------------------------------------------------------------------------------

    def _shared(self) -> dict[str, Any]:
        options = {name: value for name, value in vars(self.options).items() if name not in ("form", "compile")}
        return {"penalty": self.given, "lam": self.schedule} | options

    def own_settings(self) -> dict[str, Any]:
        """Return the arguments that this callback has beyond the shared ones."""
        return {name: getattr(self, name) for name in self.own_arguments}

    def settings(self) -> dict[str, Any]:
        """Return all arguments, from which the callback can be created again."""
        every = self._shared() | self._compile_setting(type(self)) | self.own_settings()
        return {name: value for name, value in every.items() if name not in self.fills}

    def __repr__(self) -> str:
        settings = self.settings()
        numbers = {name: value.lam for name, value in settings.items() if type(value) is Constant}
        return typed(self, settings | numbers)

    def _compile_setting(self, form: type[SparsityCallback]) -> dict[str, Any]:
        return {"compile": self.options.compile} if form.method_type.compiles else {}

    def to_mask(self, **changes: Any) -> SparsityCallback:
        """Return the AdaptiveMask with the same penalty, lam, selection and schedule."""
        return self._convert("AdaptiveMask", changes)

    def to_penalty(self, **changes: Any) -> SparsityCallback:
        """Return the ReweightedPenalty with the same penalty, lam, selection and schedule."""
        return self._convert("ReweightedPenalty", changes)

    def to_prox(self, **changes: Any) -> SparsityCallback:
        """Return the AdaptiveProx with the same penalty, lam, selection and schedule."""
        return self._convert("AdaptiveProx", changes)

    def _convert(self, name: str, changes: dict[str, Any]) -> SparsityCallback:
        form = self._forms[name]
        own = self.own_settings() if type(self) is form else {}
        return form(**(self._shared() | self._compile_setting(form) | own | changes))

    def recipe(self) -> dict[str, Any]:
        """Return a JSON-able description of the callback."""
        settings = self.settings()
        return {"class_path": type(self).__name__, "init_args": {name: describe(value) for name, value in settings.items()}}

    @cached_property
    def state_key(self) -> str:  # cached because the Trainer reads it at every hook
        return self._generate_state_key(select=self.options.select)


def peers_of(trainer: Any) -> list[SparsityCallback]:
    """Return the run's sparsity callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, SparsityCallback)]


def measured_by(peers: Iterable[SparsityCallback]) -> list[Measured]:
    """Return what measures each callback's weights, for the functions of :mod:`lightning_sparse.callbacks.logging`."""
    return [peer.measured for peer in peers]
