"""What is said, once on rank 0, when a run starts: what the selection passes over, and weights that will never learn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import Parameter

from lightning_sparse import counts, coverage
from lightning_sparse.callbacks import _joining, _report
from lightning_sparse.callbacks.compatibility import is_a
from lightning_sparse.select import owners

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form
    from lightning_sparse.callbacks.sparsity_monitor import SparsityMonitor


def say_coverage(callback: Form, trainer: Trainer, module: LightningModule) -> None:
    """Say what a sparsity callback's selection passes over, and what share of the module it is where that is little."""
    who, patterns = f"{type(callback).__name__} selects", callback.select
    found = coverage.measure(module, callback.parameters, patterns, _beside(callback, trainer, module))
    _say_passed(found, who, patterns, module)
    if coverage.is_general(patterns):
        _warn(coverage.says_of_tied(found, who, patterns))
        if not any(is_a(one, "BaseFinetuning") for one in trainer.callbacks):  # type: ignore[attr-defined] # which unfreezes more
            _warn(coverage.says_of_frozen(found, who))


def say_counted(monitor: SparsityMonitor, module: LightningModule, names: Iterable[str]) -> None:
    """Say what a monitor's selection passes over."""
    counted = dict(counts.weight_in_use(module, name) for name in names)
    _say_passed(coverage.measure(module, counted, monitor.select), f"{type(monitor).__name__} counts", monitor.select, module)


def say_never_learning(callback: Form, names: Iterable[str]) -> None:
    """Warn of parameters all of whose weights are zero and held there."""
    held = counts.count_zeros({name: callback.held[name] for name in names if name in callback.held})
    dead = [name for name, (zeros, size) in held.items() if zeros == size > 0]
    if dead:
        why = "keep_zeros=True keeps" if callback.keep_zeros else f"{type(callback).__name__} prunes them before the first step and keeps"
        more = f" and {len(dead) - coverage.LISTED} more" if len(dead) > coverage.LISTED else ""
        spared = [*(callback.select or []), *("!" + name for name in dead[: coverage.LISTED])]
        rank_zero_warn(
            f"all weights of {', '.join(map(repr, dead[: coverage.LISTED]))}{more} are zero at the start, and {why} them there: they never "
            f"learn. Where they are meant to (a zero-initialised head, LoRA's B), leave them out with select={spared} or start them from "
            "other values"
        )


def _beside(callback: Form, trainer: Trainer, module: LightningModule) -> list[Parameter]:
    """The parameters of the run's other sparsity callbacks."""
    others = [peer for peer in _report.peers_of(trainer) if peer is not callback]
    return [p for peer in others for p in (peer.parameters or _joining.choose(peer, trainer, module)).values()]


def _say_passed(found: coverage.Coverage, who: str, patterns: list[str] | None, module: LightningModule) -> None:
    text = coverage.says_of_passed(found, who, patterns, [name for name, *_ in owners(module)])
    if found.is_partial:
        _warn(text)
    elif text:
        rank_zero_info(text)


def _warn(text: str) -> None:
    if text:
        rank_zero_warn(text)
