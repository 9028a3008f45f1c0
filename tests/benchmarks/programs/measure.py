"""Runs in every program, and their measured figures."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn

from lightning_sparse import callbacks, penalties, select

SEED = 0
TARGET, LAM = 0.8, 1e-3
PENALTY = penalties.LogSum(eps=2.0)


@dataclass
class Trained:
    """Result of a program: final module, content of its file, module loaded from it, and both errors."""

    module: nn.Module
    file: Mapping[str, Tensor]
    loaded: nn.Module
    error: float
    error_loaded: float


@dataclass(frozen=True)
class Program:
    """A program: ``train(callbacks, folder)`` trains through it; ``guess`` is the error of the best constant prediction."""

    name: str
    distribution: str  # what is installed
    package: str  # which of Lightning's two packages it imports
    measure: str  # what the error is
    guess: float
    train: Callable[[list[Callback], Path], Trained]
    restores: bool = False  # its best epoch at the end of fit
    select: tuple[str, ...] | None = None  # handed to every callback


BY_PENALTY = (callbacks.ReweightedPenalty, callbacks.PenaltyLoss, callbacks.AdaptiveProx, callbacks.AdaptiveMask, callbacks.EtaTrick)
BY_LAM = tuple(form for form in BY_PENALTY if form is not callbacks.PenaltyLoss)  # which has ReweightedPenalty's numbers


def forms(program: Program) -> dict[str, Callable[[], list[Callback]]]:
    """By "callback, setting": fresh callbacks. Every form with a target, and with a strength where it has one.

    In a program that restores its best epoch, a target goes with BestAfterTarget, once also without.
    """
    found = _forms(list(program.select) if program.select else None)
    if program.restores:
        pruning = found["MagnitudePruning, target"]
        beside = {name: lambda make=make: [*make(), callbacks.BestAfterTarget()] for name, make in found.items() if name.endswith("target")}
        found |= beside | {"MagnitudePruning, target alone": pruning}
    return found


def _forms(select: list[str] | None) -> dict[str, Callable[[], list[Callback]]]:
    target = {"target_sparsity": TARGET, "select": select}
    found: dict[str, Callable[[], list[Callback]]] = {"dense": list}
    found |= {f"{form.__name__}, target": lambda form=form: [form(PENALTY, **target)] for form in BY_PENALTY}
    found["VariationalDropout, target"] = lambda: [callbacks.VariationalDropout(**target)]  # type: ignore[arg-type]
    found["HardConcrete, target"] = lambda: [callbacks.HardConcrete(**target)]  # type: ignore[arg-type]
    found["MagnitudePruning, target"] = lambda: [callbacks.MagnitudePruning(TARGET, every=10, select=select)]
    found["SparsityMonitor, alone"] = lambda: [callbacks.SparsityMonitor(select)]
    found |= {f"{form.__name__}, lam": lambda form=form: [form(PENALTY, lam=LAM, select=select)] for form in BY_LAM}
    found["VariationalDropout, default"] = lambda: [callbacks.VariationalDropout(select=select)]
    found["HardConcrete, lam"] = lambda: [callbacks.HardConcrete(LAM, select=select)]
    return found


class Witness(Callback):
    """Record the last logged figures and the selected weights outside the callback, because programs copy and pickle callbacks."""

    logged: dict[str, float] = {}
    selected: list[str] = []
    steps = 0

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            Witness.logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("sparsity/")}
            Witness.selected = [name for one in trainer.callbacks for name in getattr(one, "parameters", {})]
            Witness.steps = int(trainer.global_step)


def run(program: Program, form: str) -> dict[str, Any]:
    """Run ``form`` in ``program`` and return a row."""
    Witness.logged, Witness.selected, Witness.steps = {}, [], 0
    seed_everything(SEED, verbose=False)
    row: dict[str, Any] = {"program": program.name, "form": form, "package": program.package}
    row |= {"measure": program.measure, "guess": program.guess, "restores": program.restores, "select": program.select}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said, _quiet():
        warnings.simplefilter("always")
        before = os.getcwd()
        os.chdir(folder)  # some write beside themselves
        try:
            trained = program.train([*forms(program)[form](), Witness()], Path(folder))
            row |= {"outcome": "runs"} | _figures(trained, list(program.select) if program.select else None)
        except Exception as error:
            ours = [line for line in traceback.format_exc().splitlines() if "lightning_sparse" in line or "/callbacks/" in line]
            row |= {"outcome": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "raised_by_us": bool(ours)}
        finally:
            os.chdir(before)
    names = tuple(callbacks.__all__)
    heard = (" ".join(str(one.message).split()) for one in said if issubclass(one.category, UserWarning))
    row["said"] = sorted({text[:400] for text in heard if any(name in text for name in names) or "sparsity" in text})
    return row | {"seconds": round(time.perf_counter() - started, 1), "steps": Witness.steps}


def _figures(trained: Trained, chosen: list[str] | None) -> dict[str, Any]:
    module = dict(trained.module.named_parameters(remove_duplicate=False))
    names = Witness.selected or list(select.countable(trained.module, chosen))
    loaded = dict(trained.loaded.named_parameters(remove_duplicate=False))
    return {
        "logged": Witness.logged.get("sparsity/total"),
        "module": _zeros(module, names),
        "file": _zeros(trained.file, names),
        "loaded": _zeros(loaded, names),
        "file_differs": [name for name, w in module.items() if not torch.equal(w.detach().cpu(), trained.file[name].cpu())][:5],
        "loaded_differs": [name for name, w in module.items() if not torch.equal(w.detach().cpu(), loaded[name].detach().cpu())][:5],
        "share_of_all": sum(module[name].numel() for name in names) / sum(w.numel() for w in trained.module.parameters()),
        "error": trained.error,
        "error_loaded": trained.error_loaded,
    }


def _zeros(weights: Mapping[str, Tensor], names: list[str]) -> float:
    return sum(int((weights[name] == 0).sum()) for name in names) / sum(weights[name].numel() for name in names)


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence the program's output."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
