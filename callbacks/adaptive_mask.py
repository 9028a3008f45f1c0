"""AdaptiveMask: the mask form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sparse import _checks, attach, duality
from lightning_sparse._pieces import mapped
from lightning_sparse.callbacks._noisy import Noisy
from lightning_sparse.curvature import Curvature, EmpiricalFisher, calibrated
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.noise import Gaussian, Noise, bounded_variance, output_noise
from lightning_sparse.schedules import Schedule


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

    In compiled modules and layers whose forward is bypassed, noise goes onto the weights whatever ``noise.local`` says.

    The other arguments are :class:`Sparsifier`'s.
    """

    needs_separable = False

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
    ) -> None:
        super().__init__(penalty, lam, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity)
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a Noise such as ScaledBernoulli() or Gaussian(), got {noise!r}")
        if not isinstance(curvature, (Curvature, type(None))):
            raise TypeError(f"curvature must be a Curvature such as EmpiricalFisher(), or None, got {curvature!r}")
        self.noise, self.curvature = noise, copy.deepcopy(curvature)  # an estimate is this callback's own
        self.ceiling = _checks.positive("ceiling", ceiling)
        self.alpha_min = _checks.between("alpha_min", alpha_min, 0, 1)

    def _forget(self) -> None:
        super()._forget()
        self._spread: dict[str, Tensor] = {}  # Var s of each local layer's weights in this batch

    def own_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("noise", "curvature", "ceiling", "alpha_min")}

    # -- what the form uses ---------------------------------------------------------------------------------------------

    def eta(self, name: str, w: Tensor) -> Tensor:
        """eta_hat(w), times H_jj where curvature calibrates: infinite (no noise, no zero) before its first estimate."""
        return self._of_eta(name, w, lambda eta: eta)

    def _of_eta(self, name: str, w: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of :meth:`eta`, element by element."""
        if not self.penalty.separable:  # a rule without a penalty acts as it is written
            return function(self.penalty.eta_hat(w))
        if self.curvature is None:
            return mapped(lambda w: function(self.penalty.eta_hat(w)), w)
        estimate = self.curvature.estimate(name)
        if estimate is None:
            return function(torch.full_like(w, torch.inf))
        return mapped(lambda w, h: function(calibrated(self.penalty.eta_hat(w), h.to(w), self.lam, self.ceiling)), w, estimate)

    def _noisy_alpha(self, name: str, w: Tensor) -> Tensor:
        """alpha bounded from below, but for a rule that drops a weight for good (top-k), which keeps its 0."""
        if self.lam == 0:
            return torch.ones_like(w)
        alpha = self._of_eta(name, w, self._bounded)
        return alpha if self.penalty.separable else alpha.masked_fill(self.eta(name, w) == 0, 0.0)

    def _bounded(self, eta: Tensor) -> Tensor:
        return duality.keep_probability(eta, self.lam).clamp_(min=self.alpha_min)

    def at_rest(self, name: str, w: Tensor) -> Tensor:
        """Uncalibrated noise pulls a weight by lam H_jj w / eta: how far that reaches is not known where H is not."""
        return w == 0 if self.curvature is None else super().at_rest(name, w)

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

    def begin_batch(self, batch: Any) -> None:
        if self.curvature is not None:
            self.curvature.begin(self.step, _batch_size(batch))

    def begin_draw(self) -> None:
        if self.curvature is not None:
            self.curvature.generator = self._stream(-1)

    def prepare_outputs(self, name: str) -> None:
        self._spread[name] = self._of_eta(name, self._live(name), lambda eta: bounded_variance(eta, self.lam, self.alpha_min))

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        return output_noise(layer, x, self._spread[name], generator)

    def draw_weights(self, name: str, attachment: attach.Attachment, generator: torch.Generator) -> None:
        attachment.multiply(name, self.noise.sample(self._noisy_alpha(name, self._live(name)), generator))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if self.curvature is not None and not self.frozen:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            factor = 1.0 if scaler is None else float(scaler.get_scale())
            self.curvature.before_backward(factor / (1 if self._manual else trainer.accumulate_grad_batches))

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


def _batch_size(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor found in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(_batch_size, items) if size > 1), 1)
