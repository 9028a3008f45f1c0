"""AdaptiveMask: the mask form."""

from __future__ import annotations

import copy
from typing import Any

from lightning_sparse import _checks
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.curvature import Curvature, EmpiricalFisher
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.methods.mask import Mask
from lightning_sparse.noise import Elementwise, Gaussian, Noise
from lightning_sparse.schedules import Schedule


class AdaptiveMask(Sparsifier):
    """Each batch is run with weights ``s * w``; s has mean 1 and a keep probability that follows |w| (AdaDrop, GaussDrop).

    Noise costs lam * Omega only while it is weak. So it is bounded, what it falls short of lam * Omega is added to the gradients as
    in ReweightedPenalty, and in the run's first third the noise fades out: at one lam, penalty and mask train alike
    (docs/exchange/networks.md). ``alpha_min=1e-3, ceiling=10, remainder=False`` is noise that stands for all of the penalty, to the
    end of the run: for long runs in which lam rises slowly and the support is frozen early (docs/exchange.md).

    Args:
        noise: the masks' distribution, ScaledBernoulli() or Gaussian(local=..., share=...); in a recipe Gaussian keeps this
            default's ``local: true`` unless it is written out. Local noise is made for a quarter of a batch's samples as long as it is
            bounded by the defaults below, else for all; ``share`` says it.
        curvature: the estimate of H_jj that calibrates the noise, so that it realises lam * Omega; None leaves the noise
            uncalibrated, a curvature-weighted penalty.
        ceiling: largest lam / H_jj that calibration uses. None is what the estimate allows: 1, for InputMoment 10.
        alpha_min: smallest keep probability that noise is drawn with; it bounds the noise's variance by 1 / alpha_min - 1. None is
            what the estimate allows: 0.97 for the first tenth of the run, then rising to 1, no noise, at three tenths;
            1e-3 throughout for InputMoment, whose model has no higher orders, without calibration, and for rules that have no penalty.
        remainder: add to the gradients what ``ceiling`` and ``alpha_min`` keep the noise from realising of lam * Omega; False leaves
            it out, and then nothing fades. Without calibration, for rules that have no penalty, and for a subclass of
            ``methods.mask.MaskFormula`` with an ``eta`` of its own nothing is added.

    Noise on a weight of more than 32 MB keeps its mask's memory and that of the masked weight from batch to batch.
    In compiled modules and layers whose forward is bypassed, noise goes onto the weights whatever ``noise.local`` says.
    """

    method: Mask
    method_type, own_arguments = Mask, ("noise", "curvature", "ceiling", "alpha_min", "remainder")

    def __init__(
        self,
        penalty: Penalty | MaskRule,
        lam: float | Schedule | None = None,
        *,
        noise: Noise = Gaussian(local=True),  # noqa: B008 - frozen
        curvature: Curvature | None = EmpiricalFisher(),  # noqa: B008 - copied below
        ceiling: float | None = None,
        alpha_min: float | None = None,
        remainder: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a Noise such as ScaledBernoulli() or Gaussian(), got {_checks.shown(noise, Noise)}")
        if not isinstance(curvature, (Curvature, type(None))):
            raise TypeError(f"curvature must be a Curvature such as EmpiricalFisher(), or None, got {_checks.shown(curvature, Curvature)}")
        if options.get("compile") and not isinstance(noise, Elementwise):
            raise TypeError(
                f"compile=True needs ScaledBernoulli(), Gaussian() or another lightning_sparse.noise.Elementwise, got {noise!r}"
            )
        self.noise, self.curvature = noise, copy.deepcopy(curvature)  # an estimate is this callback's own
        self.ceiling = None if ceiling is None else _checks.positive("ceiling", ceiling)
        self.alpha_min = None if alpha_min is None else _checks.between("alpha_min", alpha_min, 0, 1)
        self.remainder = _checks.truth("remainder", remainder)
        super().__init__(penalty, lam, **options)

    def _make_method(self, penalty: Penalty) -> Mask:
        return Mask(penalty, self.noise, self.curvature, self.ceiling, self.alpha_min, self.remainder)
