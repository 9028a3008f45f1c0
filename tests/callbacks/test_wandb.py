"""Content of a W&B run, read from the file of a real offline run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import trainer

from lightning_sparse.callbacks import AdaptiveMask, ReweightedPenalty, SparsityMonitor
from lightning_sparse.conformance._wandb_file import Run, read_run
from lightning_sparse.counts import LOG_ALPHA_FLOOR
from lightning_sparse.penalties import LogSum

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # lightning with a recent torch
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
]

STEPS, EPOCHS = 2, 3


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        with torch.no_grad():  # a dead unit; its six weights get no gradient
            for dead in (self.body.weight[0], self.body.bias[:1], self.head.weight[:, 0]):
                dead.zero_()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = (self.head(self.body(batch[0])) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(callbacks: list[Any], logger: Any, model: Net, epochs: int = 1) -> None:
    run = trainer(*callbacks, epochs=epochs, logger=logger)
    run.fit(model, DataLoader(TensorDataset(torch.rand(4 * STEPS, 4)), 4))


class Fitted(NamedTuple):
    run: Run
    model: Net
    callback: ReweightedPenalty


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, wandb_offline: None) -> Fitted:
    folder = tmp_path_factory.mktemp("run")
    logger, model = WandbLogger(project="test", save_dir=folder, offline=True), Net()
    callback = ReweightedPenalty(LogSum(0.1), lam=0.02, tol=0.1)
    fit([callback, SparsityMonitor()], logger, model, epochs=EPOCHS)
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


def test_the_layers_table_adds_up_to_the_model_at_each_of_its_steps(fitted: Fitted) -> None:
    table = fitted.run.tables["sparsity/layers"]
    assert table["columns"] == ["step", "name", "shape", "weights", "non-zero", "sparsity", "mean alpha"]
    assert [row[0] for row in table["data"]] == [2, 2, 4, 4, 6, 6]
    rows = {row[1]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert {name: (row["shape"], row["weights"]) for name, row in rows.items()} == {
        "body.weight": ("(8, 4)", 32),
        "head.weight": ("(2, 8)", 16),
    }
    for name, row in rows.items():
        assert row["sparsity"] == pytest.approx(1 - row["non-zero"] / row["weights"])
        logged = _rows(fitted.run, f"sparsity/{name}")[EPOCHS - 1][f"sparsity/{name}"]
        assert (row["sparsity"], 0 < row["mean alpha"] < 1) == (pytest.approx(logged), True)


def test_a_prefix_is_kept_and_a_second_fit_renews_the_recipe_and_the_summary(tmp_path: Path, wandb_offline: None) -> None:
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True, prefix="a")
    for lam in (1.0, 2.0):
        fit([ReweightedPenalty(LogSum(0.1), lam=lam, tol=0.1)], logger, model := Net())
    logger.experiment.finish()
    run = read_run(tmp_path)
    assert run.config["sparsify"]["init_args"]["lam"]["init_args"]["lam"] == 2.0
    assert run.summary["a-sparsity/total"] == pytest.approx(_true_sparsity(model)["sparsity/total"])
    assert _rows(run, "a-sparsity/abs_w")
    assert _rows(run, "a-sparsity/log_alpha")


def forms() -> list[Any]:
    return [AdaptiveMask(LogSum(0.1), lam=0.02, select=["body.weight"]), ReweightedPenalty(LogSum(0.1), lam=0.02, select=["head.weight"])]


def test_a_disabled_run_raises_nothing(tmp_path: Path) -> None:
    logger = WandbLogger(project="test", save_dir=tmp_path, mode="disabled")
    fit([*forms(), SparsityMonitor()], logger, Net())
    logger.experiment.finish()
    assert not list(tmp_path.rglob("*.wandb"))


def test_other_loggers_need_no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes its import raise
    fit([*forms(), SparsityMonitor()], CSVLogger(tmp_path), Net())
    assert "sparsity/total" in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
