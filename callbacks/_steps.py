"""What a form does to gradients and weights itself, around the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse import _rates, shards
from lightning_sparse._joined import Row
from lightning_sparse._joint import Columns, Joint
from lightning_sparse.duality import Penalty
from lightning_sparse.optimizer import StepSizes

if TYPE_CHECKING:
    from lightning_sparse.callbacks.base import Sparsifier


def scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """What an added gradient is multiplied by: a fused optimiser unscales fp16 gradients itself, so it must be given scaled ones."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def loss_scale(trainer: Trainer, manual: bool) -> float:
    """What Lightning multiplied the loss by before its backward: an fp16 scale, and one part of the batches of an accumulation."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor = 1.0 if scaler is None else float(scaler.get_scale())
    return factor / (1 if manual else trainer.accumulate_grad_batches)


def parts(joint: Joint, penalty: Penalty, columns: Columns, written: int, whole: bool = False) -> Iterable[Row]:
    """The parts of each row's tensors that this process holds, in pieces where a weight's penalty does not depend on the others.
    Large ones stay ``whole`` where one kernel does all.

    What is written to the column ``written`` of one is in its tensors once the next is asked for.
    """
    held = [*map(shards.held_of, columns)]
    return joint.pieces(held, written, whole) if penalty.separable else zip(*held, strict=True)


def add(joint: Joint, penalty: Penalty, columns: Columns, slope: Callable[[Tensor], Tensor], alpha: float) -> None:
    """The columns being weights and gradients: add ``alpha`` times the weights' ``slope`` to the gradients."""
    weights, grads = map(shards.held_of, columns)
    if penalty.separable:
        joint.add(weights, grads, slope, alpha)
    else:
        for w, grad in zip(weights, grads, strict=True):
            grad.add_(slope(w), alpha=alpha)


class Alike(NamedTuple):
    """Parameters whose weights one rule finds the optimiser's rate of.

    ``state`` is what the optimiser keeps of one of them; ``numbers`` says which they are; the last of ``columns`` are what is
    kept for each weight and tells its rate, in the order of ``moments``.
    """

    group: dict[str, Any]
    state: Mapping[str, Any]
    moments: tuple[str, ...]
    numbers: list[int]
    columns: list[list[Tensor]]

    def rate_state(self, held: Sequence[Tensor]) -> dict[str, Any]:
        """The state with the columns ``held`` of a piece of the rows in the place of its moments."""
        return {**self.state, **dict(zip(self.moments, held, strict=True))}


def alike(
    optimizer: torch.optim.Optimizer, members: Iterable[tuple[Tensor, dict[str, Any], Row]], sizes: StepSizes | None = None
) -> list[Alike]:
    """``members``, each a parameter, its group of ``optimizer`` and the beginning of its row, by what their rates have in common.

    Without ``sizes`` the optimiser's own state is taken for what it is in torch's.
    """
    sizes = sizes or StepSizes()
    kinds: dict[object, Alike] = {}
    for number, (parameter, own, row) in enumerate(members):
        state, group = sizes.of(optimizer, parameter, own)
        moments = _rates.moments(state, parameter)
        step = state.get("step", 0)
        read = not isinstance(step, Tensor) or step.is_cpu  # on an accelerator that would wait for it
        key = (id(group), float(step), tuple(moments), len(row)) if read else number
        if key not in kinds:
            kinds[key] = Alike(group, state, tuple(moments), [], [[] for _ in range(len(row) + len(moments))])
        kinds[key].numbers.append(number)
        for column, tensor in zip(kinds[key].columns, (*row, *moments.values()), strict=True):
            column.append(tensor)
    return list(kinds.values())


def check_hooked(callback: Sparsifier, optimizer: torch.optim.Optimizer) -> None:
    """RuntimeError for an optimiser that was stepped behind Lightning's back, so that nothing was added to its gradients."""
    if not callback._clock.is_prepared(optimizer) and not callback.frozen:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() was called without Lightning's on_before_optimizer_step, where "
            f"{type(callback).__name__} adds its gradient; step the optimisers of self.optimizers(), or use AdaptiveProx"
        )
