"""Arguments: what every sparsity callback is given, and how one form is made of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_sparse import _checks, attach
from lightning_sparse._construction import Constructed, typed
from lightning_sparse.callbacks import _refusals, _report, _strengths
from lightning_sparse.callbacks._averages import Averages
from lightning_sparse.callbacks._clock import Clock
from lightning_sparse.callbacks._groups import Members
from lightning_sparse.callbacks._pictures import Pictures
from lightning_sparse.callbacks._promises import Fit
from lightning_sparse.callbacks._swaps import Swaps
from lightning_sparse.callbacks.compatibility import SparsityCallback
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.elementwise import Engine
from lightning_sparse.methods.base import Method
from lightning_sparse.optimizer import ClipFactor
from lightning_sparse.schedules import Constant, Schedule, as_schedule
from lightning_sparse.step_sizes import StepSizes

if TYPE_CHECKING:
    from lightning_sparse.callbacks._endings import Ending

Other = TypeVar("Other", bound="Arguments")
Finish = Literal["keep", "prune"]
FINE_TUNED = 0.25  # the share of a run to a target sparsity that is trained with its support frozen


class Arguments(SparsityCallback, metaclass=Constructed):
    """A way to train with one eta_hat, and how another way is made of it.

    Args:
        penalty: a Penalty, or a MaskRule (whose penalty is then used).
        lam: strength, a number or a Schedule; by default a MaskRule's own.
        select: glob patterns on parameter names, a leading ``!`` excludes; by default every weight matrix of torch's own layers.
            Wildcards reach those of other layers, too (GPT-2's Conv1D, 3-D experts); embeddings and norms need their full name.
        tol: a weight counts as zero when its keep probability is below ``tol``.
        freeze: the last share of the optimiser steps, trained without penalty or noise and with the support frozen.
        threshold: also zero are weights of at most this magnitude; required by penalties that only shrink.
        gap_samples: masks drawn at each epoch's end to log ``sparsity/duality_gap``; 0 does not measure it.
        keep_zeros: weights that are zero when the fit starts stay zero (one byte a weight); else they may grow again.
        target_sparsity: the share of zeros to reach, in place of a lam to guess: lam then starts at ``lam`` (1e-5 by default), rises
            and falls as the zeros lag behind a ramp or run ahead of it. Where lam is too slow for the run, the weights of the lowest rank
            are removed along a second, later ramp. The support is frozen as soon as the target is met, at the latest at ``1 - freeze``
            (``freeze`` is then 0.25 where it is 0).
        compile: do the work on each weight by a kernel that torch's AOTInductor makes before training starts: less time a step, for
            some ten to forty seconds; it needs a compiler, on the CPU a C++ one. Results differ by rounding, masks on weights by
            their draws, too. ReweightedPenalty, AdaptiveProx and AdaptiveMask have one.
        finish: where training ends before the target is met (EarlyStopping, max_time), "keep" leaves the zeros that there are, with a
            warning, and "prune" removes the weights of the lowest rank to meet target_sparsity, without fine-tuning; files that were
            written before hold what there was.
    """

    needs_separable: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = True  # works on weights that FSDP2 splits over processes
    whole_because: ClassVar[str] = ""  # why not
    compiles: ClassVar[bool] = False  # has a kernel, and the argument ``compile``

    def __init__(
        self,
        penalty: Penalty | MaskRule,
        lam: float | Schedule | None = None,
        select: Sequence[str] | None = None,
        tol: float = 0.05,
        freeze: float = 0.0,
        threshold: float | None = None,
        gap_samples: int = 0,
        keep_zeros: bool = False,
        target_sparsity: float | None = None,
        compile: bool = False,
        finish: Finish = "keep",
    ) -> None:
        self.given = penalty
        self.penalty = _refusals.check_penalty(penalty, self.needs_separable, type(self).__name__)
        self.schedule = as_schedule(_strengths.strength(type(self).__name__, penalty, lam, target_sparsity))
        self.select = _refusals.check_patterns(select)
        self.tol = _checks.between("tol", tol, 0, 1)
        self.target_sparsity, self.ascent = target_sparsity, _strengths.ascent(self.penalty, self.schedule, target_sparsity)
        self.freeze = _checks.between("freeze", freeze, 0, 1, closed="l") or (0.0 if self.ascent is None else FINE_TUNED)
        self.threshold = None if threshold is None else _checks.between("threshold", threshold, 0, float("inf"), closed="l")
        self.gap_samples = _checks.whole("gap_samples", gap_samples, 0)
        self.keep_zeros = _checks.truth("keep_zeros", keep_zeros)
        self.finish = _strengths.check_finish(finish, target_sparsity)
        self.compile = _refusals.check_compile(compile, self)
        self.method = self._make_method()
        self._forget()

    def _make_method(self) -> Method:
        """Return what the callback does to gradients and weights, and its formulas."""
        return Method(self.penalty)

    def _forget(self) -> None:
        """The state of a callback that is not fitting."""
        if self.ascent is not None:
            self.ascent.reset()
        self.parameters: dict[str, nn.Parameter] = {}
        self.step, self.total = 0, math.inf
        self.attachment: attach.Attachment | None = None
        self.engine = Engine()
        self.support: dict[str, Tensor] | None = None  # where weights may live, once frozen
        self._compared = False  # the ranks' numbers of batches
        self.held: dict[str, Tensor] = {}  # where weights may live by keep_zeros, or after pruning
        self.cut: dict[str, Tensor] = {}  # where weights may live on the way to a target, once lam was too slow
        self._handles: list[Any] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._places: dict[str, tuple[torch.optim.Optimizer, int]] = {}  # optimiser and group of each parameter
        self._restored: dict[str, Any] | None = None
        self._pictures = Pictures()
        self._planned: float | None = None  # the run's length by the restored state
        self._fit = Fit()
        self._batch: tuple[Any, int] | None = None  # the last one trained on, for the duality gap
        self._clock, self._manual, self._offset, self._whole, self._drift = Clock(), False, 0, math.inf, 0
        self._own_hooks: frozenset[str] = frozenset()  # of the module, that may mend or clip gradients
        self._begun, self._applied = False, False  # training has started; the restored state is in place
        self._averages: Averages | None = None
        self._clipping = ClipFactor()
        self._step_sizes = StepSizes()
        self._seen: tuple[int, ...] = ()  # what shows that parameters join
        self._members: dict[int, Members] = {}  # of each optimiser
        self._swaps = Swaps()
        self._ending: Ending | None = None  # training is over

    # -- conversion ---------------------------------------------------------------------------------------------------

    def _shared(self) -> dict[str, Any]:
        names = ("select", "tol", "freeze", "threshold", "gap_samples", "keep_zeros", "target_sparsity", "finish")
        return {"penalty": self.given, "lam": self.schedule} | {name: getattr(self, name) for name in names}

    def own_settings(self) -> dict[str, Any]:
        """The arguments that this form has beyond the shared ones."""
        return {}

    def settings(self) -> dict[str, Any]:
        """All arguments, by which the callback can be made again."""
        return self._shared() | self._speed(type(self)) | self.own_settings()

    def __repr__(self) -> str:
        settings = self.settings()
        numbers = {name: value.lam for name, value in settings.items() if type(value) is Constant}
        return typed(self, settings | numbers)

    def _speed(self, form: type[Arguments]) -> dict[str, Any]:
        return {"compile": self.compile} if form.compiles else {}

    def to_mask(self, **changes: Any) -> Arguments:
        """The AdaptiveMask with the same penalty, lam, selection and schedule."""
        from lightning_sparse.callbacks.adaptive_mask import AdaptiveMask

        return self._become(AdaptiveMask, changes)

    def to_penalty(self, **changes: Any) -> Arguments:
        """The ReweightedPenalty with the same penalty, lam, selection and schedule."""
        from lightning_sparse.callbacks.reweighted_penalty import ReweightedPenalty

        return self._become(ReweightedPenalty, changes)

    def to_prox(self, **changes: Any) -> Arguments:
        """The AdaptiveProx with the same penalty, lam, selection and schedule."""
        from lightning_sparse.callbacks.adaptive_prox import AdaptiveProx

        return self._become(AdaptiveProx, changes)

    def _become(self, form: type[Other], changes: dict[str, Any]) -> Other:
        own = self.own_settings() if type(self) is form else {}
        return form(**(self._shared() | self._speed(form) | own | changes))

    def recipe(self) -> dict[str, Any]:
        """A JSON-able description of the callback."""
        settings = self.settings()
        return {"class_path": type(self).__name__, "init_args": {name: _report.describe(value) for name, value in settings.items()}}
