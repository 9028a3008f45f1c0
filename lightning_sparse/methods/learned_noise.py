"""Train with noise that is learned weight by weight, at a price: variational dropout and hard concrete gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import _checks, duality
from lightning_sparse.duality import Penalty
from lightning_sparse.gates import Gate
from lightning_sparse.methods.base import Member, Method, Run, Scale, Step
from lightning_sparse.methods.kl_weight import KlWeight
from lightning_sparse.methods.learned_parameters import LearnedParameters
from lightning_sparse.methods.noisy_forwards import WHOLE_BECAUSE, NoisyForwards
from lightning_sparse.noise import LOUDEST, LOUDEST_UNDER_SGD, Additive, Multiplicative, normal_like
from lightning_sparse.per_label import PerLabel
from lightning_sparse.step import bound_uniform_steps, uniform_rate
from lightning_sparse.weights import Attachment

_STEP = 1.0  # largest step under SGD, in deviations that weights are usually initialised with


class LearnedNoise(Method):
    """Noise of variance w^2 / eta, whose price is added to the gradients before each step: what both are is the subclass's."""

    takes_parts, whole_because, requires_hook = False, WHOLE_BECAUSE, True
    solvable = False  # zeros follow from what is learned
    local = False  # noise on the outputs of layers

    def __init__(self, penalty: Penalty, learned_lr: float | None = None) -> None:
        super().__init__(penalty)
        self.learned, self.forwards = LearnedParameters(self.start, learned_lr), NoisyForwards(self)

    # -- what a subclass says -----------------------------------------------------------------------------------------------

    def start(self, name: str, w: Tensor) -> Tensor:
        """Return the initial values of a weight's learned parameter."""
        raise NotImplementedError

    def precision(self, w: Tensor, learned: Tensor) -> Tensor:
        """Return the eta of the noise, of weights ``w`` and their learned parameters."""
        raise NotImplementedError

    def draw(self, name: str, attachment: Attachment, generator: torch.Generator) -> None:
        """Put noisy weights into a parameter's data."""
        raise NotImplementedError

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the noise on a layer's output for the input ``x``."""
        raise NotImplementedError

    def add_noise_gradient(self, name: str, grad: Tensor) -> None:
        """Add the gradient in the learned parameter, given that of the noisy weights."""
        raise NotImplementedError

    def add_price_gradient(self, name: str, parameter: Tensor, strength: float, rate: float) -> None:
        """Add the gradient of ``strength`` times the price; ``rate``: how far a unit of gradient moves a weight, 0 where it depends."""
        raise NotImplementedError

    # -- formulas ----------------------------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...]:
        """Return w and its learned parameters."""
        return w, self.learned.value(name, w)

    def eta(self, lam: float, *terms: Tensor) -> Tensor:
        """Return the learned eta in units of lam, so that the noise's variance is lam / eta as in the other methods."""
        return lam * self.precision(*terms)

    def alpha(self, lam: float, *terms: Tensor) -> Tensor:
        """Return the noise's own keep probability, also while lam is still 0."""
        return duality.keep_probability(self.precision(*terms), 1.0)

    @property
    def oscillates(self) -> bool:
        """The noise alone says what is zero."""
        return False

    # -- moments -----------------------------------------------------------------------------------------------------------

    def reset(self, run: Run) -> None:
        super().reset(run)
        self.learned.reset(run)
        self.forwards.reset(run)

    def prepare(self) -> None:
        self.learned.prepare()
        self.forwards.prepare()

    def check(self, optimizer: Optimizer, members: list[Member]) -> str:
        return self.learned.check(type(self).__name__, optimizer, members)

    def attach(self, module: nn.Module, wrappers: Iterable[Any] = ()) -> None:
        attachment: Any = self.run.weights.attachment
        for name in self.run.weights.parameters:  # before the mask multiplies the gradient
            attachment.on_gradient(name, partial(self._on_gradient, name))
        self.learned.attach(wrappers)
        self.forwards.attach(module)

    @torch.no_grad()
    def _on_gradient(self, name: str, grad: Tensor) -> None:
        forwards = self.forwards
        if forwards.noise_active and name in forwards.trained and name not in forwards.layers:
            self.add_noise_gradient(name, grad)

    def before_forward(self, batch: Any) -> None:
        if self.forwards.begin_batch():
            self.forwards.draw()
        self.learned.arrange()

    def prepare_outputs(self, name: str) -> None:
        """Nothing: the noise on outputs is made of the learned parameters."""

    def draw_weights(self, names: list[str], attachment: Attachment) -> None:
        numbers = {name: number for number, name in enumerate(self.run.weights.parameters)}
        for name in names:
            self.draw(name, attachment, self.forwards.stream(numbers[name], -1))

    def after_backward(self, scale: Scale, overflowed: Callable[[bool], bool] | None = None) -> None:
        if not self.run.manual:  # else more forwards of this batch may come before a step
            self.after_batch()
        if overflowed is not None and self.run.support.frozen is None:
            self.learned.show_overflow(overflowed)

    @torch.no_grad()
    def before_optimizer(self, step: Step) -> None:
        self.learned.before_optimizer(step)
        self.learned.average(step)
        for name, parameter, group in step.trained():
            rate = uniform_rate(step.optimizer, group) / step.grad_scale
            self.add_price_gradient(name, parameter, step.lam_on_gradient(group), rate)
        self.learned.limit(step)

    def after_optimizer(self, step: Step) -> None:
        self.learned.after_optimizer(step)
        if self.run.manual:  # the next forward of this batch is noisy too
            self.forwards.draw()

    def after_batch(self) -> None:
        self.forwards.end_batch()

    def movement(self) -> str:
        return self.learned.movement()

    def finish(self) -> None:
        self.learned.store_moments()

    def release(self) -> None:
        self.forwards.release()
        self.learned.release()

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self.forwards.state_dict() | self.learned.state_dict()

    def check_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        self.forwards.check_state(state)
        self.learned.check_state(state, parameters)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.forwards.load_state_dict(state)
        self.learned.load_state_dict(state)


class VariationalDropout(LearnedNoise):
    """Gaussian noise of variance w^2 / eta on each weight, at the price f(eta) / 2, the divergence from a prior.

    Source: Molchanov, Ashukha, Vetrov, arXiv 1701.05369.

    Args:
        penalty: what the noise and its price amount to.
        divergence: the penalty whose dual is f.
        noise: "weight", "local" or "additive": on the weights, or on the outputs of layers with log eta or log sigma.
        learned_lr: the learning rate of log eta or log sigma, under the weights' schedule; None is the weights' own.
        log_start: what log sigma ("additive") or -log eta (the others) starts at.
        per_label: finds the strength, 1 / the labels of the training set, from the losses of the first step; None: it is given.
    """

    def __init__(
        self,
        penalty: Penalty,
        divergence: Penalty,
        noise: str,
        learned_lr: float | None,
        log_start: float,
        per_label: PerLabel | None = None,
    ) -> None:
        super().__init__(penalty, learned_lr)
        self.per_label, self.kl_weight = per_label, KlWeight(per_label, divergence)
        self.divergence, self.noise = divergence, _checks.one_of("noise", noise, ("weight", "local", "additive"))
        self.kind = Additive() if noise == "additive" else Multiplicative()
        self.local, self.log_start = noise != "weight", _checks.between("log_start", log_start, -30, 30)

    def start(self, name: str, w: Tensor) -> Tensor:
        return torch.full_like(w, self.kind.start(self.log_start), dtype=torch.promote_types(w.dtype, torch.float32))

    def precision(self, w: Tensor, learned: Tensor) -> Tensor:
        return self.kind.eta(w, learned)

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.kind.output_noise(layer, x, self.learned.values[name].to(self.run.weights.live(name).dtype), generator)

    def draw(self, name: str, attachment: Attachment, generator: torch.Generator) -> None:
        w = self.run.weights.live(name)
        draw = normal_like(w, generator).mul_(self.kind.deviation(w, self.learned.values[name].detach()))
        if self.noise == "additive":
            attachment.substitute(name, w + draw)
        else:
            attachment.multiply(name, 1 + draw)

    def add_noise_gradient(self, name: str, grad: Tensor) -> None:
        """The gradient of the noisy weight times what the noise added to it."""
        added = self.run.weights.parameters[name].detach() - self.run.weights.live(name)
        self.learned.grad_of(name).add_(grad * self.kind.slope(added))

    def add_price_gradient(self, name: str, parameter: Tensor, strength: float, rate: float) -> None:
        columns: Any = parameter.grad, self.learned.grad_of(name), self.run.weights.live(name), self.learned.values[name].detach()
        self.run.engine.update_([[column] for column in columns], self._descend, (strength, rate), written=2)

    def _descend(self, in_w: Tensor, in_theta: Tensor, w: Tensor, theta: Tensor, strength: float, rate: float) -> None:
        slopes = self.kind.divergence(self.divergence, w, theta)
        if slopes[0] is not None and rate > 0:  # a step that is as long as its gradient must not carry a weight beyond 0
            farthest = w.abs().div_(rate)
            in_w.add_(torch.minimum(torch.maximum(slopes[0].mul_(strength), -farthest), farthest))
        elif slopes[0] is not None:
            in_w.add_(slopes[0], alpha=strength)
        in_theta.add_(slopes[1], alpha=strength)

    @torch.no_grad()
    def after_optimizer(self, step: Step) -> None:
        super().after_optimizer(step)
        for name, _, group in step.members:
            loudest = LOUDEST_UNDER_SGD if uniform_rate(step.optimizer, group) > 0 else LOUDEST
            self.kind.bound_(self.run.weights.live(name), self.learned.values[name].detach(), loudest)

    def reset(self, run: Run) -> None:
        super().reset(run)
        self.kl_weight.reset(run)

    def begin(self) -> None:
        self.kl_weight.begin(type(self).__name__)

    def before_forward(self, batch: Any) -> None:
        if self.kl_weight.watches:
            self.kl_weight.before_forward(batch)
        super().before_forward(batch)

    def check(self, optimizer: Optimizer, members: list[Member]) -> str:
        self.kl_weight.watches = self.kl_weight.watches or any(uniform_rate(optimizer, group) > 0 for _, _, group in members)  # SGD
        return super().check(optimizer, members)

    def before_backward(self, loss: Tensor, scale: Scale) -> None:
        if self.kl_weight.watches:
            self.kl_weight.before_backward(loss, scale)

    def after_backward(self, scale: Scale, overflowed: Callable[[bool], bool] | None = None) -> None:
        super().after_backward(scale, overflowed)
        if self.kl_weight.watches:
            self.kl_weight.after_backward(scale)

    def before_optimizer(self, step: Step) -> None:
        if self.kl_weight.watches:
            self.penalty = self.kl_weight.before_optimizer(step, type(self).__name__) or self.penalty
        super().before_optimizer(step)
        if self.noise != "additive":  # under SGD gradients grow with noise and weights, else to NaN
            bound_uniform_steps(step.optimizer, step.trained(), _STEP, step.grad_scale)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.kl_weight.state_dict()

    def check_state(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        super().check_state(state, parameters)
        self.kl_weight.check_state(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty = self.kl_weight.load_state_dict(state) or self.penalty
        super().load_state_dict(state)


class HardConcrete(LearnedNoise):
    """Each weight is trained behind a hard concrete gate s, as the mask s / E s, at the price P(s > 0) / 2.

    Source: Louizos, Welling, Kingma, arXiv 1712.01312.

    Args:
        penalty: what the gate and its price amount to.
        gate: the gate.
        learned_lr: the learning rate of log alpha, under the weights' schedule; None is the weights' own.
        log_start: what log alpha starts at.
    """

    def __init__(self, penalty: Penalty, gate: Gate, learned_lr: float | None, log_start: float) -> None:
        super().__init__(penalty, learned_lr)
        self.gate, self.log_start = gate, _checks.between("log_start", log_start, -10, 10)

    def reset(self, run: Run) -> None:
        super().reset(run)
        self._slopes: dict[str, Tensor] = {}  # of this batch's masks in log alpha

    def start(self, name: str, w: Tensor) -> Tensor:
        return torch.full_like(w, self.log_start, dtype=torch.promote_types(w.dtype, torch.float32))

    def precision(self, w: Tensor, learned: Tensor) -> Tensor:
        return duality.eta(self.gate.keep_probability(learned), 1.0).to(w.dtype)

    def draw(self, name: str, attachment: Attachment, generator: torch.Generator) -> None:
        live = self.run.weights.live(name)
        mask, slope = torch.empty_like(live), torch.empty_like(live)

        def draw(mask: Tensor, slope: Tensor, theta: Tensor) -> None:
            drawn = self.gate.mask(theta, generator)
            mask.copy_(drawn[0])
            slope.copy_(drawn[1])

        self.run.engine.update_([[mask], [slope], [self.learned.values[name].detach()]], draw, written=2)
        self._slopes[name] = slope
        attachment.multiply(name, mask)

    def add_noise_gradient(self, name: str, grad: Tensor) -> None:
        columns = self.learned.grad_of(name), grad, self.run.weights.live(name), self._slopes[name]
        self.run.engine.update_([[column] for column in columns], lambda into, grad, w, slope: into.add_(grad * w * slope))

    def add_price_gradient(self, name: str, parameter: Tensor, strength: float, rate: float) -> None:
        theta = self.learned.values[name].detach()
        self.run.engine.add_([self.learned.grad_of(name)], [theta], self.gate.open_slope, strength / 2)

    def after_batch(self) -> None:
        super().after_batch()
        self._slopes = {}
