"""Which optimiser steps count: one for each of Lightning's, however often an optimiser steps or evaluates within it."""

from __future__ import annotations

from typing import Any


class Clock:
    """Follows one batch: which optimisers had their gradients prepared, what they evaluated, whether the batch's step has counted.

    Lightning counts one optimiser step a batch in automatic optimisation (none while it accumulates), also where a module's
    ``optimizer_step`` leaves it out or takes several.
    """

    def __init__(self) -> None:
        self.begin_batch(0)

    def begin_batch(self, steps: int) -> None:
        """Lightning has counted ``steps`` optimiser steps before this batch."""
        self.counted = False  # this batch's step
        self._steps = steps
        self._prepared: set[int] = set()  # optimisers whose gradients were prepared and that have not stepped since
        self._evaluations: dict[int, int] = {}  # of the loss, by optimisers within their step

    def enter(self, optimizer: Any) -> None:
        """An optimiser's step begins."""
        self._evaluations[id(optimizer)] = 0

    def prepare(self, optimizer: Any) -> int:
        """An optimiser's gradients are about to be changed; how often its loss was evaluated in this step."""
        self._prepared.add(id(optimizer))
        if id(optimizer) not in self._evaluations:  # under a GradScaler the loss is evaluated before the step begins
            return 1
        self._evaluations[id(optimizer)] += 1
        return self._evaluations[id(optimizer)]

    def is_prepared(self, optimizer: Any) -> bool:
        """Whether an optimiser's gradients were prepared since it last stepped, in this batch."""
        return id(optimizer) in self._prepared

    def leave(self, optimizer: Any, stepped: bool = True) -> None:
        """An optimiser's step has ended; ``stepped`` is False where it was skipped."""
        self._evaluations.pop(id(optimizer), None)
        if stepped:
            self._prepared.discard(id(optimizer))

    def is_behind(self, steps: int) -> bool:
        """At a batch's end: Lightning counts a step that the optimiser was never asked for; not one that a GradScaler skipped."""
        return steps > self._steps and not self.counted and not self._prepared

    def steps_since(self, steps: int, batches: int, total: float, epochs: float, most: int) -> int:
        """Under manual optimisation, at the end of batch number ``batches``: by how many of ``total`` the run has come nearer to its end.

        The run ends after ``epochs`` batches or ``most`` optimiser steps (-1: any number), whichever comes first.
        """
        return _reached(steps, batches, total, epochs, most) - _reached(self._steps, batches - 1, total, epochs, most)


def _reached(steps: int, batches: int, total: float, epochs: float, most: int) -> int:
    """Of ``total``, the share that has passed."""
    if total == float("inf"):
        return batches
    by_batches = 0 if epochs == float("inf") else batches * int(total) // int(epochs)
    return max(by_batches, 0 if most == -1 else steps * int(total) // most)
