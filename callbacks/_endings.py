"""After training: the zeros stay true, files hold what the module holds, and what others write later is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse import elementwise
from lightning_sparse.callbacks import _report, _swaps

if TYPE_CHECKING:
    from lightning_sparse.callbacks._supported import Supported

SMALL = 0.01  # share of the weights' squared norm: zeros that cost less are made in an average that was handed over


class Ending:
    """What a callback left in the module when training ended, or failed."""

    def __init__(self, callback: Supported, failed: bool = False) -> None:
        self.failed = failed
        self._left = _swaps.Snapshot(callback, alone=failed)  # the other ranks may not have failed

    def keeps(self, callback: Supported, name: str) -> bool:
        """Files show a parameter's data as they are: true zeros, or what another wrote there since."""
        return not self.failed or self._left.changed(callback, name)

    def settle(self, callback: Supported, trainer: Trainer, hook: str) -> None:
        """After others' ``hook``: make the zeros of an average that was handed over true, leave other weights alone; log what is there."""
        changed = self._left.differs(callback)
        if trainer.world_size > 1:
            changed = trainer.strategy.reduce_boolean_decision(changed, all=False)
        if not changed:
            return
        lost = _lost(callback)
        if callback._swaps.seen or lost <= SMALL:
            callback.prune()
        for peer in dict.fromkeys((callback, _report.peers_of(trainer)[-1])):  # the last one logs the totals
            _report.finish(peer, trainer)
        if not callback._swaps.seen and lost > SMALL:
            rank_zero_warn(
                f"the weights were changed in {hook} ({', '.join(_swaps.hooks_of(trainer, [hook])) or 'of another callback'}), after "
                f"{type(callback).__name__} had made its zeros true; its zeros would take {lost:.0%} of their squared norm, so they are "
                "left as they are, and the zeros logged last are theirs. If they are an average of the trained weights, call the "
                "callback's prune() after fit; if they are those of the best epoch, add BestAfterTarget() so that it is a sparse one"
            )


@torch.no_grad()
def _lost(callback: Supported) -> float:
    """The share of the weights' squared norm that the zeros would take."""
    zeros = callback.all_zeros()
    taken = norm = 0.0
    for name in callback.parameters:
        w = callback._live(name)
        squares = elementwise.local_part(w).double().square()
        taken += float(elementwise.sum_shards(squares[elementwise.local_part(zeros[name])].sum(), w))
        norm += float(elementwise.sum_shards(squares.sum(), w))
    return taken / norm if norm > 0 else 0.0


def filed(callback: Supported, name: str) -> Tensor:
    """What a file written now holds of a parameter: thresholded weights in training, later the module's own."""
    ending = callback._ending
    own = ending is not None and ending.keeps(callback, name)
    return callback._live(name) if own else callback.thresholded(name)


def is_frozen(callback: Supported) -> bool:
    """The support is frozen, and the weights that a file written now holds lie in it."""
    if callback.support is None or callback._ending is None or callback._ending.failed:
        return callback.frozen
    return all(_lies_in(callback._live(name), kept) for name, kept in callback.support.items())


def _lies_in(w: Tensor, kept: Tensor) -> bool:
    return int(elementwise.sum_shards(((elementwise.local_part(w) != 0) & ~elementwise.local_part(kept).to(w.device)).sum(), w)) == 0


def leave_out(callback: Supported, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Take the callback's state out of a file of another module than the one that it trained."""
    own = {id(parameter) for parameter in module.parameters()}
    if callback._ending is not None and any(id(parameter) not in own for parameter in callback.parameters.values()):
        checkpoint.get("callbacks", {}).pop(callback.state_key, None)
