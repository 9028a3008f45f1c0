"""Log to a W&B run what is more than scalars: the recipe, histograms, the tables of layers and groups, the summary.

W&B is imported only if a WandbLogger is among the trainer's loggers. Everything is logged by ``log_metrics`` with Lightning's
``trainer/global_step``, not with W&B's own step, because W&B drops values that come late.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_sparse import counts
from lightning_sparse.callbacks.compatibility import is_a

LAYERS, GROUPS = "sparsity/layers", "sparsity/groups_left"  # the tables
COLUMNS: dict[str, list[str | int]] = {
    LAYERS: ["step", "name", "shape", "weights", "non-zero", "sparsity", "mean alpha"],
    GROUPS: ["step", "name", "parameters", "groups", "non-zero", "sparsity"],
}
GROWTH = 0.1  # share of the steps so far between two histograms, because it does not depend on the run's length
PARTS = 30  # but at most the run's length divided by this
SHORTEST = 20  # smallest number of optimiser steps between two in the middle of an epoch
MOST_ROWS = 10_000  # of a table, because W&B truncates longer tables


class Rows:
    """Collects the rows of a table, by step."""

    def __init__(self) -> None:
        self._rows: dict[int, list[list[Any]]] = {}

    def add(self, step: int, rows: list[list[Any]]) -> None:
        """Add the rows at ``step``, replacing earlier ones at that step; drop the oldest steps beyond MOST_ROWS rows."""
        self._rows[step] = rows
        while len(self._rows) > 1 and sum(map(len, self._rows.values())) > MOST_ROWS:
            del self._rows[next(iter(self._rows))]

    def take(self) -> list[list[Any]]:
        """Return all rows and delete them, so that they are logged once."""
        rows, self._rows = [row for of_step in self._rows.values() for row in of_step], {}
        return rows


class Pictures:
    """Schedules the histograms and table rows, by the callback's own steps.

    At the end of an epoch histograms are due when a tenth of the steps so far, or a thirtieth of the run, has passed since the last
    ones; in the middle of an epoch only if the epoch is long enough for others before its end. That makes 25 to 90 in runs of 60 to
    10,000 epochs. The tables get rows with the 1st, 2nd, 4th, 8th, ... histograms and are logged once, when the run ends.
    """

    def __init__(self) -> None:
        self.wanted = False  # there is a W&B logger
        self.count = 0
        self.tables = {name: Rows() for name in COLUMNS}
        self._last, self._start = 0, 0  # steps of the last histograms and of the epoch's start

    @property
    def adds_rows(self) -> bool:
        """Return True if the tables get rows with the last histograms that were due."""
        return self.count & (self.count - 1) == 0

    def due_at_epoch_end(self, step: int, total: float) -> bool:
        """Return True if histograms are due; they then count as logged."""
        self._start = step
        return self._is_due(step, step - self._last, max(self._wait(total), 1))

    def due_in_epoch(self, step: int, total: float, left: float) -> bool:
        """Return True if histograms are due ``left`` steps before the epoch's end; they then count as logged."""
        wait = max(self._wait(total), SHORTEST)
        return left >= wait and self._is_due(step, step - max(self._last, self._start), wait)

    def _wait(self, total: float) -> float:
        return min(self._last * GROWTH, total / PARTS)

    def _is_due(self, step: int, since: int, wait: float) -> bool:
        if since < wait:
            return False
        self._last, self.count = step, self.count + 1
        return True


def wandb_loggers(loggers: Iterable[Logger]) -> list[Any]:
    """Return the WandbLoggers among ``loggers``, of ``lightning`` and of ``pytorch_lightning``, without importing W&B."""
    return [logger for logger in loggers if is_a(logger, "WandbLogger")]


@rank_zero_only
def log_recipe(loggers: Iterable[Logger], recipe: Mapping[str, Any] | list[dict[str, Any]]) -> None:
    """Write ``recipe`` (JSON-able; a list for several callbacks) to the run's config under the key ``sparsify``, replacing it."""
    for logger in wandb_loggers(loggers):
        written = recipe if isinstance(recipe, list) else dict(recipe)
        logger.experiment.config.update({"sparsify": written}, allow_val_change=True)


def log_histograms(loggers: Iterable[Logger], step: int, keep: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Log ``sparsity/log_alpha`` and ``sparsity/abs_w`` at ``step``, from rank 0. They are rows of the run's history, not files.

    Call it on every rank, because weights that are split over processes are counted together.

    Args:
        loggers: the trainer's loggers; nothing is computed unless a WandbLogger is among them.
        step: Lightning's step (``trainer.global_step``), logged as ``trainer/global_step``.
        keep: alpha by parameter name; may be empty. log alpha is clamped to at least counts.LOG_ALPHA_FLOOR.
        weights: the weights as they are evaluated and saved, by parameter name; tied ones are counted once.
    """
    found = wandb_loggers(loggers)
    if not found:
        return
    alpha = counts.log_alpha_histogram(keep.values())
    sizes = counts.magnitude_histogram(counts.distinct(weights).values())
    for logger in found:
        _log_histograms(logger, step, {"sparsity/log_alpha": alpha, "sparsity/abs_w": sizes})


@rank_zero_only
def _log_histograms(logger: Any, step: int, histograms: Mapping[str, counts.Histogram]) -> None:
    import wandb

    pairs: dict[str, Any] = {name: tuple(histogram) for name, histogram in histograms.items() if any(histogram.counts)}
    logger.log_metrics({name: wandb.Histogram(np_histogram=pair) for name, pair in pairs.items()}, step=step)


def layer_rows(step: int, keep: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[list[Any]]:
    """Return the rows of ``sparsity/layers`` at ``step``, one for each distinct weight. Call it on every rank."""
    layers = counts.layers(counts.distinct(weights), keep)
    return [[step, name, str(shape), *figures] for name, shape, *figures in layers]


def group_rows(step: int, left: Mapping[str, tuple[int, int]], members: Mapping[str, list[str]]) -> list[list[Any]]:
    """Return the rows of ``sparsity/groups_left`` at ``step``, one for each set of groups.

    Args:
        step: Lightning's step.
        left: (groups that are not zero, groups) by the name of the set.
        members: the parameters with weights in these groups, by the name of the set.
    """
    return [[step, name, ", ".join(members[name]), count, live, 1 - live / count] for name, (live, count) in left.items()]


def log_groups(loggers: Iterable[Logger], step: int, left: Mapping[str, tuple[int, int]], members: Mapping[str, list[str]]) -> None:
    """Log the table ``sparsity/groups_left`` with one time, ``step``; see :func:`group_rows`. Call it once a run."""
    rows = Rows()
    rows.add(step, group_rows(step, left, members))
    log_tables(loggers, step, {GROUPS: rows})


@rank_zero_only
def log_tables(loggers: Iterable[Logger], step: int, tables: Mapping[str, Rows]) -> None:
    """Log the tables that have rows. Call it once a run, because W&B writes a file for each at each call, in every ``log_mode``."""
    taken = {name: rows.take() for name, rows in tables.items()}
    for logger in wandb_loggers(loggers) if any(taken.values()) else ():
        import wandb

        made = {name: wandb.Table(columns=COLUMNS[name], data=rows) for name, rows in taken.items() if rows}
        logger.log_metrics(made, step=step)


@rank_zero_only
def log_summary(loggers: Iterable[Logger], figures: Mapping[str, float]) -> None:
    """Write the final ``figures`` to the run's summary, under the names they are logged by (the logger's prefix included)."""
    for logger in wandb_loggers(loggers):
        prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
        logger.experiment.summary.update({prefix + name: value for name, value in figures.items()})
