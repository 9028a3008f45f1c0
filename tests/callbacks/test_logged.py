"""Figures of many tensors bypass LightningModule.log and reach all loggers and monitors."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from toys import Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import ReweightedPenalty, SparsityMonitor

MAKERS = {"a form": lambda: ReweightedPenalty(penalties.LogSum(2.0), lam=0.3, gap_samples=2), "the monitor": SparsityMonitor}
LAYERS = {"few layers": 3, "many layers": 120}  # figures of more than about a hundred layers bypass ``log``
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_size = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


class Deep(nn.Module):
    """A residual network of that many layers, one of them unused."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers - 2)), nn.Linear(8, 3)
        self.unused = nn.Linear(8, 8)
        with torch.no_grad():
            self.unused.weight[:4] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return self.head(x)


class Zeros(Callback):
    """Record the share of zeros of each layer at the end of each epoch, as the last callback."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, module: Toy) -> None:
        shown = {} if isinstance(trainer.callbacks[0], SparsityMonitor) else trainer.callbacks[0].all_zeros()
        named = module.named_parameters()
        self.seen.append({f"sparsity/{n}": float(shown.get(n, p == 0).float().mean()) for n, p in named if p.dim() > 1})


def fitted(make, layers: int, folder: Path, *others: Callback):
    """Fit three epochs; return logged columns ``sparsity/...``, the figures that monitors see, and each layer's share of zeros."""
    zeros = Zeros()
    run = trainer(make(), zeros, *others, epochs=3, logger=CSVLogger(folder), enable_checkpointing=bool(others))
    module = Toy(Deep(layers), lambda parameters: torch.optim.Adam(parameters, 0.03), decay=True)
    run.fit(module, data())
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("sparsity/")]
    columns = {name: [(float(row[name]), row["step"], row["epoch"]) for row in rows if row[name]] for name in names}
    return columns, {name: float(value) for name, value in run.callback_metrics.items() if name in columns}, zeros.seen, module


@every_size
@every_maker
def test_each_layers_figures_are_those_of_its_weights_on_lightnings_steps(make, layers: int, tmp_path: Path) -> None:
    columns, monitored, zeros, module = fitted(make, layers, tmp_path)
    for name in zeros[0]:
        assert [value for value, *_ in columns[name][:3]] == pytest.approx([share[name] for share in zeros], abs=1e-5)
        assert [where for _, *where in columns[name][:3]] == [["3", "0"], ["7", "1"], ["11", "2"]]
        assert monitored[name] == pytest.approx(float((module.get_parameter(name.removeprefix("sparsity/")) == 0).float().mean()))
    assert len(zeros[0]) == layers
    assert zeros[-1]["sparsity/network.unused.weight"] >= 0.5
    assert [where for _, *where in columns["sparsity/total"][:3]] == [["3", "0"], ["7", "1"], ["11", "2"]]


@every_size
def test_only_figures_of_all_layers_bypass_log(layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: set[str] = set()
    usual = Toy.log_dict
    monkeypatch.setattr(Toy, "log_dict", lambda self, figures, **how: [logged.update(figures), usual(self, figures, **how)][1])
    columns, _, zeros, _ = fitted(MAKERS["a form"], layers, tmp_path)
    assert logged & columns.keys() == columns.keys() - {"sparsity/total"} - (zeros[0].keys() if layers > 100 else set())


@every_maker
def test_a_figure_that_bypassed_log_can_be_monitored(make, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "files", monitor="sparsity/network.head.weight", mode="max", save_on_train_epoch_end=True)
    columns, *_ = fitted(make, LAYERS["many layers"], tmp_path, keeper)
    assert float(keeper.best_model_score) == pytest.approx(
        max(value for value, *_ in columns["sparsity/network.head.weight"][:3]), abs=1e-5
    )
