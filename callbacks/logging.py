"""Log what a sparsity callback measures: figures, histograms, the tables of layers and groups, the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import counts, masked_loss
from lightning_sparse.callbacks import wandb_run
from lightning_sparse.callbacks.form import SparsityCallback, peers_of
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.layers import quiet
from lightning_sparse.methods.mask import Mask
from lightning_sparse.noise import Gaussian
from lightning_sparse.step import Strength
from lightning_sparse.support import Support

TOTAL = "sparsity/total"
GROUPS = "sparsity/groups"
MANY = 100  # with more figures than this LightningModule.log is not used, because it takes a millisecond or more for each
_SMALLEST_KEEP = 1e-3  # bounds the noise of the duality gap for methods that draw no noise in training


# -- figures ---------------------------------------------------------------------------------------------------------------


FIGURES: dict[str, Callable[[SparsityCallback, dict[str, Tensor]], float | None]] = {
    # functions of a callback and its weights with true zeros; None if the figure does not exist
    "sparsity/keep_probability": lambda callback, _: counts.mean(map(callback.support.keep_probability, callback.parameters)),
    "sparsity/lam": lambda callback, _: callback.strength.lam,
    "sparsity/penalty": lambda callback, weights: callback.support.penalty_value(weights),
    "sparsity/target": lambda callback, _: callback.asked,
}


@torch.no_grad()
def figures(callback: SparsityCallback, pruned: bool = False) -> dict[str, float]:
    """Return ``sparsity/...`` of the evaluated weights: zeros after the threshold, in total and per parameter, and the method's state.

    Args:
        callback: the sparsity callback.
        pruned: the evaluated weights already hold true zeros.
    """
    zeros, weights = _with_zeros(callback, pruned)
    found = {name: figure(callback, weights) for name, figure in FIGURES.items()}
    known = {name: value for name, value in found.items() if value is not None}
    groups = counts.group_figures(callback.support.groups_left(weights))
    return counts.figures(counts.count_zeros(callback.parameters, zeros)) | known | groups


def _with_zeros(callback: SparsityCallback, pruned: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return which of the evaluated weights are zero, and these weights with true zeros."""
    shown = {name: callback.evaluated(name) for name in callback.parameters}
    zeros = {name: w == 0 for name, w in shown.items()} if pruned else callback.support.zeros_of(shown)
    return zeros, {name: w.masked_fill(zeros[name], 0.0) for name, w in shown.items()}


def of_run(callback: SparsityCallback, trainer: Trainer, final: bool = False) -> dict[str, float]:
    """Return the figures that this callback logs: its own parameters' and, in one callback of the run, the totals."""
    values, peers = figures(callback, pruned=final), peers_of(trainer)
    if len(peers) < 2:
        return values
    own = {f"sparsity/{name}" for name in callback.parameters}
    shown = {key: value for key, value in values.items() if key in own or key.startswith(f"{GROUPS}/")}
    if callback is not peers[-1 if final else 0]:
        return shown
    share = joint_share(peers, [peer.asked for peer in peers])
    asked = {} if share is None else {"sparsity/target": share}
    return shown | _totals(peers, final) | {"sparsity/lam": peers[0].strength.lam} | asked


def total(peers: Iterable[SparsityCallback], weights_only: bool = False, pruned: bool = False) -> float:
    """Return the share of zeros of several callbacks' parameters in a file; a weights-only file never holds an average."""
    peers = list(peers)
    of_file = {name: peer.weights.live(name) if weights_only else peer.evaluated(name) for peer in peers for name in peer.parameters}
    zeros = {name: of_file[name] == 0 if pruned else peer.support.zeros(name, of_file[name]) for peer in peers for name in peer.parameters}
    return counts.share(counts.count_zeros({name: weight for peer in peers for name, weight in peer.parameters.items()}, zeros))


def _totals(peers: list[SparsityCallback], pruned: bool) -> dict[str, float]:
    """Return the totals of several callbacks on disjoint parameters."""
    shown = [(peer.support, _with_zeros(peer, pruned)[1]) for peer in peers]
    groups = counts.group_figures({name: pair for support, w in shown for name, pair in support.groups_left(w).items()})
    return {name: groups[name] for name in groups if name == GROUPS} | {
        TOTAL: total(peers, pruned=pruned),
        "sparsity/keep_probability": counts.mean(peer.support.keep_probability(name) for peer in peers for name in peer.parameters),
        "sparsity/penalty": sum(support.penalty_value(w) for support, w in shown),
    }


def joint_share(peers: list[SparsityCallback], shares: list[float | None]) -> float | None:
    """Return the share of all weights of several callbacks that ``shares`` of each one's are; None if one is None, or without weights."""
    sizes = [sum(weight.numel() for weight in counts.distinct(peer.parameters).values()) for peer in peers]
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


def start(trainer: Trainer, pictures: wandb_run.Pictures) -> None:
    """Write the recipe, or a list of several callbacks' recipes, to the W&B run's config; pictures are wanted if there is a W&B logger."""
    recipes = [peer.recipe() for peer in peers_of(trainer)]
    wandb_run.log_recipe(trainer.loggers, recipes if len(recipes) > 1 else recipes[0])
    pictures.wanted = bool(wandb_run.wandb_loggers(trainer.loggers))


def epoch(callback: SparsityCallback, trainer: Trainer, module: LightningModule, batch: tuple[Any, int] | None) -> None:
    """Log, at a training epoch's end, the figures to every logger and the total to the progress bar."""
    values = of_run(callback, trainer)
    if callback.options.gap_samples:
        values["sparsity/duality_gap"] = duality_gap(callback.support, module, batch, callback.options.gap_samples)
    log(trainer, module, values, {f"sparsity/{name}" for name in callback.parameters})
    if callback.pictures.due_at_epoch_end(callback.strength.step, callback.strength.total):
        _log_pictures(callback.pictures, trainer)


def batch(pictures: wandb_run.Pictures, strength: Strength, trainer: Trainer, index: int) -> None:
    """Log, after a training batch, histograms in the middle of a long epoch."""
    left = (trainer.num_training_batches - index - 1) / trainer.accumulate_grad_batches
    if pictures.due_in_epoch(strength.step, strength.total, left):
        _log_pictures(pictures, trainer)


def finish(callback: SparsityCallback, trainer: Trainer) -> None:
    """Log, after training, the figures of the true zeros to every logger and to the W&B run's summary."""
    values = of_run(callback, trainer, final=True)
    log_now(trainer, values)
    _log_pictures(callback.pictures, trainer, final=True)
    wandb_run.log_summary(trainer.loggers, values)


def interrupted(pictures: wandb_run.Pictures, trainer: Trainer) -> None:
    """Log, after an exception, the tables with the rows so far."""
    try:
        wandb_run.log_tables(trainer.loggers, trainer.global_step, pictures.tables)
    except Exception as error:  # because a closed run accepts nothing, and the first exception must stay visible
        rank_zero_warn(f"the table {wandb_run.LAYERS} could not be logged: {type(error).__name__}: {error}")


def _log_pictures(pictures: wandb_run.Pictures, trainer: Trainer, final: bool = False) -> None:
    """Log the histograms and table rows of all sparsity callbacks: the first one logs, at the end the last one."""
    peers = peers_of(trainer)
    if not wandb_run.wandb_loggers(trainer.loggers) or pictures is not peers[-1 if final else 0].pictures:
        return
    keep = {name: peer.support.keep_probability(name) for peer in peers for name in peer.parameters}
    weights = {name: w for peer in peers for name, w in _with_zeros(peer, pruned=False)[1].items()}
    wandb_run.log_histograms(trainer.loggers, trainer.global_step, keep, weights)
    tables = peers[0].pictures.tables
    if final or pictures.adds_rows:
        tables[wandb_run.LAYERS].add(trainer.global_step, wandb_run.layer_rows(trainer.global_step, keep, weights))
        tables[wandb_run.GROUPS].add(trainer.global_step, _group_rows(trainer.global_step, peers, weights))
    if final:
        wandb_run.log_tables(trainer.loggers, trainer.global_step, tables)


def _group_rows(step: int, peers: list[SparsityCallback], weights: dict[str, Tensor]) -> list[list[Any]]:
    """Return the rows of all callbacks' groups, given the weights with true zeros."""
    rows = []
    for support in (peer.support for peer in peers):
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
