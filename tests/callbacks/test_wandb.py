"""What a W&B run holds, read back from the file of a real offline run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse.callbacks import ReweightedPenalty, SparsityMonitor, _wandb
from lightning_sparse.conformance._wandb_file import Run, read_run
from lightning_sparse.counts import LOG_ALPHA_FLOOR
from lightning_sparse.penalties import LogSum

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # lightning with a recent torch
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),  # wandb's own
]

STEPS, EPOCHS = 2, 3


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        with torch.no_grad():  # a dead unit: its six weights get no gradient
            for dead in (self.body.weight[0], self.body.bias[:1], self.head.weight[:, 0]):
                dead.zero_()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = (self.head(self.body(batch[0])) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(autouse=True, scope="module")
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


class Fitted(NamedTuple):
    run: Run
    model: Net
    callback: ReweightedPenalty


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, _offline: None) -> Fitted:
    folder = tmp_path_factory.mktemp("run")
    logger, model = WandbLogger(project="test", save_dir=folder, offline=True), Net()
    callback = ReweightedPenalty(LogSum(0.1), lam=0.02, tol=0.1)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, logger=logger, callbacks=[callback, SparsityMonitor()], **quiet)
    trainer.fit(model, DataLoader(TensorDataset(torch.rand(4 * STEPS, 4)), 4))
    logger.experiment.finish()
    return Fitted(read_run(folder), model, callback)


def _rows(run: Run, key: str) -> list[dict[str, Any]]:
    return [row for row in run.history if key in row]


def _true_sparsity(model: Net) -> dict[str, float]:
    weights = {"body.weight": model.body.weight, "head.weight": model.head.weight}
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    shares = {f"sparsity/{name}": zeros[name] / w.numel() for name, w in weights.items()}
    return {**shares, "sparsity/total": sum(zeros.values()) / sum(w.numel() for w in weights.values())}


def test_the_config_holds_the_recipe(fitted: Fitted) -> None:
    assert fitted.run.config["sparsify"] == json.loads(json.dumps(fitted.callback.recipe()))


def test_the_summary_holds_the_sparsity_of_the_final_weights(fitted: Fitted) -> None:
    found = {name: fitted.run.summary[name] for name in _true_sparsity(fitted.model)}
    assert found == pytest.approx(_true_sparsity(fitted.model))
    assert 0 < found["sparsity/total"] < 1


def test_every_epoch_has_scalars_and_nothing_of_the_users_is_dropped(fitted: Fitted) -> None:
    assert len(_rows(fitted.run, "loss")) == STEPS * EPOCHS
    steps = [row["trainer/global_step"] for row in _rows(fitted.run, "sparsity/total")]
    assert steps == [STEPS * epoch - 1 for epoch in range(1, EPOCHS + 1)] + [STEPS * EPOCHS]
    for name in ("sparsity/keep_probability", "sparsity/lam", "sparsity/penalty"):
        assert len(_rows(fitted.run, name)) >= EPOCHS


def test_every_epoch_has_histograms_of_all_weights_on_lightnings_step(fitted: Fitted) -> None:
    for name in ("sparsity/log_alpha", "sparsity/abs_w"):
        rows = _rows(fitted.run, name)
        assert [row["trainer/global_step"] for row in rows[:EPOCHS]] == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
        for row in rows:
            assert row[name]["_type"] == "histogram"
            assert sum(row[name]["values"]) == 4 * 8 + 8 * 2


def test_weights_at_zero_have_log_alpha_at_the_floor(fitted: Fitted) -> None:
    drawn = _rows(fitted.run, "sparsity/log_alpha")[0]["sparsity/log_alpha"]
    assert (drawn["bins"][0], drawn["bins"][-1]) == (LOG_ALPHA_FLOOR, 0)
    assert drawn["values"][0] == 6  # the dead unit: alpha = 0


def test_the_layers_table_adds_up_to_the_model(fitted: Fitted) -> None:
    table = fitted.run.tables["sparsity/layers"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert table["columns"] == ["name", "shape", "weights", "non-zero", "sparsity", "mean alpha"]
    assert {name: (row["shape"], row["weights"]) for name, row in rows.items()} == {
        "body.weight": ("(8, 4)", 32),
        "head.weight": ("(2, 8)", 16),
    }
    for name, row in rows.items():
        assert row["sparsity"] == pytest.approx(1 - row["non-zero"] / row["weights"])
        logged = _rows(fitted.run, f"sparsity/{name}")[EPOCHS - 1][f"sparsity/{name}"]
        assert (row["sparsity"], 0 < row["mean alpha"] < 1) == (pytest.approx(logged), True)


def test_odd_values_and_a_prefix_are_taken(tmp_path: Path) -> None:
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True, prefix="a")
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 2.0])
    _wandb.log_recipe([logger], {"lam": 1.0})
    _wandb.log_recipe([logger], {"lam": 2.0})
    _wandb.log_figures([logger], 7, {}, {"w": odd, "empty": torch.zeros(0, 3)})
    _wandb.log_figures([logger], 8, {"w": torch.tensor([0.0, 1.0, math.nan])}, {"w": torch.zeros(3)})
    _wandb.log_summary([logger], {"sparsity/total": 0.25})
    logger.experiment.finish()
    run = read_run(tmp_path)
    first, second = _rows(run, "a-sparsity/abs_w")
    assert (run.config["sparsify"], run.summary["a-sparsity/total"]) == ({"lam": 2.0}, 0.25)
    assert (first["trainer/global_step"], sum(first["a-sparsity/abs_w"]["values"]), "a-sparsity/log_alpha" in first) == (7, 2, False)
    drawn = second["a-sparsity/log_alpha"]["values"]
    assert (drawn[0], drawn[-1], sum(drawn)) == (1, 1, 2)


def test_a_disabled_run_is_no_error(tmp_path: Path) -> None:
    logger = WandbLogger(project="test", save_dir=tmp_path, mode="disabled")
    _wandb.log_recipe([logger], {"lam": 1.0})
    _wandb.log_figures([logger], 0, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    _wandb.log_summary([logger], {"sparsity/total": 0.0})
    logger.experiment.finish()
    assert not list(tmp_path.rglob("*.wandb"))


def test_other_loggers_need_no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises
    logger = CSVLogger(tmp_path)
    _wandb.log_recipe([logger], {"lam": 1.0})
    _wandb.log_figures([logger], 0, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    _wandb.log_summary([logger], {"sparsity/total": 0.0})
    assert _wandb.wandb_loggers([logger]) == []
