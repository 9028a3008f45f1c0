"""Count the package's files that one warm training step enters, and the changes from one file to another.

    python tests/benchmarks/walk.py

Two linear layers, the CPU, automatic optimisation. Counted are Python frames of the package's own files between the start of a
batch and its end; lambdas and generators count as frames. The last line says which import cycles the package has, imports for
type checkers and inside functions included.
"""

from __future__ import annotations

import ast
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_sparse
import lightning_sparse.callbacks
from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    PenaltyLoss,
    ReweightedPenalty,
    VariationalDropout,
)

LOG_SUM = penalties.LogSum(eps=2.0)
METHODS: dict[str, Callable[[], Callback]] = {
    "ReweightedPenalty": partial(ReweightedPenalty, LOG_SUM, 1e-3),
    "PenaltyLoss": partial(PenaltyLoss, LOG_SUM, 1e-3),
    "AdaptiveProx": partial(AdaptiveProx, LOG_SUM, 1e-3),
    "AdaptiveMask": partial(AdaptiveMask, LOG_SUM, 1e-3),
    "AdaptiveMask, Bernoulli": partial(AdaptiveMask, LOG_SUM, 1e-3, noise=noise.ScaledBernoulli()),
    "EtaTrick": partial(EtaTrick, LOG_SUM, 1e-3),
    "VariationalDropout": partial(VariationalDropout, 1e-3),
    "HardConcrete": partial(HardConcrete, 1e-3),
    "MagnitudePruning": partial(MagnitudePruning, 0.8, every=1),
}
FOLDERS = {Path(lightning_sparse.callbacks.__file__).parent: "callbacks", Path(lightning_sparse.__file__).parent: "lightning_sparse"}


class Walk(NamedTuple):
    """Frames, functions and files of one step, and changes from one file to another."""

    frames: int
    functions: int
    files: int
    switches: int


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def walk(callback: Callback, step: int = 13) -> Walk:
    """Return the walk of batch ``step`` of a fit."""
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    entered: list[tuple[str, str]] = []
    advance, count = _TrainingEpochLoop.advance, 0

    def look(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and (name := own(frame.f_code.co_filename)):
            entered.append((name, f"{name}:{frame.f_code.co_qualname}"))

    def watched(self: Any, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            sys.setprofile(look)
        try:
            advance(self, *args)
        finally:
            sys.setprofile(None)

    _TrainingEpochLoop.advance = watched  # type: ignore[method-assign]
    try:
        trainer.fit(Net(), loader)
    finally:
        _TrainingEpochLoop.advance = advance  # type: ignore[method-assign]
    files = [name for name, _ in entered]
    switches = sum(a != b for a, b in itertools.pairwise(files))
    return Walk(len(entered), len({function for _, function in entered}), len(set(files)), switches)


def own(path: str) -> str:
    """Return a file's name inside the package; an empty string for other files."""
    at = Path(path)
    found = next((folder for folder in FOLDERS if folder in at.parents), None)
    return "" if found is None else f"{FOLDERS[found]}/{at.relative_to(found).as_posix()}"


def modules() -> dict[str, Path]:
    """Return every module of the package by name."""
    found = {}
    for folder, name in FOLDERS.items():
        package = "lightning_sparse" if name == "lightning_sparse" else f"lightning_sparse.{name}"
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if path.parent == folder or (path.parent / "__init__.py").exists():
                found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """Return the package's modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return found & known


def cycles() -> list[list[str]]:
    """Return groups of modules that import each other, with sorted names."""
    paths = modules()
    needs = {name: imported(path, set(paths)) - {name} for name, path in paths.items()}
    reached = {name: set(_reached(name, needs)) for name in needs}
    groups = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in needs if name in reached[name]}
    return [list(group) for group in sorted(groups)]


def _reached(name: str, needs: dict[str, set[str]]) -> Iterator[str]:
    seen, todo = set(), [*needs[name]]
    while todo:
        if (one := todo.pop()) not in seen:
            seen.add(one)
            todo += needs[one]
            yield one


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print("| callback | frames | functions | files entered | switches between files |\n|---|---|---|---|---|")
    for name, make in METHODS.items():
        torch.manual_seed(0)
        print(f"| `{name}` | {' | '.join(map(str, walk(make())))} |")
    found = cycles()
    print(f"import cycles: {len(found)}" + "".join(f"; {len(group)} modules: {', '.join(group)}" for group in found))


if __name__ == "__main__":
    main()
