"""When a run's histograms and its table of layers are logged: some 50 times, however long it is, and once at its end."""

from __future__ import annotations

GROWTH = 0.1  # from one to the next, a tenth of the steps so far: early stopping and an unknown length change nothing
PARTS = 30  # but no more than this share of a run whose length is known
SHORTEST = 20  # optimiser steps between two in the middle of an epoch


class Pictures:
    """Counts what was logged, by the callback's own steps.

    At the end of an epoch one is due when a tenth of the steps so far, or a thirtieth of the run, has passed since the last;
    in the middle of an epoch only where that epoch is long enough for one more before its end. That makes 25 to 90 in runs
    of 60 to 10,000 epochs. The table, of which W&B keeps a file each time, is logged with the 1st, 2nd, 4th, 8th, ... of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last, self._start = 0, 0  # steps: of the last one, and where the epoch began

    @property
    def has_table(self) -> bool:
        """The last one that was due comes with the table."""
        return self.count & (self.count - 1) == 0

    def due_at_epoch_end(self, step: int, total: float) -> bool:
        """Whether one is due; it then counts as logged."""
        self._start = step
        return self._is_due(step, step - self._last, max(self._wait(total), 1))

    def due_in_epoch(self, step: int, total: float, left: float) -> bool:
        """The same, ``left`` steps before the epoch's end."""
        wait = max(self._wait(total), SHORTEST)
        return left >= wait and self._is_due(step, step - max(self._last, self._start), wait)

    def _wait(self, total: float) -> float:
        return min(self._last * GROWTH, total / PARTS)

    def _is_due(self, step: int, since: int, wait: float) -> bool:
        if since < wait:
            return False
        self._last, self.count = step, self.count + 1
        return True
