"""What a W&B run gets beyond scalars: the recipe, histograms, the per-layer table, the summary.

W&B is imported only where a WandbLogger is among the trainer's loggers. Everything goes through ``log_metrics`` with
Lightning's ``trainer/global_step``, never with W&B's own step, which would drop what comes late.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_sparse import counts
from lightning_sparse.callbacks.compatibility import is_a

COLUMNS: list[str | int] = ["name", "shape", "weights", "non-zero", "sparsity", "mean alpha"]


def wandb_loggers(loggers: Iterable[Logger]) -> list[Any]:
    """The WandbLoggers among ``loggers``, of ``lightning`` and of ``pytorch_lightning``, found without importing W&B."""
    return [logger for logger in loggers if is_a(logger, "WandbLogger")]


@rank_zero_only
def log_recipe(loggers: Iterable[Logger], recipe: Mapping[str, Any] | list[dict[str, Any]]) -> None:
    """Write ``recipe`` (JSON-able; a list for several callbacks) to the run's config under the key ``sparsify``, replacing it."""
    for logger in wandb_loggers(loggers):
        written = recipe if isinstance(recipe, list) else dict(recipe)
        logger.experiment.config.update({"sparsify": written}, allow_val_change=True)


def log_figures(
    loggers: Iterable[Logger], step: int, keep: Mapping[str, Tensor], weights: Mapping[str, Tensor], table: bool = True
) -> None:
    """Log ``sparsity/log_alpha`` and ``sparsity/abs_w`` (histograms) and ``sparsity/layers`` (a table) at ``step``, from rank 0.

    Call it on every rank: weights that are split over processes are counted together.

    Args:
        loggers: the trainer's loggers; nothing is computed unless a WandbLogger is among them.
        step: Lightning's step (``trainer.global_step``), logged as ``trainer/global_step``.
        keep: alpha by parameter name; may be empty. log alpha below counts.LOG_ALPHA_FLOOR is put at the floor.
        weights: the weights as they are evaluated and saved, by parameter name; tied ones are counted once.
        table: also the table. W&B keeps a file for each, while histograms are lines of the run's one history.
    """
    found = wandb_loggers(loggers)
    if not found:
        return
    shown = counts.distinct(weights)
    alpha, sizes = counts.log_alpha_histogram(keep.values()), counts.magnitude_histogram(shown.values())
    rows = [[*layer._replace(shape=str(layer.shape))] for layer in counts.layers(shown, keep)] if table else []  # type: ignore[arg-type]
    for logger in found:
        _log(logger, step, {"sparsity/log_alpha": alpha, "sparsity/abs_w": sizes}, rows)


@rank_zero_only
def _log(logger: Any, step: int, histograms: Mapping[str, counts.Histogram], rows: list[list[Any]]) -> None:
    import wandb

    pairs: dict[str, Any] = {name: tuple(histogram) for name, histogram in histograms.items() if any(histogram.counts)}
    drawn: dict[str, Any] = {name: wandb.Histogram(np_histogram=pair) for name, pair in pairs.items()}
    if rows:
        drawn["sparsity/layers"] = wandb.Table(columns=COLUMNS, data=rows)
    logger.log_metrics(drawn, step=step)


@rank_zero_only
def log_summary(loggers: Iterable[Logger], figures: Mapping[str, float]) -> None:
    """Write the final ``figures`` to the run's summary, under the names they are logged by (the logger's prefix included)."""
    for logger in wandb_loggers(loggers):
        prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
        logger.experiment.summary.update({prefix + name: value for name, value in figures.items()})
