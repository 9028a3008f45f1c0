"""Show the thresholded weights in validations, also while others exchange the weights around them."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_sparse.callbacks.weight_averaging import Snapshot, hooks_of
from lightning_sparse.weights import WeightStore

_STARTS = ("on_validation_start", "on_validation_epoch_start")
_WITHIN = ("on_validation_batch_start", "on_validation_batch_end", *_STARTS, "on_validation_epoch_end", "on_validation_end")


class Evaluation:
    """Shows the thresholded weights of a callback in each validation of a fit, and restores the live ones.

    Args:
        form: the callback's name, for errors.
        weights: the selected weights.
    """

    def __init__(self, form: str, weights: WeightStore) -> None:
        self.form, self.weights, self.swaps = form, weights, Swaps()

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Start a validation."""
        if (attachment := self.weights.attachment) is not None:
            attachment.restore()
            self.swaps.begin(self.weights, trainer)
            attachment.show_in_forwards(module)  # because others exchange the weights before the first batch

    def begin_batch(self) -> None:
        """Start a batch: from the first on the weights stay thresholded."""
        if (attachment := self.weights.attachment) is not None and not attachment.shown:
            attachment.end_forwards()
            self.swaps.compare()
            attachment.show()

    def end_batches(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the live weights after the last batch, because others exchange theirs back.

        Raises RuntimeError if others changed the thresholded weights, because then the live ones could not be restored.
        """
        if (attachment := self.weights.attachment) is not None:
            if names := attachment.changed_by_others():
                users = hooks_of(trainer, _WITHIN) or [f"{type(module).__name__}.validation_step"]
                raise RuntimeError(
                    f"{names[:3]} changed during validation while {self.form} evaluated the thresholded weights, so that the live "
                    f"weights would be lost. Possible causes: {', '.join(users)}. Exchange weights (or call an optimiser's eval()) in "
                    "on_validation_start or on_validation_epoch_start, and back in on_validation_epoch_end or on_validation_end; or do "
                    "both inside one hook"
                )
            attachment.restore()  # exchanged weights are restored unchanged
            attachment.show_in_forwards(module)

    def end(self) -> None:
        """End a validation."""
        if (attachment := self.weights.attachment) is not None:
            attachment.end_forwards()
            attachment.restore()


class Swaps:
    """Detects whether others exchange the weights around the validations of a fit."""

    def __init__(self) -> None:
        self.seen = False
        self._before: Snapshot | None = None

    def begin(self, weights: WeightStore, trainer: Trainer) -> None:
        """Take a snapshot at the start of a validation."""
        self._before = Snapshot(weights) if not self.seen and hooks_of(trainer, _STARTS) else None

    def compare(self) -> None:
        """Compare at the first batch, before weights are thresholded: the user's hooks have exchanged them by then."""
        self.seen |= self._before is not None and self._before.differs()
        self._before = None
