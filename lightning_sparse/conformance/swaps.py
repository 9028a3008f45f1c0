"""Together with other code that swaps weights: custom averages in validation, optimisers with train() and eval() modes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.averages import matrices

GROUP = "neighbours"
EPOCHS = 4
ORDERS = ((True, "before it"), (False, "after it"))
PAIRS = (
    ("on_validation_start", "on_validation_end"),
    ("on_validation_epoch_start", "on_validation_epoch_end"),
    ("on_validation_start", "on_validation_epoch_end"),
    ("on_validation_epoch_start", "on_validation_end"),
)


class Average(Callback):
    """An average of the weights, swapped in by hook ``into`` and out by hook ``out``, by copying or (``exchanges``) by exchange."""

    def __init__(self, into: str, out: str, exchanges: bool = False) -> None:
        self.mean: list[Tensor] = []
        self.saved: list[Tensor] = []
        self.exchanges = exchanges
        self.evaluated: dict[str, Tensor] = {}
        setattr(self, into, partial(self._swap, True))
        setattr(self, out, partial(self._swap, False))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.mean = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for mean, p in zip(self.mean, pl_module.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.25)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.evaluated = matrices(pl_module)

    @torch.no_grad()
    def _swap(self, into: bool, trainer: Any, pl_module: Any) -> None:
        parameters = [*pl_module.parameters()]
        if into and not self.exchanges:
            self.saved = [p.detach().clone() for p in parameters]
        for p, mean, saved in zip(parameters, self.mean, self.saved or self.mean, strict=True):
            other = p.detach().clone()
            p.data.copy_(mean if into or self.exchanges else saved)
            if self.exchanges:
                mean.copy_(other)


class _Module(toys.Toy):
    """A toy that swaps an :class:`Average` in its own hooks."""

    def take(self, average: Average | None, into: str, out: str) -> _Module:
        if average is not None:
            setattr(self, into, lambda: average._swap(True, None, self))
            setattr(self, out, lambda: average._swap(False, None, self))
        return self


def _module(subject: Subject) -> _Module:
    return _Module(optimizer=subject.optimizer) if subject.optimizer else _Module()


def _run(subject: Subject, average: Average, module: _Module, first: bool, epochs: int = 2) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Fit with ``average`` and return the final weights and their average."""
    subject.fit(module, average, first=first, epochs=epochs)
    return toys.weights(module), average.mean


def _same(ends: tuple[Any, Any], expected: tuple[Any, Any], where: str) -> None:
    for what, now, before in zip(("weights", "mean"), ends, expected, strict=True):
        values, others = (list(one.values()) if isinstance(one, dict) else one for one in (now, before))
        deviation = max(float((one - other).abs().max()) for one, other in zip(values, others, strict=True))
        require(deviation == 0, f"{where}: the {what} differ by {deviation:.3g} from those of the run without swaps")


@check("a custom average, swapped in for validation by any hooks and in either order, does not affect the run", GROUP)
def own_average_changes_nothing(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        expected = _run(subject, Average("none", "none"), _module(subject), first)
        for (into, out), exchanges in [(pair, exchanges) for pair in PAIRS for exchanges in (False, True)]:
            ends = _run(subject, Average(into, out, exchanges), _module(subject), first)
            _same(ends, expected, f"swapped in by {into}, out by {out}, with the callback {order}")
        into, out = PAIRS[0]
        average = Average("none", "none")
        ends = _run(subject, average, _module(subject).take(average, into, out), first)
        _same(ends, expected, f"swapped by the module's own hooks, with the callback {order}")


@check("a custom average is sparse in validation, and its non-zero weights are unchanged", GROUP)
def own_average_is_sparse(subject: Subject, folder: Path) -> None:
    for first, order in ORDERS:
        average, module = Average(*PAIRS[0]), _module(subject)
        _run(subject, average, module, first, EPOCHS)
        names = [name for name, _ in module.named_parameters()]
        mean = dict(zip(names, average.mean, strict=False))
        zeros = sum(int((w == 0).sum()) for w in average.evaluated.values())
        count = f"{zeros} of 176 weights were zero in validation, with the callback {order}"
        require(0 < zeros < 176, f"{count}; some but not all should be zero")
        for name, w in average.evaluated.items():
            require(name in mean, f"the module has no {name}; it has {names}")
            wrong = int(((w != mean[name]) & (w != 0)).sum())
            require(not wrong, f"in validation, with the callback {order}, {wrong} weights of {name} are neither the average's nor zero")


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD: gradients at y, evaluation at an average x. Parameters are y after train() and x after eval()."""

    def __init__(self, parameters: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "train_mode": False, "k": 0})

    def _to(self, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != training:
                weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if p in self.state:
                        p.data.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = training

    def train(self) -> None:
        self._to(True)

    def eval(self) -> None:
        self._to(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            require(group["train_mode"], "the optimiser steps in evaluation mode")
            group["k"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["k"]).sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - 1 / group["k"])))
                z.sub_(p.grad, alpha=group["lr"])
        return loss


class _Modes(toys.Toy):
    """A toy that calls the optimiser's train() and eval() in some hooks."""

    def switch(self, **hooks: str) -> _Modes:
        for hook, mode in hooks.items():
            setattr(self, hook, partial(self._set, mode, hook))
        return self

    def _set(self, mode: str, hook: str, *args: Any) -> None:
        getattr(self.optimizers(), mode)()
        if hook.endswith(("model_train", "model_eval")):
            self.train(mode == "train")


WAYS: dict[str, dict[str, str]] = {
    "only at the start": {"on_train_start": "train"},
    "around validation": {"on_train_epoch_start": "train", "on_validation_start": "eval", "on_validation_end": "train"},
    "around its epoch": {"on_train_start": "train", "on_validation_epoch_start": "eval", "on_validation_epoch_end": "train"},
    "with the module": {"on_fit_start": "train", "on_validation_model_eval": "eval", "on_validation_model_train": "train"},
    "by batches": {"on_train_batch_start": "train", "on_validation_start": "eval"},
}


@check("an optimiser with train() and eval() modes, switched around validation: the same weights, and the logged sparsity", GROUP)
def optimiser_modes_are_kept(subject: Subject, folder: Path) -> None:
    if subject.optimizer:
        raise NotApplicable("the subject brings its own optimiser")
    reference: dict[str, Tensor] = {}
    for way, hooks in WAYS.items():
        for end in ("on_train_end", "on_fit_end"):
            module = _Modes(optimizer=partial(ScheduleFree, lr=0.05)).switch(**hooks, **{end: "eval"})
            trainer = subject.fit(module, epochs=EPOCHS, val_check_interval=2)
            zeros = sum(int((w == 0).sum()) for w in matrices(module).values())
            require(0 < zeros < 176, f"{zeros} of 176 weights are zero after fit, modes switched {way}, last in {end}")
            logged = trainer.callback_metrics.get("sparsity/total")
            same = logged is None or abs(float(logged) - zeros / 176) < 1e-6
            require(same, f"the logged share of zeros is {logged}, the counted one {zeros / 176:.4f}, modes switched {way}, last in {end}")
            for name, w in matrices(module).items():
                deviation = float((w - reference.setdefault(name, w)).abs().max())
                require(deviation < 1e-4, f"{name} differs by {deviation:.3g} after fit, modes switched {way}, last in {end}")
