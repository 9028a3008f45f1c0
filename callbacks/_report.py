"""What a Sparsifier logs, and where."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sparse import attach, counts, masked_loss
from lightning_sparse._plain import plain
from lightning_sparse.callbacks import _logged, _wandb
from lightning_sparse.callbacks.compatibility import SparsityCallback
from lightning_sparse.curvature import Curvature
from lightning_sparse.noise import Gaussian

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form


_SMALLEST_KEEP = 1e-3  # bounds the drawn noise of forms that draw none in training


def describe(value: Any) -> Any:
    """A dataclass or a Curvature as class_path and init_args, a function by its name; numbers, strings, lists of them as Python's own."""
    value = plain(value)
    if isinstance(value, enum.Enum):
        return describe(value.value)
    if isinstance(value, (list, tuple)):
        return [describe(one) for one in value]
    if isinstance(value, Curvature):
        return {"class_path": type(value).__name__, "init_args": {name: describe(part) for name, part in value.settings().items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        arguments = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class_path": type(value).__name__, "init_args": arguments}
    if isinstance(value, FunctionType):  # whose repr is another in every process
        return f"{value.__module__}.{value.__qualname__}"
    return value if type(value) in (int, float, str, bool, type(None)) else repr(value)


@torch.no_grad()
def figures(callback: Form, pruned: bool = False) -> dict[str, float]:
    """``sparsity/...`` of what is evaluated: zeros after the threshold, in total and per parameter, and the form's state.

    ``pruned``: what is evaluated already holds its zeros.
    """
    shown = {name: callback.evaluated(name) for name in callback.parameters}
    zeros = {name: w == 0 for name, w in shown.items()} if pruned else callback.zeros_of(shown)
    weights = [w.masked_fill(zeros[name], 0.0) for name, w in shown.items()]
    return counts.figures(counts.count_zeros(callback.parameters, zeros)) | {
        "sparsity/keep_probability": counts.mean(callback.keep_probability(name) for name in callback.parameters),
        "sparsity/lam": callback.lam,
        "sparsity/penalty": callback.cost(weights),
        **({} if (asked := callback.asked) is None else {"sparsity/target": asked}),
    }


def peers_of(trainer: Trainer) -> list[Form]:
    """The run's sparsity callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, SparsityCallback)]  # type: ignore[attr-defined,misc]


def of_run(callback: Form, trainer: Trainer, final: bool = False) -> dict[str, float]:
    """A callback's share of the run's figures: each its parameters; the first, finally the last, the totals of all."""
    values, peers = figures(callback, pruned=final), peers_of(trainer)
    if len(peers) < 2:
        return values
    shown = {key: values[key] for key in (f"sparsity/{name}" for name in callback.parameters)}
    if callback is not peers[-1 if final else 0]:
        return shown
    asked = {} if (share := _asked(peers)) is None else {"sparsity/target": share}
    return shown | _joint(peers, final) | {"sparsity/lam": peers[0].lam} | asked


def total(peers: Iterable[Form], weights_only: bool = False, pruned: bool = False) -> float:
    """The share of zeros of several callbacks' parameters in a file, whose weights-only kind never holds an average."""
    of_file = {name: peer._live(name) if weights_only else peer.evaluated(name) for peer in peers for name in peer.parameters}
    zeros = {name: w == 0 if pruned else peer.zeros(name, w) for peer in peers for name, w in of_file.items() if name in peer.parameters}
    return counts.share(counts.count_zeros({name: weight for peer in peers for name, weight in peer.parameters.items()}, zeros))


def _joint(peers: list[Form], pruned: bool) -> dict[str, float]:
    """Totals over several callbacks on disjoint parameters."""
    return {
        "sparsity/total": total(peers, pruned=pruned),
        "sparsity/keep_probability": counts.mean(peer.keep_probability(name) for peer in peers for name in peer.parameters),
        "sparsity/penalty": sum(figures(peer, pruned)["sparsity/penalty"] for peer in peers),
    }


def _asked(peers: list[Form]) -> float | None:
    """The share of zeros asked for now of several callbacks' weights together; None where one has no target."""
    sizes = [sum(weight.numel() for weight in counts.distinct(peer.parameters).values()) for peer in peers]
    shares = [peer.asked for peer in peers]
    if any(share is None for share in shares) or not sum(sizes):
        return None
    return sum((share or 0.0) * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


def start(callback: Form, trainer: Trainer) -> None:
    """The recipe, or the list of several callbacks' recipes, goes into a W&B run's config."""
    recipes = [peer.recipe() for peer in peers_of(trainer)]
    _wandb.log_recipe(trainer.loggers, recipes if len(recipes) > 1 else callback.recipe())


def say_unknown_steps(callback: Form, reason: str) -> None:
    """Warn, once on rank 0, that lam cannot be given its meaning under an optimiser; nothing without a ``reason``."""
    if reason:
        rank_zero_warn(
            f"{reason}. At one lam {type(callback).__name__} may find fewer zeros than under Adam: give target_sparsity in place of lam, "
            "name a magnitude threshold such as threshold=1e-3, or use another optimiser"
        )


def epoch(callback: Form, trainer: Trainer, pl_module: LightningModule) -> None:
    """At a training epoch's end: the figures to every logger, the total to the progress bar."""
    values = of_run(callback, trainer)
    if callback.gap_samples:
        values["sparsity/duality_gap"] = duality_gap(callback, pl_module)
    _logged.log(trainer, pl_module, values, {f"sparsity/{name}" for name in callback.parameters})
    if callback._pictures.due_at_epoch_end(callback.step, callback.total):
        _log_pictures(callback, trainer)


def batch(callback: Form, trainer: Trainer, index: int) -> None:
    """After a training batch: histograms and the table in the middle of an epoch that is longer than the time between two of them."""
    left = (trainer.num_training_batches - index - 1) / trainer.accumulate_grad_batches
    if callback._pictures.due_in_epoch(callback.step, callback.total, left):
        _log_pictures(callback, trainer)


def _log_pictures(callback: Form, trainer: Trainer, final: bool = False) -> None:
    """Of all sparsity callbacks at once: by the first of them, finally by the last."""
    peers = peers_of(trainer)
    if not _wandb.wandb_loggers(trainer.loggers) or callback is not peers[-1 if final else 0]:
        return
    keep = {name: peer.keep_probability(name) for peer in peers for name in peer.parameters}
    weights = {name: peer.thresholded(name, peer.evaluated(name)) for peer in peers for name in peer.parameters}
    _wandb.log_figures(trainer.loggers, trainer.global_step, keep, weights, table=final or callback._pictures.has_table)


def duality_gap(callback: Form, module: LightningModule) -> float:
    """E_s L(s w) - L(w) - (lam / 2) sum w^2 / eta_hat(w) on the last batch trained on, in evaluation mode."""
    if callback._batch is None or callback.lam == 0 or not callback.penalty.separable:
        return 0.0
    weights = {name: callback._live(name) for name in callback.parameters}
    keep = {name: callback.keep_probability(name).clamp(min=getattr(callback, "alpha_min", _SMALLEST_KEEP)) for name in weights}
    noise, generator = Gaussian(), torch.Generator(module.device).manual_seed(callback.step)
    with attach.quiet(module):
        loss = masked_loss.loss_of_weights(module, callback._batch)
        return masked_loss.duality_gap(loss, weights, callback.penalty, callback.lam, noise, callback.gap_samples, generator, keep)


def finish(callback: Form, trainer: Trainer) -> None:
    """After training: the figures of the true zeros, once more to every logger, and into a W&B run's summary."""
    values = of_run(callback, trainer, final=True)
    _logged.log_now(trainer, values)
    _log_pictures(callback, trainer, final=True)
    _wandb.log_summary(trainer.loggers, values)
