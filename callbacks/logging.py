"""Log what a sparsity callback measures: figures, histograms, the tables of layers and groups, the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from lightning_sparse import counts, masked_loss
from lightning_sparse.callbacks import wandb_run
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.layers import quiet
from lightning_sparse.methods.mask import Mask
from lightning_sparse.noise import Gaussian
from lightning_sparse.support import Support

TOTAL = "sparsity/total"
GROUPS = "sparsity/groups"
MANY = 100  # with more figures than this LightningModule.log is not used, because it takes a millisecond or more for each
_SMALLEST_KEEP = 1e-3  # bounds the noise of the duality gap for methods that draw no noise in training


# -- figures ---------------------------------------------------------------------------------------------------------------


FIGURES: dict[str, Callable[[Support, dict[str, Tensor]], float | None]] = {
    # functions of a callback's support and its evaluated weights by name, with true zeros; None if the figure does not exist
    "sparsity/keep_probability": lambda support, _: counts.mean(map(support.keep_probability, support.weights.parameters)),
    "sparsity/lam": lambda support, _: support.strength.lam,
    "sparsity/penalty": lambda support, weights: support.penalty_value(weights),
    "sparsity/target": lambda support, _: support.asked,
}

_COMBINED = frozenset(FIGURES)  # those that several callbacks log together, in _totals or by the strength of the first


class Measured:
    """Measures the evaluated weights of one callback.

    Args:
        support: decides what is zero; its weights and strength.
        evaluated: returns the values of a parameter that are evaluated and saved, before the threshold.
        pictures: when histograms and table rows are due.
    """

    def __init__(self, support: Support, evaluated: Callable[[str], Tensor], pictures: wandb_run.Pictures) -> None:
        self.support, self.evaluated, self.pictures = support, evaluated, pictures

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Return the selected parameters, by name."""
        return self.support.weights.parameters

    @torch.no_grad()
    def figures(self, pruned: bool = False) -> dict[str, float]:
        """Return ``sparsity/...``: zeros after the threshold, in total and per parameter, and the method's state.

        Args:
            pruned: the evaluated weights already hold true zeros.
        """
        zeros, weights = self.with_zeros(pruned)
        found = {name: figure(self.support, weights) for name, figure in FIGURES.items()}
        known = {name: value for name, value in found.items() if value is not None}
        groups = counts.group_figures(self.support.groups_left(weights))
        return counts.figures(counts.count_zeros(self.parameters, zeros)) | known | groups

    def with_zeros(self, pruned: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return which of the evaluated weights are zero, and these weights with true zeros."""
        shown = {name: self.evaluated(name) for name in self.parameters}
        zeros = {name: w == 0 for name, w in shown.items()} if pruned else self.support.zeros_of(shown)
        return zeros, {name: w.masked_fill(zeros[name], 0.0) for name, w in shown.items()}

    def zeros_in_file(self, weights_only: bool, pruned: bool) -> dict[str, Tensor]:
        """Return which weights are zero in a file; a weights-only file never holds an average."""
        of_file = {name: self.support.weights.live(name) if weights_only else self.evaluated(name) for name in self.parameters}
        return {name: w == 0 if pruned else self.support.zeros(name, w) for name, w in of_file.items()}


def of_run(measured: Measured, run: Sequence[Measured], final: bool = False) -> dict[str, float]:
    """Return the figures that one of the run's callbacks logs: its own parameters' and, in one callback of the run, the totals."""
    values = measured.figures(pruned=final)
    if len(run) < 2:
        return values
    own = {f"sparsity/{name}" for name in measured.parameters}
    shown = {key: value for key, value in values.items() if key in own or key.startswith(f"{GROUPS}/")}
    place = 1 + [*map(id, run)].index(id(measured))
    shown |= {f"{key}/{place}": values[key] for key in FIGURES if key in values and key not in _COMBINED}
    if measured is not run[-1 if final else 0]:
        return shown
    share = joint_share(run, [one.support.asked for one in run])
    asked = {} if share is None else {"sparsity/target": share}
    return shown | _totals(run, final) | {"sparsity/lam": run[0].support.strength.lam} | asked


def total(run: Sequence[Measured], weights_only: bool = False, pruned: bool = False) -> float:
    """Return the share of zeros of several callbacks' parameters in a file; a weights-only file never holds an average."""
    zeros = {name: where for one in run for name, where in one.zeros_in_file(weights_only, pruned).items()}
    return counts.share(counts.count_zeros({name: weight for one in run for name, weight in one.parameters.items()}, zeros))


def _totals(run: Sequence[Measured], pruned: bool) -> dict[str, float]:
    """Return the totals of several callbacks on disjoint parameters."""
    shown = [(one.support, one.with_zeros(pruned)[1]) for one in run]
    groups = counts.group_figures({name: pair for support, w in shown for name, pair in support.groups_left(w).items()})
    return {name: groups[name] for name in groups if name == GROUPS} | {
        TOTAL: total(run, pruned=pruned),
        "sparsity/keep_probability": counts.mean(one.support.keep_probability(name) for one in run for name in one.parameters),
        "sparsity/penalty": sum(support.penalty_value(w) for support, w in shown),
    }


def joint_share(run: Sequence[Measured], shares: list[float | None]) -> float | None:
    """Return the mean of the callbacks' ``shares``, weighted by their numbers of weights; None if one is None, or without weights."""
    sizes = [sum(weight.numel() for weight in counts.distinct(one.parameters).values()) for one in run]
    if None in shares or not sum(sizes):
        return None
    return sum((share or 0.0) * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


def duality_gap(support: Support, module: LightningModule, batch: tuple[Any, int] | None, samples: int) -> float:
    """Return E_s L(s w) - L(w) - (lam / 2) sum w^2 / eta_hat(w) on ``batch``, in evaluation mode."""
    method, lam, penalty = support.method, support.strength.lam, support.method.penalty
    if batch is None or lam == 0 or not penalty.separable:
        return 0.0
    weights = support.weights.all_live()
    if isinstance(method, Mask):
        keep = {name: method.noise_keep_probability(name, w) for name, w in weights.items()}
    else:
        keep = {name: support.keep_probability(name).clamp(min=_SMALLEST_KEEP) for name in weights}
    generator = torch.Generator(module.device).manual_seed(support.strength.step)
    with quiet(module):
        loss = masked_loss.loss_of_weights(module, batch)
        return masked_loss.duality_gap(loss, weights, penalty, lam, Gaussian(), samples, generator, keep)


# -- when ------------------------------------------------------------------------------------------------------------------


def start(trainer: Trainer, pictures: wandb_run.Pictures, recipes: list[dict[str, Any]]) -> None:
    """Write the recipe, or a list of several callbacks' recipes, to the W&B run's config; pictures are wanted if there is a W&B logger."""
    wandb_run.log_recipe(trainer.loggers, recipes if len(recipes) > 1 else recipes[0])
    pictures.wanted = bool(wandb_run.wandb_loggers(trainer.loggers))


def epoch(measured: Measured, run: Sequence[Measured], trainer: Trainer, module: LightningModule, gap: float | None) -> None:
    """Log, at a training epoch's end, the figures and the duality gap to every logger and the total to the progress bar."""
    values = of_run(measured, run) | ({} if gap is None else {"sparsity/duality_gap": gap})
    log(trainer, module, values, {f"sparsity/{name}" for name in measured.parameters})
    strength = measured.support.strength
    if measured.pictures.due_at_epoch_end(strength.step, strength.total):
        _log_pictures(measured, run, trainer)


def batch(measured: Measured, run: Sequence[Measured], trainer: Trainer, index: int) -> None:
    """Log, after a training batch, histograms in the middle of a long epoch."""
    left = (trainer.num_training_batches - index - 1) / trainer.accumulate_grad_batches
    strength = measured.support.strength
    if measured.pictures.due_in_epoch(strength.step, strength.total, left):
        _log_pictures(measured, run, trainer)


def finish(measured: Measured, run: Sequence[Measured], trainer: Trainer) -> None:
    """Log, after training, the figures of the true zeros to every logger and to the W&B run's summary."""
    values = of_run(measured, run, final=True)
    log_now(trainer, values)
    _log_pictures(measured, run, trainer, final=True)
    wandb_run.log_summary(trainer.loggers, values)


def interrupted(pictures: wandb_run.Pictures, trainer: Trainer) -> None:
    """Log, after an exception, the tables with the rows so far."""
    try:
        wandb_run.log_tables(trainer.loggers, trainer.global_step, pictures.tables)
    except Exception as error:  # because a closed run accepts nothing, and the first exception must stay visible
        rank_zero_warn(f"the table {wandb_run.LAYERS} could not be logged: {type(error).__name__}: {error}")


def _log_pictures(measured: Measured, run: Sequence[Measured], trainer: Trainer, final: bool = False) -> None:
    """Log the histograms and table rows of all sparsity callbacks: the first one logs, at the end the last one."""
    if not wandb_run.wandb_loggers(trainer.loggers) or measured is not run[-1 if final else 0]:
        return
    keep = {name: one.support.keep_probability(name) for one in run for name in one.parameters}
    weights = {name: w for one in run for name, w in one.with_zeros(pruned=final)[1].items()}
    wandb_run.log_histograms(trainer.loggers, trainer.global_step, keep, weights)
    pictures = run[0].pictures
    if final or measured.pictures.adds_rows:
        pictures.tables[wandb_run.LAYERS].add(trainer.global_step, wandb_run.layer_rows(trainer.global_step, keep, weights))
        pictures.tables[wandb_run.GROUPS].add(trainer.global_step, _group_rows(trainer.global_step, run, weights))
    if final:
        wandb_run.log_tables(trainer.loggers, trainer.global_step, pictures.tables)


def _group_rows(step: int, run: Sequence[Measured], weights: dict[str, Tensor]) -> list[list[Any]]:
    """Return the rows of all callbacks' groups, given the weights with true zeros."""
    rows = []
    for support in (one.support for one in run):
        left = support.groups_left(weights)
        rows += wandb_run.group_rows(step, left, {leader: support.group_members(leader) for leader in left})
    return rows


# -- where -----------------------------------------------------------------------------------------------------------------


def log(trainer: Trainer, module: LightningModule, values: Mapping[str, float], layers: set[str], **how: Any) -> None:
    """Log ``values`` to every logger and monitor, and TOTAL to the progress bar; ``how`` are arguments of ``module.log``.

    ``layers`` names the figures of single parameters, which are equal on all ranks; if there are more than MANY, they are written
    directly to the loggers and into ``trainer.callback_metrics``.
    """
    how |= {"sync_dist": trainer.world_size > 1}
    direct = layers & values.keys() if len(layers) > MANY else set()
    rest = {name: value for name, value in values.items() if name not in direct and name != TOTAL}
    module.log_dict(rest, **how)
    if TOTAL in values:
        module.log(TOTAL, values[TOTAL], prog_bar=True, **how)
    if direct:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1  # the step and epoch that Lightning logs at an epoch's end
        log_now(trainer, {name: value for name, value in values.items() if name in direct}, step, {"epoch": trainer.current_epoch})


def log_now(trainer: Trainer, values: Mapping[str, float], step: int | None = None, beside: Mapping[str, float] | None = None) -> None:
    """Log ``values`` without LightningModule.log, which some hooks forbid; ``beside`` goes to the loggers only."""
    for logger in trainer.loggers:
        logger.log_metrics({**(beside or {}), **values}, step=trainer.global_step if step is None else step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
