"""AdaptiveMask: the mask form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sparse import _checks, attach
from lightning_sparse.callbacks import _states
from lightning_sparse.callbacks.base import Sparsifier, is_skipped
from lightning_sparse.curvature import Curvature, EmpiricalFisher, calibrated
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.noise import Gaussian, Noise, output_noise, stream, variance
from lightning_sparse.schedules import Schedule


class AdaptiveMask(Sparsifier):
    """Each batch is run with weights ``s * w``; s has mean 1 and a keep probability that follows |w| (AdaDrop, GaussDrop).

    Args:
        noise: the masks' distribution, ScaledBernoulli() or Gaussian(local=...); in a recipe Gaussian keeps this
            default's ``local: true`` unless it is written out.
        curvature: the estimate of H_jj that calibrates the noise, so that it realises lam * Omega; None leaves the noise
            uncalibrated, a curvature-weighted penalty.
        ceiling: largest lam / H_jj that calibration uses; 10 agreed best with the penalty form on the digits.
        alpha_min: smallest keep probability that noise is drawn with; it bounds the noise's variance by 1 / alpha_min.

    In compiled modules and layers whose forward is bypassed, noise goes onto the weights whatever ``noise.local`` says.

    The other arguments are :class:`Sparsifier`'s.
    """

    needs_separable = False
    takes_parts = False

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
        noise: Noise = Gaussian(local=True),  # noqa: B008 - frozen
        curvature: Curvature | None = EmpiricalFisher(),  # noqa: B008 - copied below
        ceiling: float = 10.0,
        alpha_min: float = 1e-3,
    ) -> None:
        super().__init__(penalty, lam, select, tol, freeze, threshold, gap_samples, keep_zeros)
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a Noise such as ScaledBernoulli() or Gaussian(), got {noise!r}")
        if not isinstance(curvature, (Curvature, type(None))):
            raise TypeError(f"curvature must be a Curvature such as EmpiricalFisher(), or None, got {curvature!r}")
        self.noise, self.curvature = noise, copy.deepcopy(curvature)  # an estimate is this callback's own
        self._spread: dict[str, Tensor] = {}
        self._local: dict[str, nn.Module] = {}
        self.ceiling = _checks.positive("ceiling", ceiling)
        self.alpha_min = _checks.between("alpha_min", alpha_min, 0, 1)
        self._seed, self._rank, self._draws = 0, 0, 0
        self._calls: dict[str, int] = {}  # of each layer's forward since the masks were drawn
        self._heard: set[str] = set()  # local layers whose forward ran in this batch
        self._bypassed: set[str] = set()  # those whose forward does not: their weights get the noise
        self._ran = False  # this batch had a backward
        self._trained: set[str] = set()  # parameters that are trained in this batch, though toggled off for a while

    def own_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("noise", "curvature", "ceiling", "alpha_min")}

    # -- what the form uses ---------------------------------------------------------------------------------------------

    def eta(self, name: str, w: Tensor) -> Tensor:
        """eta_hat(w), times H_jj where curvature calibrates: infinite (no noise, no zero) before its first estimate."""
        eta = super().eta(name, w)
        if self.curvature is None or not self.penalty.separable:  # a rule without a penalty acts as it is written
            return eta
        estimate = self.curvature.estimate(name)
        return torch.full_like(eta, torch.inf) if estimate is None else calibrated(eta, estimate.to(eta), self.lam, self.ceiling)

    def _noisy_alpha(self, name: str) -> Tensor:
        """alpha bounded from below, but for a rule that drops a weight for good (top-k), which keeps its 0."""
        alpha = self.keep_probability(name)
        bounded = alpha.clamp(min=self.alpha_min)
        return bounded if self.penalty.separable else bounded.masked_fill(alpha == 0, 0.0)

    # -- life cycle -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed = trainer.strategy.broadcast(torch.initial_seed())  # a file holds one for all ranks
        self._rank, self._draws, self._bypassed = trainer.global_rank, 0, set()
        if self.curvature is not None:
            self.curvature.reset()
        super().on_fit_start(trainer, pl_module)

    def _install(self, pl_module: LightningModule, attachment: attach.Attachment) -> None:
        if self.curvature is not None:
            self.curvature.attach(pl_module, attachment)
        on_outputs = self.noise.local and self.penalty.separable
        known = attach.layers(pl_module, self.parameters) if on_outputs else {}
        self._local = {name: layer for name, layer in known.items() if name not in self._bypassed}
        for name, layer in self._local.items():
            attachment.on_forward(layer, partial(self._blur, name))
        attachment.mask_gradients()
        if self._manual:
            self._handles += [optimizer.register_step_pre_hook(self._before_manual_step) for optimizer in self._optimizers]

    def _before_manual_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.attachment is not None and not is_skipped(optimizer):  # else the masks go on to the next forward
            self.attachment.restore()

    def _stream(self, index: int, call: int = 0) -> torch.Generator:
        """The draws of one parameter (and call of its layer) in this batch, the same again in a recomputed forward."""
        device = next(iter(self.parameters.values())).device
        return stream(device, self._seed, self._rank, self._draws, index, call)

    def _blur(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if name not in self._spread:
            return output
        # two calls inside one checkpointed block would be recomputed first call first, and swap their draws
        again = torch._C._current_graph_task_id() != -1  # recomputed in backward, last call first
        call = self._calls.get(name, 0) - (1 if again else 0)
        self._calls[name] = call if again else call + 1
        self._heard.add(name)
        return output + output_noise(layer, inputs[0], self._spread[name], self._stream(list(self.parameters).index(name), call))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._heard, self._ran = set(), False
        if self.attachment is None or self.frozen or not self.parameters:
            return
        if self.curvature is not None:
            self.curvature.begin(self.step, _batch_size(batch))
        self._trained = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        self._draw(self.attachment)

    @torch.no_grad()
    def _draw(self, attachment: attach.Attachment) -> None:
        """New masks: on the weights at once, on the outputs of local layers as their forwards come."""
        self._draws, self._calls = self._draws + 1, {}
        if self.curvature is not None:
            self.curvature.generator = self._stream(-1)
        for index, name in enumerate(self.parameters):
            if name not in self._trained:
                continue
            alpha = self._noisy_alpha(name)
            if name in self._local:
                self._spread[name] = variance(alpha)
            else:
                pattern = self.noise.pattern(alpha, self._stream(index, -1))
                again = None if self._manual else partial(self._again, name, pattern)  # there several backwards may come
                attachment.multiply(name, self.noise.mask(pattern, alpha), again)

    @torch.no_grad()
    def _again(self, name: str, pattern: Tensor) -> Tensor:
        """The mask of this batch once more, from the live weights: alpha has not changed since it was drawn."""
        return pattern if pattern.dtype != torch.bool else self.noise.mask(pattern, self._noisy_alpha(name))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self._ran = bool(self._spread)
        if self.curvature is not None and not self.frozen:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            factor = 1.0 if scaler is None else float(scaler.get_scale())
            self.curvature.before_backward(factor / (1 if self._manual else trainer.accumulate_grad_batches))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._manual:  # else more forwards of this batch may come before a step
            self._end_batch()
        self._estimate(trainer, more=self._manual)

    def _estimate(self, trainer: Trainer, more: bool) -> None:
        if self.curvature is not None:
            reduce = partial(trainer.strategy.reduce, reduce_op="mean") if trainer.world_size > 1 else None
            self.curvature.end(reduce, self.parameters, more)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._manual and self.attachment is not None and self.parameters:  # the next forward of this batch is masked too
            self._draw(self.attachment)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._end_batch()  # a step that returned no loss had no backward
        if self._manual:  # a bare loss.backward() calls no hook
            self._estimate(trainer, more=False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _end_batch(self) -> None:
        if self.attachment is not None:
            self.attachment.restore()
        if self._ran or self._heard:  # a layer whose forward is bypassed, or compiled before this run, is never asked
            self._bypassed |= self._local.keys() - self._heard
            self._local = {name: layer for name, layer in self._local.items() if name in self._heard}
        self._spread, self._calls = {}, {}

    def _release(self) -> None:
        super()._release()
        self._spread, self._calls = {}, {}

    # -- state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.curvature is not None:
            state["curvature"] = self.curvature.state_dict()
        return state | {"seed": self._seed, "draws": self._draws, "bypassed": sorted(self._bypassed)}

    def check_state(self, state: Any) -> None:
        super().check_state(state)
        for name in ("seed", "draws"):  # another form's state has none
            if name in state:
                _states.entry(self, state, name, _states.is_count, "a whole number >= 0")
        if "bypassed" in state:
            _states.entry(self, state, "bypassed", _states.are_names, "a list of parameter names")
        if self.curvature is not None and "curvature" in state:
            self.curvature.check_state(state["curvature"], self.parameters)

    def _resume(self, state: dict[str, Any]) -> None:
        if self.curvature is not None and "curvature" in state:
            self.curvature.load_state_dict(state["curvature"], self.parameters)
        self._seed, self._draws = state.get("seed", self._seed), state.get("draws", 0)
        self._bypassed = set(state.get("bypassed", ()))
        self._local = {name: layer for name, layer in self._local.items() if name not in self._bypassed}
        super()._resume(state)


def _batch_size(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor found in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(_batch_size, items) if size > 1), 1)
