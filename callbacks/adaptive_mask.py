"""AdaptiveMask: the mask form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sparse import _checks, _masks, attach
from lightning_sparse._curvature import noise_eta
from lightning_sparse._labels import batch_size
from lightning_sparse._memory import Kept
from lightning_sparse._pieces import mapped
from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks._arguments import Finish
from lightning_sparse.callbacks._noisy import Noisy
from lightning_sparse.curvature import Curvature, EmpiricalFisher
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.noise import Gaussian, Noise, output_noise
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

    Noise on a weight of more than 32 MB keeps its mask's memory and that of the masked weight from batch to batch.
    In compiled modules and layers whose forward is bypassed, noise goes onto the weights whatever ``noise.local`` says.
    """

    needs_separable, joins, compiles = False, True, True

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
        self.ceiling = _checks.positive("ceiling", ceiling)
        self.alpha_min = _checks.between("alpha_min", alpha_min, 0, 1)
        self._masking = self._made()

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.compiles = cls.eta_of is AdaptiveMask.eta_of  # the kernel's

    def _made(self) -> _masks.Masking:
        if self.compile:
            return _masks.Fused(self.penalty, self.noise, self.ceiling, self.alpha_min)
        return _masks.Called(self.eta_of, self.noise, self.alpha_min, self.penalty.separable)

    def _forget(self) -> None:
        super()._forget()
        self._kept = Kept()
        self._doubted = False  # and said so
        self._spread: dict[str, Tensor] = {}  # Var s of each local layer's weights in this batch

    def own_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("noise", "curvature", "ceiling", "alpha_min")}

    # -- what the form uses ---------------------------------------------------------------------------------------------

    def eta(self, name: str, w: Tensor) -> Tensor:
        """eta_hat(w), times H_jj where curvature calibrates: infinite (no noise, no zero) before its first estimate."""
        if not self.penalty.separable:
            return self.penalty.eta_hat(w)
        terms = self.eta_terms(name, w)
        return torch.full_like(w, torch.inf) if terms is None else mapped(self.eta_of, *terms)

    def eta_terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None:
        """w, and H_jj where it calibrates; None before its first estimate."""
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
        self._masking, terms = self._made(), 1 if self.curvature is None else 2
        for outputs in (True, False):
            self._masking.check([p for name, p in self.parameters.items() if (name in self._local) == outputs], terms, outputs)

    def begin_batch(self, batch: Any) -> None:
        if self.curvature is not None:
            self.curvature.begin(self.step, batch_size(batch) or 1)
            self.curvature.observe_batch(batch)

    def begin_draw(self) -> None:
        if self.curvature is not None:
            self.curvature.generator = self._stream(-1)

    def prepare_outputs(self, name: str) -> None:
        w = self._live(name)
        terms = self.eta_terms(name, w) if self.lam > 0 else None
        self._spread[name] = torch.zeros_like(w) if terms is None else self._masking.spread(self.lam, *terms)

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        return output_noise(layer, x, self._spread[name], generator, self.noise.share)

    def draw_all(self, names: list[str], attachment: attach.Attachment) -> None:
        """Small weights are drawn together; those whose H_jj is not known yet, and all at lam 0, have no noise."""
        rows = {name: terms for name in names if (terms := self.eta_terms(name, self._live(name))) is not None and self.lam > 0}
        known, generator = list(rows), self._stream(-1, -1)
        kept = None if self._manual else self._kept  # there a graph of the masks before may still wait for its backward
        for number, mask, product in self._masking.masked(list(rows.values()), self.lam, generator, kept):
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
        self._kept.clear()

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
