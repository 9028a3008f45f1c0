"""Train with adaptive masks: weights s * w in each batch, with a keep probability that follows |w|, calibrated by the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.curvature import Curvature
from lightning_sparse.curvature.estimate import EXACT, calibrated
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import Engine, scalar_div
from lightning_sparse.methods.base import Member, Method, Run, Scale, Step
from lightning_sparse.methods.noise_cost import NoiseCost
from lightning_sparse.methods.noisy_forwards import WHOLE_BECAUSE, NoisyForwards
from lightning_sparse.noise import Noise, bounded_variance, kept, output_noise
from lightning_sparse.weights import Attachment

QUARTER = 0.25  # share of the samples with noise on outputs, where the noise is weak: as good as all, at less cost
WEAK = 0.5  # the smallest keep probability of noise whose cost is of second order
FADES, FADED = 0.1, 0.3  # shares of a run at which bounded noise begins to fade and has faded


def faded(keep: float, t: float) -> float:
    """Return the smallest keep probability at the share ``t`` of a run: its variance falls to 0 linearly, from FADES to FADED."""
    left = min(max((FADED - t) / (FADED - FADES), 0.0), 1.0)
    return 1 / (1 + (1 / keep - 1) * left)


@dataclass(frozen=True)
class MaskFormula:
    """What a weight ``w`` gets: noise, and the penalty that it falls short of.

    The functions are of ``(w, lam, keep)`` or, calibrated by H_jj, of ``(w, H, lam, keep)``, ``keep`` being the smallest keep probability.
    """

    penalty: Penalty
    ceiling: float

    def eta(self, lam: Any, w: Tensor, *curvature: Tensor) -> Tensor:
        """The eta of the noise: eta_hat(w), times max(H, lam / ceiling) where H is known."""
        eta = self.penalty.eta_hat(w)
        return calibrated(eta, curvature[0].to(eta), lam, self.ceiling) if curvature else eta

    def keep_probability(self, *terms: Any) -> Tensor:
        """alpha = 1 / (1 + lam / eta), ``keep`` at least, but for a rule that drops a weight for good."""
        *terms_of_eta, lam, keep = terms
        eta = self.eta(lam, *terms_of_eta)
        alpha = kept(scalar_div(lam, eta)).clamp_(min=keep)
        return alpha if self.penalty.separable else alpha.masked_fill(eta == 0, 0.0)

    def variance(self, *terms: Any) -> Tensor:
        """Var s = (1 - alpha) / alpha = lam / eta, at most that of ``keep``."""
        *terms_of_eta, lam, keep = terms
        return bounded_variance(self.eta(lam, *terms_of_eta), lam, keep)

    def unrealised(self, w: Tensor, curvature: Tensor, lam: Any, keep: Any) -> Tensor:
        """The share in [0, 1] of lam * Omega that noise bounded by ``ceiling`` and ``keep`` does not realise, weight by weight.

        To second order noise costs H_jj Var s_j w_j^2 / 2, and lam w_j^2 / (2 eta_j) without bounds:
        1 - H min(1 / max(H, lam / ceiling), (1 / keep - 1) eta / lam).
        """
        widest = self.penalty.eta_hat(w) * ((1 / keep - 1) / lam)
        realised = torch.minimum(curvature.clamp(min=lam / self.ceiling).reciprocal_(), widest).mul_(curvature)
        return realised.neg_().add_(1).clamp_(0, 1)

    def eta_of_both(self, w: Tensor, curvature: Tensor, lam: Any, keep: Any) -> Tensor:
        """The eta of noise and penalty: 1 / eta is the mean of both, weighted with their shares of lam * Omega."""
        share = self.unrealised(w, curvature, lam, keep)
        return self.penalty.eta_hat(w) / (share + (1 - share) / curvature.clamp(min=lam / self.ceiling))

    def add_remainder(self, grad: Tensor, w: Tensor, curvature: Tensor, lam: Any, keep: Any, strength: Any) -> None:
        """Add ``strength`` times the slope of what noise of strength ``lam`` falls short of the penalty.

        It is :meth:`unrealised` times omega'(w) = w / eta_hat(w): omega' - H min(omega' / max(H, lam / ceiling), (1 / keep - 1) w / lam).
        """
        size = w.abs()
        slope = self.penalty.gradient(size)
        realised = torch.minimum(slope / curvature.clamp(min=lam / self.ceiling), size.mul_((1 / keep - 1) / lam)).mul_(curvature)
        grad.add_(torch.sub(slope, realised).clamp_(min=0).copysign_(w).mul_(strength))


class Mask(Method):
    """Run each batch with weights ``s * w``, E s = 1, Var s = lam / (H eta_hat(w)) (AdaDrop, GaussDrop).

    Where the noise is local, a Linear or ConvNd layer's weights stay as they are and its outputs get noise of the variance that such
    masks would give them; Var s is computed once a batch, the noise drawn anew in each forward.

    Noise costs lam * Omega to second order alone, while it is weak: it is bounded, and the gradients get what it falls short of.

    Args:
        penalty: whose eta_hat the noise follows.
        noise: the masks' distribution.
        curvature: the estimate of H; None leaves the noise uncalibrated.
        ceiling: largest lam / H that calibration uses; None is what the estimate allows.
        alpha_min: smallest keep probability that noise is drawn with; None is what the estimate allows, and fades.
        remainder: add to the gradients what bounded noise falls short of lam * Omega.
    """

    needs_separable, compiles, takes_parts, whole_because = False, True, False, WHOLE_BECAUSE
    formula_type: ClassVar[type[MaskFormula]] = MaskFormula  # another eta is a subclass of it

    def __init__(
        self,
        penalty: Penalty,
        noise: Noise,
        curvature: Curvature | None,
        ceiling: float | None = None,
        alpha_min: float | None = None,
        remainder: bool = True,
    ) -> None:
        super().__init__(penalty)
        self.noise, self.curvature, self.alpha_min = noise, curvature, alpha_min
        largest, self._keep = curvature.noise_limits if curvature is not None and penalty.separable else EXACT
        self.formula = self.formula_type(penalty, largest if ceiling is None else ceiling)
        has_own_eta = type(self).eta is not Mask.eta or self.formula_type.eta is not MaskFormula.eta
        self.adds_penalty = remainder and curvature is not None and penalty.separable and not has_own_eta
        self.cost = NoiseCost()
        self.forwards = NoisyForwards(self, self.cost)

    @property
    def smallest_keep(self) -> float:
        """The smallest keep probability that noise is drawn with now."""
        if self.alpha_min is not None:
            return self.alpha_min
        strength = self.run.strength if hasattr(self, "run") else None
        return faded(self._keep, strength.step / strength.total) if self.fades and strength is not None else self._keep

    @property
    def fades(self) -> bool:
        """The noise is bounded from the start, and fades out in the run's first third."""
        return self.alpha_min is None and self.adds_penalty and self._keep > EXACT[1]

    @property
    def has_faded(self) -> bool:
        """The noise is gone for the rest of the run: what is left is the penalty, which needs no H."""
        return self.fades and self.smallest_keep >= 1

    @property
    def share(self) -> float:
        """The share of a batch's samples that noise on outputs is made for; of bounded noise QUARTER, if none is given."""
        given = getattr(self.noise, "share", None)
        return (QUARTER if self.fades else 1.0) if given is None else float(given)

    @property
    def local(self) -> bool:
        """Noise on the outputs of layers."""
        return self.noise.local and self.penalty.separable

    # -- formulas ----------------------------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None:
        """Return w, and H_jj where it calibrates; None before its first estimate: no noise, no zero."""
        if self.curvature is None or not self.penalty.separable or self.has_faded:  # a rule without a penalty acts as it is written
            return (w,)
        estimate = self.curvature.estimate(name)
        return None if estimate is None else (w, estimate)

    def eta(self, lam: float, *terms: Tensor) -> Tensor:
        if self.adds_penalty and len(terms) == 2 and lam > 0:
            return self.formula.eta_of_both(*terms, lam, self.smallest_keep)
        return self.formula.eta(lam, *terms)

    def noise_keep_probability(self, name: str, w: Tensor) -> Tensor:
        """Return the keep probability that a weight's noise has in training."""
        return self._of_noise(name, w, self.formula.keep_probability, 1.0)

    def _of_noise(self, name: str, w: Tensor, formula: Callable[..., Tensor], without: float) -> Tensor:
        """Return a formula of the noise on values ``w`` of a parameter; ``without`` before the first estimate of H."""
        terms, scalars = self.terms(name, w), (self.run.strength.lam, self.smallest_keep)
        return torch.full_like(w, without) if terms is None else self.run.engine.map([[term] for term in terms], formula, scalars)[0]

    @property
    def oscillates(self) -> bool:
        """Uncalibrated noise pulls a weight by lam H_jj w / eta: how far that reaches is not known where H is not."""
        return self.curvature is not None

    # -- moments -----------------------------------------------------------------------------------------------------------

    def reset(self, run: Run) -> None:
        super().reset(run)
        self.forwards.reset(run)
        self.cost.reset()
        self._unhooked = False  # and said so
        self._is_added = False  # the remainder, to the gradients of the step that is due
        self._observed = False  # this batch, by the estimate of H
        self._spread: dict[str, Tensor] = {}  # Var s of the weights of each layer whose outputs get noise in this batch

    def prepare(self) -> None:
        if self.curvature is not None:
            self.curvature.reset()
        self.forwards.prepare()

    def attach(self, module: nn.Module, wrappers: Iterable[Any] = ()) -> None:
        attachment: Any = self.run.weights.attachment
        if self.curvature is not None:
            self.curvature.attach(module, attachment)
        if self.adds_penalty:
            self.cost.attach(self.run.weights, attachment)
        self.forwards.attach(module)

    def compile(self, engine: Engine, optimizers: Iterable[tuple[Optimizer, list[Member]]]) -> None:
        """For the variance of noise on outputs, and for masks on weights."""
        known, local, what = self.run.weights.parameters, self.forwards.layers, repr(self.penalty)
        values = (0.5,) * (1 if self.curvature is None else 2)
        on_outputs, on_weights = ([p for name, p in known.items() if (name in local) == there] for there in (True, False))
        engine.compile_map(self.formula.variance, on_outputs, values, (0.5, 0.5), what)
        if self.adds_penalty:
            engine.compile_update_(self.formula.add_remainder, known.values(), (0.5,) * 3, (0.5, 0.5, 0.5), what)
            engine.compile_add_(self.penalty.gradient, known.values(), what)
        engine.compile_draw(self.formula.keep_probability, self.noise, on_weights, values, (0.5, 0.5), f"{what} with {self.noise!r}")

    def before_forward(self, batch: Any) -> None:
        self._observed = False
        if not self.has_faded and self.forwards.begin_batch():
            if self.curvature is not None:
                self._observed = True
                self.curvature.begin(self.run.strength.step)
                self.curvature.observe_batch(batch)
            self._draw()

    def _draw(self) -> None:
        self.forwards.draw(noisy=self.smallest_keep < 1)
        if self.curvature is not None:
            self.curvature.generator = self.forwards.stream(-1)
        self.cost.cancel()  # of a batch without backward
        if self.adds_penalty and WEAK <= self.smallest_keep < 1 and self.curvature is not None and self.curvature.is_due:
            self._measure_cost()

    def _measure_cost(self) -> None:
        """Compare the noise of this batch with the estimate of H, unless a batch has several steps, or groups are masked."""
        lam, grouped = self.run.strength.lam, self.run.acting is not None and self.run.acting is not self
        if self.run.manual or grouped or lam <= 0:
            return
        trained, live = self.forwards.trained, self.run.weights.live
        names = (name for name in self.run.weights.parameters if name in trained)  # in an order that is always the same
        rows = {name: terms for name in names if (terms := self.terms(name, live(name))) is not None}
        masked = {name: self.formula.variance(*rows[name], lam, self.smallest_keep) for name in rows if name not in self._spread}
        spread = self._spread | masked
        self.cost.begin([(*terms, spread[name]) for name, terms in rows.items()], masked)

    def prepare_outputs(self, name: str) -> None:
        w, noisy = self.run.weights.live(name), self.run.strength.lam > 0
        self._spread[name] = self._of_noise(name, w, self.formula.variance, 0.0) if noisy else torch.zeros_like(w)

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        return output_noise(layer, x, self._spread[name], generator, self.share)

    def draw_weights(self, names: list[str], attachment: Attachment) -> None:
        """Small weights are drawn together; those whose H_jj is not known yet, and all at lam 0, have no noise."""
        if not names:
            return
        lam, live = self.run.strength.lam, self.run.weights.live
        rows = {name: terms for name in names if (terms := self.terms(name, live(name))) is not None and lam > 0}
        known, generator = list(rows), self.forwards.stream(-1, -1)
        # in a manual loop the graph of an earlier batch's masks may still wait for its backward: their memory is not reused
        how = {"separable": self.penalty.separable, "reuse": not self.run.manual}
        scalars = lam, self.smallest_keep
        drawn = self.run.engine.draw(list(rows.values()), self.formula.keep_probability, self.noise, generator, scalars, **how)
        for number, mask, product in drawn:
            attachment.multiply(known[number], mask, product)

    def before_backward(self, loss: Tensor, scale: Scale) -> None:
        if self.curvature is not None and self._observed and self.run.support.frozen is None:
            self.curvature.observe_loss(loss)
            self.curvature.before_backward(scale())

    def after_backward(self, scale: Scale, overflowed: Callable[[bool], bool] | None = None) -> None:
        if not self.run.manual:  # else more forwards of this batch may come before a step
            self._end_batch()
        self._estimate(more=self.run.manual)
        if self.cost.active and (found := self.cost.end(scale(), self.run.mean)):
            self.curvature.scale_by(self.cost.factor)  # type: ignore[union-attr] # the cost is measured beside an estimate
            self.run.info(f"AdaptiveMask: {found}")

    @torch.no_grad()
    def before_optimizer(self, step: Step) -> None:
        """Add the gradient of what bounded noise falls short of lam * Omega; nothing before the first estimate of H.

        H is the present estimate, in which a step that updates it differs a little from that of the noise drawn.
        """
        self._is_added = True
        rows: dict[float, list[tuple[Any, ...]]] = {}
        for name, parameter, group in step.trained() if self.adds_penalty and step.lam > 0 else ():
            terms = self.terms(name, self.run.weights.live(name))
            if terms is not None:
                rows.setdefault(step.lam_on_gradient(group), []).append((parameter.grad, *terms))
        keep = self.smallest_keep
        for strength, found in rows.items():
            columns = list(zip(*found, strict=True))
            if keep >= 1:  # without noise all of the penalty remains
                step.engine.add_(columns[0], columns[1], self.penalty.gradient, strength, separable=self.penalty.separable)
            else:
                step.engine.update_(columns, self.formula.add_remainder, (step.lam, keep, strength))

    def after_optimizer(self, step: Step) -> None:
        if self.adds_penalty and not self._is_added and step.lam > 0 and not self._unhooked:  # not refused: the noise works without
            self._unhooked = True
            self.run.warn(
                f"{type(step.optimizer).__name__}.step() was called without Lightning's on_before_optimizer_step, where AdaptiveMask adds "
                "what bounded noise falls short of the penalty; lam acts through the noise alone. Step the optimisers of "
                "self.optimizers(), or set alpha_min=1e-3, ceiling=10 and remainder=False"
            )
        self._is_added = False
        if self.run.manual:  # the next forward of this batch is noisy too
            self._draw()

    def after_batch(self) -> None:
        self._end_batch()  # because a step that returned no loss had no backward, and a bare loss.backward() calls no hook
        if self.run.manual:
            self._estimate(more=False)

    def _end_batch(self) -> None:
        self.forwards.end_batch()
        self._spread = {}

    def _estimate(self, more: bool) -> None:
        if self.curvature is None or not self._observed:
            return
        self.curvature.end(self.run.mean, self.run.weights.parameters, more)
        for text in self.curvature.new_warnings():
            self.run.warn(text)

    def release(self) -> None:
        self.forwards.release()
        self._spread = {}

    # -- state ---------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        estimate = {} if self.curvature is None else {"curvature": self.curvature.state_dict()}
        return self.forwards.state_dict() | self.cost.state_dict() | estimate

    def check_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        self.forwards.check_state(state)
        self.cost.check_state(state)
        if self.curvature is not None and "curvature" in state:
            self.curvature.check_state(state["curvature"], parameters)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.forwards.load_state_dict(state)
        self.cost.load_state_dict(state)
        if self.curvature is not None:
            if "curvature" in state:
                self.curvature.load_state_dict(state["curvature"], self.run.weights.parameters)
            self.curvature.scale_by(self.cost.factor)
