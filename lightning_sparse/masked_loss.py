"""The duality gap E_s L(s * w) - L(w) - (lam / 2) sum w^2 / eta_hat(w) between masks and penalty, by sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse import _checks, duality
from lightning_sparse.counts import wide
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.noise import Noise

Weights = Mapping[str, Tensor]
Loss = Callable[[dict[str, Tensor]], Tensor]


@torch.no_grad()
def duality_gap_samples(
    loss_fn: Loss,
    weights: Weights,
    penalty: Penalty | MaskRule,
    lam: float,
    noise: Noise,
    samples: int = 16,
    generator: torch.Generator | None = None,
    keep: Weights | None = None,
) -> Tensor:
    """Sample L(s * w) - L(w) - (lam / 2) sum w^2 / eta_hat(w), one value per mask s, float64, shape ``(samples,)``.

    The spread of the samples shows the precision of :func:`duality_gap`, their mean.

    Args:
        loss_fn: a scalar loss as a function of the weights by name (``torch.func.functional_call`` builds one from a
            module). It must be the same function at each call: same batch, no dropout of its own.
        weights: the weights to mask, by name; their values are not changed.
        penalty: the penalty, or the equivalent mask rule.
        lam: strength, > 0.
        noise: draws s from alpha.
        samples: number of masks, > 0; each costs one call of ``loss_fn``.
        generator: random generator of the masks; None uses torch's global one.
        keep: calibrated alpha by name; None uses 1 / (1 + lam / eta_hat(w)).

    Raises ValueError unless ``lam`` and ``samples`` are positive, TypeError unless ``penalty`` is a penalty or a mask rule.
    """
    form = duality.to_penalty(penalty)
    strength, draws = _checks.positive("lam", lam), _checks.whole("samples", samples, 1)
    alpha = keep or {name: duality.keep_probability(form.eta_hat(w), strength) for name, w in weights.items()}
    expected = float(loss_fn(dict(weights))) + penalised(form, weights, strength)
    values = [float(loss_fn({name: w * noise.sample(alpha[name], generator) for name, w in weights.items()})) for _ in range(draws)]
    return torch.tensor(values, dtype=torch.float64) - expected


def duality_gap(
    loss_fn: Loss,
    weights: Weights,
    penalty: Penalty | MaskRule,
    lam: float,
    noise: Noise,
    samples: int = 16,
    generator: torch.Generator | None = None,
    keep: Weights | None = None,
) -> float:
    """Estimate E_s L(s * w) - L(w) - (lam / 2) sum w^2 / eta_hat(w) by the mean of :func:`duality_gap_samples` (same arguments).

    The gap is 0 for a squared loss on a linear model with unit curvature. In a deep network it is the error of the
    equivalence of mask and penalty.
    """
    return float(duality_gap_samples(loss_fn, weights, penalty, lam, noise, samples, generator, keep).mean())


@torch.no_grad()
def penalised(penalty: Penalty, weights: Weights, lam: float) -> float:
    """Return (lam / 2) sum w^2 / eta_hat(w), the penalty of masks with unit curvature. A weight of 0 adds 0."""
    return lam / 2 * sum(float((w * penalty.gradient(w)).sum(dtype=wide(w))) for w in weights.values())


def loss_of_weights(module: Any, batch: tuple[Any, int]) -> Loss:
    """Build the loss of ``module.training_step`` on one batch as a function of some of the module's weights, by name."""

    def loss(weights: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            result = torch.func.functional_call(_Step(module), {f"module.{name}": w for name, w in weights.items()}, batch)
        value: Tensor = torch.zeros(()) if result is None else result["loss"] if isinstance(result, dict) else result
        return value

    return loss


class _Step(nn.Module):
    """A module whose forward is another module's training step, so that ``functional_call`` can replace the weights."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, index: int) -> Any:
        return self.module.training_step(batch, index)
