"""Which parameters a callback works on, also those that become trainable in the middle of a run (BackboneFinetuning)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_sparse.callbacks.compatibility import is_a
from lightning_sparse.select import select

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form

Places = dict[str, tuple[Optimizer, int]]


def choose(callback: Form, trainer: Trainer, module: LightningModule, state: Any = None) -> dict[str, Parameter]:
    """The selected parameters at the start of a fit.

    Beside a finetuning callback those that match but are frozen may come later; else they are refused as
    :func:`lightning_sparse.select.select` says. A run that is resumed from ``state`` takes on at once what that held.
    """
    thaws = any(is_a(one, "BaseFinetuning") for one in trainer.callbacks)  # type: ignore[attr-defined]
    chosen = select(module, callback.select, trainable=not thaws)
    now = {name: parameter for name, parameter in chosen.items() if parameter.requires_grad}
    before = _taken(state)
    known = now if before.keys() <= now.keys() else select(module, callback.select, trainable=False)
    return {name: known[name] for name in before if name in known} | now  # in the order in which they joined


def _taken(state: Any) -> dict[str, Any]:
    taken = state.get("taken") if isinstance(state, dict) else None
    return taken if isinstance(taken, dict) else {}


def fits(callback: Form, trainer: Trainer, module: LightningModule, state: Any) -> bool:
    """``state`` is a Sparsifier's, of the same parameters."""
    return bool(_taken(state)) and set(_taken(state)) == set(choose(callback, trainer, module, state))


def newcomers(callback: Form, trainer: Trainer, module: LightningModule) -> dict[str, Parameter]:
    """Parameters that match the selection and that an optimiser has come to update."""
    updated = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    updated -= {id(parameter) for parameter in callback.parameters.values()}
    found = select(module, callback.select, trainable=False)
    return {name: parameter for name, parameter in found.items() if parameter.requires_grad and id(parameter) in updated}


def signature(callback: Form, trainer: Trainer) -> tuple[int, ...]:
    """What changes when parameters join: the optimisers' numbers of groups, and how many of the selected are trained."""
    groups = (len(optimizer.param_groups) for optimizer in trainer.optimizers)
    return (*groups, sum(parameter.requires_grad for parameter in callback.parameters.values()))


def places(parameters: dict[str, Parameter], optimizers: list[Optimizer]) -> Places:
    """The optimiser and the number of its group that update each parameter (groups are replaced when a state is loaded)."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = ((o, i, p) for o in optimizers for i, group in enumerate(o.param_groups) for p in group["params"])
    return {names[id(p)]: (o, i) for o, i, p in found if id(p) in names}
