"""SparsityMonitor on all kinds of models and runs, and with other callbacks."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty, SparsityMonitor
from lightning_sparse.penalties import LogSum
from lightning_sparse.structure import Blocks, Channels, Columns, Rows, Structure

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # lightning with a recent torch
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
]


class Net(LightningModule):
    """A network with eight of the body's sixteen weights at zero; they stay zero because their inputs are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        with torch.no_grad():
            for layer in (self.body, self.head):
                layer.weight.copy_(torch.linspace(0.5, 1.5, layer.weight.numel()).view_as(layer.weight))
            self.body.weight[:, 2:] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def step(self, batch: list[Tensor], _: int) -> Tensor:
        return (self(batch[0]) ** 2).mean()

    training_step = step

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.step(batch, index))

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test_loss", self.step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def _loader() -> DataLoader[Any]:
    inputs = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    inputs[:, 2:] = 0.0
    return DataLoader(TensorDataset(inputs), 4)


def _trainer(callbacks: list[Callback], logger: Any = False, epochs: int = 1) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return Trainer(accelerator="cpu", callbacks=callbacks, logger=logger, max_epochs=epochs, num_sanity_val_steps=0, **quiet)


def _figures(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("sparsity/")}


def _rows(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [row for row in csv.DictReader(file) if row["sparsity/body.weight"]]


PLANTED = {"sparsity/body.weight": 8 / 16, "sparsity/head.weight": 0.0, "sparsity/total": 8 / 24}


def test_fit_reports_the_zeros_of_a_plain_model(tmp_path: Path) -> None:
    trainer = _trainer([SparsityMonitor()], CSVLogger(tmp_path), epochs=2)
    trainer.fit(Net(), _loader(), _loader())
    assert _figures(trainer) == pytest.approx(PLANTED)
    assert float(trainer.progress_bar_metrics["sparsity/total"]) == pytest.approx(8 / 24)
    assert [float(row["sparsity/total"]) for row in _rows(tmp_path)] == pytest.approx([8 / 24] * 2)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_run_in_a_script_reports_too(verb: str) -> None:
    trainer = _trainer([SparsityMonitor()])
    getattr(trainer, verb)(Net(), _loader(), verbose=False)
    assert _figures(trainer) == pytest.approx(PLANTED)


def test_select_picks_what_is_reported_and_counted_in_the_total() -> None:
    trainer = _trainer([SparsityMonitor(select=["!head*"])])
    trainer.validate(Net(), _loader(), verbose=False)
    assert _figures(trainer) == {"sparsity/body.weight": 0.5, "sparsity/total": 0.5}


def test_a_tied_weight_counts_once() -> None:
    model = Net()
    model.twin = nn.Linear(4, 4)
    model.twin.weight = model.body.weight
    trainer = _trainer([SparsityMonitor()])
    trainer.validate(model, _loader(), verbose=False)
    assert _figures(trainer) == pytest.approx(PLANTED)


def test_model_pruning_beside_it_is_reported_with_its_mask_applied() -> None:
    model = Net()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(model.body, "weight"), (model.head, "weight")], amount=0.75)
    trainer = _trainer([pruning, SparsityMonitor()])
    trainer.fit(model, _loader(), _loader())
    final = {f"sparsity/{name}.weight": float((model.get_submodule(name).weight == 0).float().mean()) for name in ("body", "head")}
    assert _figures(trainer) == pytest.approx({**final, "sparsity/total": 0.75})


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_sparsifier_its_figures_stand_and_the_monitor_adds_the_rest(first: bool) -> None:
    sparsifier, monitor, seen = ReweightedPenalty(LogSum(0.1), lam=0.05, select=["body.weight"]), SparsityMonitor(), Recorder()
    model = Net()
    with torch.no_grad():
        model.head.weight[0] = 0.0
        model.body.weight[0, 0] = 1e-3  # zero by the sparsifier's threshold, but not by an exact count
    model.configure_optimizers = lambda: torch.optim.SGD(model.body.parameters(), 1e-6)  # type: ignore[method-assign]
    pair: list[Callback] = [monitor, sparsifier] if first else [sparsifier, monitor]
    trainer = _trainer([*pair, seen])
    trainer.fit(model, _loader(), _loader())
    for figures in (seen.figures, _figures(trainer)):
        assert figures["sparsity/body.weight"] == figures["sparsity/total"] == pytest.approx(9 / 16)
        assert figures["sparsity/head.weight"] == 0.5


class Recorder(Callback):
    """Record the figures logged at the end of each epoch, before those at the end of training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.figures = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("sparsity/")}


def test_every_n_epochs_still_ends_with_the_final_figures(tmp_path: Path) -> None:
    trainer = _trainer([SparsityMonitor(every_n_epochs=2)], CSVLogger(tmp_path), epochs=3)
    trainer.fit(Net(), _loader(), _loader())
    assert [int(row["step"]) for row in _rows(tmp_path)] == [3, 6]  # the last step of epoch 2 of 3, and the end


def test_a_wrong_pattern_stops_the_run_before_training() -> None:
    trainer = _trainer([SparsityMonitor(select=["bodi.weight"])])
    with pytest.raises(ValueError, match=r"body\.weight"):
        trainer.fit(Net(), _loader(), _loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_every_n_epochs_is_a_whole_number(wrong: Any) -> None:
    with pytest.raises(ValueError, match="every_n_epochs"):
        SparsityMonitor(every_n_epochs=wrong)


def test_a_string_as_selection_is_refused() -> None:
    with pytest.raises(TypeError, match="select"):
        SparsityMonitor(select="body.weight")  # type: ignore[arg-type]


def test_two_monitors_are_kept_apart_in_a_checkpoint() -> None:
    assert SparsityMonitor(select=["body.weight"]).state_key != SparsityMonitor().state_key


@dataclass(frozen=True)
class Case:
    """A structure, and the share of its groups that are planted at zero, in all and by parameter."""

    structure: Structure
    share: float
    body: float


CASES = [Case(Columns(), 2 / 8, 0.5), Case(Blocks((2, 2)), 2 / 6, 0.5), Case(Rows(), 0.0, 0.0)]


@pytest.mark.parametrize("verb", ["fit", pytest.param("validate", marks=pytest.mark.slow), pytest.param("test", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.structure))
def test_with_a_structure_the_share_of_zero_groups_is_reported_too(case: Case, verb: str) -> None:
    trainer = _trainer([SparsityMonitor(structure=case.structure)])
    getattr(trainer, verb)(Net(), _loader(), **({} if verb == "fit" else {"verbose": False}))
    groups = {"sparsity/groups": case.share, "sparsity/groups/body.weight": case.body, "sparsity/groups/head.weight": 0.0}
    assert _figures(trainer) == pytest.approx({**PLANTED, **groups})


@pytest.mark.slow  # the tracer's import
def test_groups_of_channels_are_reported_of_any_model() -> None:
    model = Net()
    with torch.no_grad():
        for w in (model.body.weight[:3], model.body.bias[:3], model.head.weight[:, :3]):
            w.zero_()
    trainer = _trainer([SparsityMonitor(structure=Channels())])
    with pytest.raises(ValueError, match="set its example_input_array"):
        trainer.validate(model, _loader(), verbose=False)
    model.example_input_array = torch.rand(2, 4)
    trainer.validate(model, _loader(), verbose=False)
    (axis,) = (name for name in _figures(trainer) if name.startswith("sparsity/groups/"))
    assert _figures(trainer)["sparsity/groups"] == _figures(trainer)[axis] == 0.75


def test_groups_of_weights_below_a_sparsifiers_threshold_are_zero() -> None:
    sparsifier, model = ReweightedPenalty(LogSum(0.1), lam=0.05, threshold=0.01, select=["body.weight"]), Net()
    with torch.no_grad():
        model.body.weight[0].fill_(1e-3)
        model.body.weight[1:].fill_(1.0)
    model.configure_optimizers = lambda: torch.optim.SGD(model.body.parameters(), 1e-9)  # type: ignore[method-assign]
    seen = Recorder()
    _trainer([sparsifier, SparsityMonitor(structure=Rows()), seen]).fit(model, _loader())
    groups = {name: value for name, value in seen.figures.items() if name.startswith("sparsity/groups")}
    assert groups == pytest.approx({"sparsity/groups": 1 / 6, "sparsity/groups/body.weight": 1 / 4, "sparsity/groups/head.weight": 0.0})


def test_a_sparsifiers_own_groups_stand() -> None:
    sparsifier, seen = MagnitudePruning(0.5, every=1, structure=Rows(), select=["body.weight"]), Recorder()
    _trainer([sparsifier, SparsityMonitor(structure=Columns()), seen]).fit(Net(), _loader())
    ((live, count),) = sparsifier.groups_left().values()
    groups = {name: value for name, value in seen.figures.items() if name.startswith("sparsity/groups")}
    assert count == 4
    assert groups == pytest.approx(dict.fromkeys(["sparsity/groups", "sparsity/groups/body.weight"], 1 - live / count))


@pytest.mark.parametrize("wrong", ["rows", Rows])
def test_a_wrong_structure_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="structure must be a Structure"):
        SparsityMonitor(structure=wrong)
