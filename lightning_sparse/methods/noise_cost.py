"""Measure what the noise of masks costs, beside what the estimate of H says, and find the factor that H is wrong by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.grouped import GroupedWeights
from lightning_sparse.state import entry, is_factor
from lightning_sparse.weights import Attachment, WeightStore

FIRST = 8  # batches before the first verdict; the next ones come after twice as many each time
RIGHT = 2.0  # H is left as it is up to a factor of that
SURE = 4.0  # standard errors between the measured ratio and that factor
LEAST, MOST = 0.01, 100.0  # bounds of the factor


class NoiseCost:
    r"""Compares the cost of noise in training with its estimate, and corrects the scale of H where they disagree.

    Noise n of mean 0 on an output or a weight z costs E L(z + n) - L(z) = Var n L''(z) / 2 to second order, and

        E[n dL/dz(z + n)] = Var n E L''(z + n),

    exactly so for a Gaussian (Stein's lemma): half the sum of noise times gradient measures the cost, from the backward pass of
    the training step itself. With Var s_j from the estimate of H it should be sum_j Var s_j w_j^2 H_jj / 2. The ratio of
    both sums is the factor that H is wrong by, for example through labels that are counted wrongly or a loss to which the estimate
    does not apply. It is measured in the batches that update the estimate; a ratio that is surely (by 4 standard errors) above 2
    or below 1/2 multiplies H from there on. The standard error is the larger one of the spread over batches and of what
    independent noise has in gradients of that size, sum Var n (dL/dz)^2: noise that is rare hardly spreads in a few batches.
    The sums stay on the device; they are read after 8, 16, 32, ... such batches.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset before a new fit."""
        self.factor = 1.0  # H's, found so far
        self.active = False  # this batch is measured
        self._batches: list[Tensor] = []  # since the last correction: twice the cost, measured and estimated; variance
        self._parts: list[Tensor] = []  # of this batch: measured, and its variance
        self._expected = torch.zeros(())
        self._masked: dict[str, Tensor] = {}  # Var s of the weights that masks multiply in this batch, by name

    def attach(self, weights: WeightStore | GroupedWeights, attachment: Attachment) -> None:
        """Observe the gradients of weights, before a mask multiplies them."""
        for name in weights.parameters:
            attachment.on_gradient(name, partial(self._on_gradient, weights, name))

    # -- a batch -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, noisy: list[tuple[Tensor, ...]], masked: Mapping[str, Tensor] | None = None) -> None:
        """Measure this batch, in which weights have noise: each parameter's w, H and Var s.

        ``masked`` is Var s, by name, of the weights that masks multiply. The noise on outputs is observed as it is added.
        """
        self._masked = dict(masked or {})
        estimated = [(w * w * curvature * variance).sum(dtype=torch.float32) for w, curvature, variance in noisy]
        self.active, self._parts = bool(estimated), []
        if estimated:
            self._expected = torch.stack([part.to(estimated[0].device) for part in estimated]).sum()

    @torch.no_grad()
    def _on_gradient(self, weights: WeightStore | GroupedWeights, name: str, grad: Tensor) -> None:
        if self.active and name in self._masked:
            live = weights.live(name)
            self.add(weights.parameters[name].detach() - live, grad, self._masked[name] * live * live)

    def observe(self, noisy: Tensor, noise: Tensor) -> None:
        """Observe a tensor of the network that ``noise`` was added to."""
        if noisy.requires_grad:
            noise = noise.detach()
            noisy.register_hook(lambda grad: self.add(noise, grad, noise * noise))

    @torch.no_grad()
    def add(self, noise: Tensor, grad: Tensor, variance: Tensor) -> None:
        """Add noise times gradient, summed; ``variance``: the noise's, element by element."""
        if self.active:
            grad = grad.detach()
            self._parts.append(torch.stack([(noise * grad).sum(dtype=torch.float32), (variance * grad * grad).sum(dtype=torch.float32)]))

    def cancel(self) -> None:
        """Leave this batch out."""
        self.active, self._parts, self._masked = False, [], {}

    @torch.no_grad()
    def end(self, scale: float, mean: Callable[[Tensor], Tensor] | None) -> str:
        """End the batch, whose loss was multiplied by ``scale``; return what was found if H is corrected, else "". A collective."""
        if not self.active:
            return ""
        expected = self._expected
        measured, variance = sum((part.to(expected.device) for part in self._parts), expected.new_zeros(2)) / scale
        batch = torch.stack([measured, expected, variance / scale])
        self.cancel()
        self._batches.append(batch if mean is None else mean(batch))
        count = len(self._batches)
        return self._judge() if count >= FIRST and count & (count - 1) == 0 else ""

    def _judge(self) -> str:
        ratio, error = self.ratio()
        if not math.isfinite(error) or (ratio + SURE * error >= 1 / RIGHT and ratio - SURE * error <= RIGHT):
            return ""
        before, self.factor = self.factor, min(max(self.factor * max(ratio, LEAST), LEAST), MOST)
        count, self._batches = len(self._batches), []
        if self.factor == before:
            return ""
        found = f"in {count} batches the noise cost {ratio:.2g} +- {error:.1g} times what the curvature estimate says"
        if self.factor == LEAST:
            return f"{found}: check its labels and its reduction. From here on the penalty's gradient takes the noise's place"
        return f"{found}; the estimate is multiplied by {self.factor:.2g} from here on"

    def ratio(self) -> tuple[float, float]:
        """Return the measured cost over the estimated one, and its standard error; (nan, inf) before two batches."""
        batches = torch.stack(self._batches).double().cpu() if self._batches else torch.empty(0, 3, dtype=torch.float64)
        measured, expected, variance = batches[batches.isfinite().all(1)].T
        count, total = len(measured), float(expected.sum())
        if count < 2 or total <= 0:
            return math.nan, math.inf
        ratio = float(measured.sum()) / total
        spread = float(((measured - ratio * expected) ** 2).sum()) * count / (count - 1)
        return ratio, math.sqrt(max(spread, float(variance.sum()))) / total

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the factor and the batches measured since; empty before there are any."""
        batches = {"noise_cost": torch.stack(self._batches).cpu()} if self._batches else {}
        return batches | ({"curvature_factor": self.factor} if self.factor != 1 else {})

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the entry, unless ``state`` may be loaded."""
        if "curvature_factor" in state:
            entry(state, "curvature_factor", is_factor, "a finite number > 0")
        if "noise_cost" in state:
            entry(state, "noise_cost", _are_batches, "a floating tensor of shape (batches, 3)")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.factor, batches = state.get("curvature_factor", 1.0), state.get("noise_cost")
        self._batches = [] if batches is None else list(batches)


def _are_batches(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2 and value.shape[1] == 3
