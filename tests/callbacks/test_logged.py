"""Figures of many tensors pass LightningModule.log by, and arrive where the others do."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from toys import Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import ReweightedPenalty, SparsityMonitor, _logged

MAKERS = {"a form": lambda: ReweightedPenalty(penalties.LogSum(2.0), lam=0.3, gap_samples=2), "the monitor": SparsityMonitor}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def fitted(make, many: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *others: Callback):
    """Everything that is known of ``sparsity/...`` after a fit of three epochs: each logged column, and what monitors see."""
    monkeypatch.setattr(_logged, "MANY", many)
    run = trainer(make(), *others, epochs=3, logger=CSVLogger(folder), enable_checkpointing=bool(others))
    run.fit(Toy(decay=True), data())
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("sparsity/")]
    columns = {name: [(round(float(row[name]), 5), row["step"], row["epoch"]) for row in rows if row[name]] for name in names}
    return columns, {name: float(value) for name, value in run.callback_metrics.items() if name in columns}


@every_maker
def test_the_figures_are_the_same_by_either_way(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = fitted(make, 100, tmp_path / "usual", monkeypatch)
    straight = fitted(make, 1, tmp_path / "straight", monkeypatch)
    layers = [name for name in usual[0] if name.endswith("weight")]
    assert len(layers) == 2
    assert all(len(usual[0][name]) >= 3 for name in layers)
    assert straight[0].keys() == usual[0].keys()
    assert straight[0] == usual[0]
    assert [epoch for *_, epoch in straight[0][layers[0]][:3]] == ["0", "1", "2"]
    assert straight[1] == pytest.approx(usual[1])


@pytest.mark.parametrize("many", [100, 1], ids=["few", "many"])
def test_only_what_every_layer_has_passes_log_by(many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: set[str] = set()
    usual = Toy.log_dict
    monkeypatch.setattr(Toy, "log_dict", lambda self, figures, **how: [logged.update(figures), usual(self, figures, **how)][1])
    columns, _ = fitted(MAKERS["a form"], many, tmp_path, monkeypatch)
    layers = {name for name in columns if name.endswith("weight")}
    assert logged & columns.keys() == columns.keys() - {_logged.TOTAL} - (layers if many == 1 else set())


@every_maker
def test_a_figure_that_passed_log_by_can_be_monitored(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = ModelCheckpoint(tmp_path / "files", monitor="sparsity/network.0.weight", mode="max", save_on_train_epoch_end=True)
    columns, _ = fitted(make, 1, tmp_path, monkeypatch, keeper)
    assert float(keeper.best_model_score) == pytest.approx(max(value for value, *_ in columns["sparsity/network.0.weight"][:3]), abs=1e-5)
