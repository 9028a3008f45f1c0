"""AdaptiveMask: the mask form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sparse import _checks, attach, duality
from lightning_sparse._curvature import noise_eta
from lightning_sparse._labels import batch_size
from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks._arguments import Finish
from lightning_sparse.callbacks._noisy import Noisy
from lightning_sparse.curvature import Curvature, EmpiricalFisher
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.noise import Elementwise, Gaussian, Noise, bounded_variance, output_noise
from lightning_sparse.schedules import Schedule


@dataclass(frozen=True)
class MaskFormula:
    """Keep probability and variance of the mask on a weight ``w``, of ``(w, lam)`` or, calibrated by H_jj, of ``(w, H, lam)``."""

    penalty: Penalty
    ceiling: float
    alpha_min: float

    def keep_probability(self, *terms: Any) -> Tensor:
        """alpha = 1 / (1 + lam / eta), alpha_min at least."""
        *terms_of_eta, lam = terms
        return duality.alpha_of(noise_eta(self.penalty, lam, self.ceiling, *terms_of_eta), lam).clamp_(min=self.alpha_min)

    def variance(self, *terms: Any) -> Tensor:
        """Var s = (1 - alpha) / alpha = lam / eta, at most that of alpha_min."""
        *terms_of_eta, lam = terms
        return bounded_variance(noise_eta(self.penalty, lam, self.ceiling, *terms_of_eta), lam, self.alpha_min)


class AdaptiveMask(Noisy):
    """Each batch is run with weights ``s * w``; s has mean 1 and a keep probability that follows |w| (AdaDrop, GaussDrop).

    Args:
        noise: the masks' distribution, ScaledBernoulli() or Gaussian(local=...); in a recipe Gaussian keeps this
            default's ``local: true`` unless it is written out.
        curvature: the estimate of H_jj that calibrates the noise, so that it realises lam * Omega; None leaves the noise
            uncalibrated, a curvature-weighted penalty. In a run of 22,500 steps EmpiricalFisher(decay=0.999) with
            tol=0.01 came nearest to the penalty form's zeros, in one of 1,350 the defaults did (docs/exchange.md).
        ceiling: largest lam / H_jj that calibration uses; 10 agreed best with the penalty form on the digits.
        alpha_min: smallest keep probability that noise is drawn with; it bounds the noise's variance by 1 / alpha_min.

    Noise on a weight of more than 32 MB keeps its mask's memory and that of the masked weight from batch to batch.
    In compiled modules and layers whose forward is bypassed, noise goes onto the weights whatever ``noise.local`` says.
    """

    needs_separable, compiles = False, True

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
        noise: Noise = Gaussian(local=True),  # noqa: B008 - frozen
        curvature: Curvature | None = EmpiricalFisher(),  # noqa: B008 - copied below
        ceiling: float = 10.0,
        alpha_min: float = 1e-3,
        compile: bool = False,
        finish: Finish = "keep",
    ) -> None:
        super().__init__(penalty, lam, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity, compile, finish)
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a Noise such as ScaledBernoulli() or Gaussian(), got {noise!r}")
        if not isinstance(curvature, (Curvature, type(None))):
            raise TypeError(f"curvature must be a Curvature such as EmpiricalFisher(), or None, got {curvature!r}")
        self.noise, self.curvature = noise, copy.deepcopy(curvature)  # an estimate is this callback's own
        if compile and not isinstance(noise, Elementwise):
            raise TypeError(
                f"compile=True needs ScaledBernoulli(), Gaussian() or another lightning_sparse.noise.Elementwise, got {noise!r}"
            )
        self.ceiling = _checks.positive("ceiling", ceiling)
        self.alpha_min = _checks.between("alpha_min", alpha_min, 0, 1)

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.compiles = cls.eta_of is AdaptiveMask.eta_of  # the kernel's

    def _forget(self) -> None:
        super()._forget()
        self._doubted = False  # and said so
        self._spread: dict[str, Tensor] = {}  # Var s of each local layer's weights in this batch

    def own_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("noise", "curvature", "ceiling", "alpha_min")}

    # -- what the form uses ---------------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None:
        """Return w, and H_jj where it calibrates; None before its first estimate: no noise, no zero."""
        if self.curvature is None or not self.penalty.separable:  # a rule without a penalty acts as it is written
            return (w,)
        estimate = self.curvature.estimate(name)
        return None if estimate is None else (w, estimate)

    def eta_of(self, *terms: Tensor) -> Tensor:
        return noise_eta(self.penalty, self.lam, self.ceiling, *terms)

    @property
    def oscillates(self) -> bool:
        """Uncalibrated noise pulls a weight by lam H_jj w / eta: how far that reaches is not known where H is not."""
        return self.curvature is not None

    # -- life cycle -------------------------------------------------------------------------------------------------------

    @property
    def local(self) -> bool:
        return self.noise.local and self.penalty.separable

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.curvature is not None:
            self.curvature.reset()
        super().on_fit_start(trainer, pl_module)

    def _install(self, pl_module: LightningModule, attachment: attach.Attachment) -> None:
        if self.curvature is not None:
            self.curvature.attach(pl_module, attachment)
        super()._install(pl_module, attachment)
        if self.compile:
            self._compile()

    def _compile(self) -> None:
        """Make the kernels: for the variance of noise on outputs, and for masks on weights."""
        formula, values = self._formula, (0.5,) * (1 if self.curvature is None else 2)
        on_outputs, on_weights = ([p for name, p in self.parameters.items() if (name in self._local) == local] for local in (True, False))
        self.engine.compile_map(formula.variance, on_outputs, values, (0.5,), what=repr(self.penalty))
        what = f"{self.penalty!r} with {self.noise!r}"
        self.engine.compile_draw(formula.keep_probability, self.noise, on_weights, values, (0.5,), what=what)

    @property
    def _formula(self) -> MaskFormula:
        """The kernels' key, and what is computed without them unless a subclass has an ``eta_of`` of its own."""
        return MaskFormula(self.penalty, self.ceiling, self.alpha_min)

    def begin_batch(self, batch: Any) -> None:
        if self.curvature is not None:
            self.curvature.begin(self.step, batch_size(batch) or 1)
            self.curvature.observe_batch(batch)

    def begin_draw(self) -> None:
        if self.curvature is not None:
            self.curvature.generator = self._stream(-1)

    def prepare_outputs(self, name: str) -> None:
        w = self._live(name)
        terms = self.terms(name, w) if self.lam > 0 else None
        (self._spread[name],) = [torch.zeros_like(w)] if terms is None else self._variance(terms)

    def _variance(self, terms: tuple[Tensor, ...]) -> list[Tensor]:
        variance = self._formula.variance if self.compile else self._variance_of
        return self.engine.map([[term] for term in terms], variance, (self.lam,))

    def _variance_of(self, *terms: Any) -> Tensor:
        """Return Var s of masks, of :meth:`terms` and lam."""
        return bounded_variance(self.eta_of(*terms[:-1]), terms[-1], self.alpha_min)

    def _probability_of(self, *terms: Any) -> Tensor:
        """Return the keep probability that masks are drawn with: ``alpha_min`` at least, but for a rule that drops a weight for good."""
        eta = self.eta_of(*terms[:-1])
        alpha = duality.alpha_of(eta, terms[-1]).clamp_(min=self.alpha_min)
        return alpha if self.penalty.separable else alpha.masked_fill(eta == 0, 0.0)

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        return output_noise(layer, x, self._spread[name], generator, self.noise.share)

    def draw_all(self, names: list[str], attachment: attach.Attachment) -> None:
        """Small weights are drawn together; those whose H_jj is not known yet, and all at lam 0, have no noise."""
        rows = {name: terms for name in names if (terms := self.terms(name, self._live(name))) is not None and self.lam > 0}
        known, generator = list(rows), self._stream(-1, -1)
        alpha = self._formula.keep_probability if self.compile else self._probability_of
        # in a manual loop the graph of an earlier batch's masks may still wait for its backward: their memory is not reused
        how = {"separable": self.penalty.separable, "reuse": not self._manual}
        for number, mask, product in self.engine.draw(list(rows.values()), alpha, self.noise, generator, (self.lam,), **how):
            attachment.multiply(known[number], mask, product)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if self.curvature is not None and not self.frozen:
            self.curvature.observe_loss(loss)
            self.curvature.before_backward(_steps.loss_scale(trainer, self._manual))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        self._estimate(trainer, more=self._manual)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._manual:  # a bare loss.backward() calls no hook
            self._end_batch()
            self._estimate(trainer, more=False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _estimate(self, trainer: Trainer, more: bool) -> None:
        if self.curvature is not None:
            reduce = partial(trainer.strategy.reduce, reduce_op="mean") if trainer.world_size > 1 else None
            self.curvature.end(reduce, self.parameters, more)
            self._say_doubt(self.curvature.doubt)

    def _say_doubt(self, doubt: str) -> None:
        """Warn, once a fit on rank 0, where H rests on a number of labels that is not known."""
        if doubt and not self._doubted:
            self._doubted = True
            rank_zero_warn(
                f"{type(self.curvature).__name__} cannot read from the loss how many labels it averages over; {doubt}. If that is wrong, "
                f"masks are as much too strong: give the labels a sample, such as curvature={type(self.curvature).__name__}(labels=128), "
                "or a function of the batch that counts them; in manual optimisation call self.manual_backward(loss)"
            )

    def _end_batch(self) -> None:
        super()._end_batch()
        self._spread = {}

    def _release(self) -> None:
        super()._release()
        self._spread = {}

    # -- state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        estimate = {} if self.curvature is None else {"curvature": self.curvature.state_dict()}
        return estimate | super().state_dict()

    def check_state(self, state: Any) -> None:
        super().check_state(state)
        if self.curvature is not None and "curvature" in state:
            self.curvature.check_state(state["curvature"], self.parameters)

    def _resume(self, state: dict[str, Any]) -> None:
        if self.curvature is not None and "curvature" in state:
            self.curvature.load_state_dict(state["curvature"], self.parameters)
        super()._resume(state)
