"""Faults in a run leave the module unchanged: exceptions, Ctrl-C, NaN and inf."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import ModelCheckpoint
from lightning_sparse.conformance._processes import call
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require

GROUP = "faults"
EPOCHS, STEP = 3, 6  # four batches per epoch; the fault occurs at STEP, in the second epoch
MOMENTS = (
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_start",
    "validation_step",
    "on_save_checkpoint",
)


class InjectedError(Exception):
    """An error raised by the checks in the user's code."""


class Faulty(toys.Toy):
    """Record the module's state at the end of each batch, and call ``fault`` in a hook from a step on."""

    before: dict[str, Any]

    def prepare(self, moment: str, fault: Callable[[Any], Any], step: int = STEP) -> None:
        """Replace the result of hook ``moment`` by ``fault(result)`` from ``step`` on."""
        own = getattr(self, moment)

        def hook(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            return fault(result) if self.trainer.global_step >= step else result

        setattr(self, moment, hook)

    def on_train_batch_end(self, *args: Any) -> None:
        self.before = state_of(self) | {"hooks": self.before["hooks"]}


def state_of(module: torch.nn.Module) -> dict[str, Any]:
    parameters = {name: id(parameter) for name, parameter in module.named_parameters()}
    return {"keys": list(module.state_dict()), "parameters": parameters, "hooks": toys.hooks(module), "weights": toys.weights(module)}


def faulty(subject: Subject, **options: Any) -> Faulty:
    module = Faulty(**(options | ({"optimizer": subject.optimizer} if subject.optimizer else {})))
    module.before = state_of(module)
    return module


def check_unchanged(module: Faulty, when: str) -> None:
    """Check that keys, parameter objects, hooks and weights equal those at the end of the previous batch."""
    now = state_of(module)
    for what in ("keys", "parameters", "hooks"):
        require(now[what] == module.before[what], f"{when}, the {what} are {now[what]}; before {module.before[what]}")
    changed = [name for name, w in module.before["weights"].items() if not torch.equal(w, now["weights"][name])]
    require(not changed, f"{when}, {changed} differ from their values at the end of the previous batch")


def raising(error: BaseException) -> Callable[[Any], Any]:
    def fault(result: Any) -> Any:
        raise error

    return fault


@check("an exception in the user's code, in any hook, restores the weights before the batch and plain keys, and removes all hooks", GROUP)
def an_exception_leaves_the_module(subject: Subject, folder: Path) -> None:
    for moment in MOMENTS:
        module = faulty(subject)
        module.prepare(moment, raising(InjectedError()))
        try:
            subject.fit(module, ModelCheckpoint(folder / moment), enable_checkpointing=True, num_sanity_val_steps=0)
        except InjectedError:
            check_unchanged(module, f"after an exception in {moment}")
        else:
            raise NotApplicable(f"an exception in {moment} does not reach the caller")


@contextmanager
def _interruptible() -> Any:
    """Restore the SIGINT handler at exit, because Lightning disables Ctrl-C during shutdown and does not restore it."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _after_ctrl_c(subject: Subject) -> str:
    module = faulty(subject)
    module.prepare("on_after_backward", raising(KeyboardInterrupt()))
    with _interruptible(), suppress(SystemExit):
        subject.fit(module)
    try:
        check_unchanged(module, "after Ctrl-C")
    except AssertionError as error:
        return str(error)
    return ""


@check("Ctrl-C restores the weights before the batch and plain keys, and removes all hooks", GROUP, slow=True)
def ctrl_c_leaves_the_module(subject: Subject, folder: Path) -> None:
    (problem,) = call(_after_ctrl_c, (subject,))
    require(not problem, problem)


def _check_stops(subject: Subject, module: Faulty, what: str) -> None:
    """Check that the run raises FloatingPointError or ValueError, with the weights of the previous batch."""
    try:
        subject.fit(module)
    except (FloatingPointError, ValueError) as error:
        require("nan" in str(error).lower() or "inf" in str(error).lower(), f"{what}: the error names neither NaN nor inf: {error}")
    else:
        nonfinite = [name for name, w in toys.weights(module).items() if not bool(w.isfinite().all())]
        require(False, f"{what} was not detected; not finite after fit: {nonfinite}")
    check_unchanged(module, f"after {what}")


@check("a non-finite loss ends the run, restores the weights before the batch and removes all hooks", GROUP)
def a_loss_that_is_not_finite(subject: Subject, folder: Path) -> None:
    for value in (torch.nan, torch.inf):
        module = faulty(subject)
        module.prepare("training_step", partial(torch.mul, value))
        _check_stops(subject, module, f"a loss of {value}")


class _Steep(torch.autograd.Function):
    """The identity, with its gradient multiplied by ``slope`` (NaN or inf)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.slope, None


def steep(slope: float, loss: Tensor) -> Any:
    return _Steep.apply(loss, slope)


@check("non-finite gradients of a finite loss end the run before they change a weight", GROUP)
def gradients_that_are_not_finite(subject: Subject, folder: Path) -> None:
    for value in (torch.nan, torch.inf):
        module = faulty(subject)
        module.prepare("training_step", partial(steep, value))
        _check_stops(subject, module, f"a gradient of {value}")


@check("non-finite weights before training are refused and left unchanged", GROUP)
def weights_that_are_not_finite(subject: Subject, folder: Path) -> None:
    for value in (torch.nan, -torch.inf):
        module = faulty(subject)
        with torch.no_grad():
            module.get_parameter("network.0.weight")[1, 2] = value
        before = toys.weights(module)
        try:
            subject.fit(module)
        except (ValueError, FloatingPointError) as error:
            require("network.0.weight" in str(error), f"the error does not name network.0.weight: {error}")
        else:
            require(False, f"a weight of {value} was not detected")
        for name, w in toys.weights(module).items():
            require(torch.equal(w.view(torch.int32), before[name].view(torch.int32)), f"{name} was changed")
