"""One line at the end of fit says how many weights are zero, where the checkpoint is, and what to do next."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from toys import Toy, data, trainer

import lightning_sparse
from lightning_sparse import penalties, structure
from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning, ReweightedPenalty, Sparsify

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
LOG_SUM = penalties.LogSum(eps=2.0)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "selected weights are zero" in record.getMessage()]


def test_the_line_has_the_share_of_the_module_and_the_checkpoint(tmp_path, caplog):
    module = Toy()
    keeper = ModelCheckpoint(dirpath=tmp_path)
    with caplog.at_level(logging.INFO):
        trainer(ReweightedPenalty(LOG_SUM, 0.5), keeper, epochs=3, enable_checkpointing=True).fit(module, data())
    (line,) = lines(caplog)
    weights = [w for w in module.parameters() if w.dim() == 2]
    size = sum(w.numel() for w in weights)
    assert f"ReweightedPenalty: {sum(int((w == 0).sum()) for w in weights) / size:.2%} of {size} selected weights" in line
    assert f"checkpoint {keeper.best_model_path};" in line
    assert line.endswith("; next: lightning_sparse.export.save_compact(module, path) writes a file without the zeros")  # no configuration


def test_several_callbacks_have_one_line_and_a_run_with_a_configuration_names_the_command(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("model: {class_path: my.Toy}")
    keeper = ModelCheckpoint(dirpath=tmp_path)
    first, second = [name for name, w in Toy().named_parameters() if w.dim() == 2][:2]
    both = (ReweightedPenalty(LOG_SUM, 0.5, select=[first]), AdaptiveProx(LOG_SUM, 0.5, select=[second]))
    with caplog.at_level(logging.INFO):
        trainer(*both, keeper, epochs=1, enable_checkpointing=True).fit(Toy(), data())
    (line,) = lines(caplog)
    assert "ReweightedPenalty and AdaptiveProx" in line
    assert line.endswith(f"; next: lightning-sparse report {keeper.best_model_path}")


SCRIPTS = {  # configuration above the checkpoint's folder, words of the command line, and whether the line names the script
    "a class that the script fixes": ("model: {width: 16}", ["train.py", "fit", "--config", "own.yaml"], True),
    "no configuration": ("", ["train.py"], True),
    "no configuration, and arguments": ("", ["train.py", "--lr", "3"], False),
    "a configuration of another class": ("model: {class_path: my.Other}", ["train.py"], False),
    "a notebook": ("", ["site-packages/kernel.py"], False),
    "typed code": ("model: {width: 16}", ["-c"], False),
}


@pytest.mark.parametrize(("config", "words", "named"), SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_is_named_where_it_gives_the_module(config, words, named, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    monkeypatch.setattr("sys.argv", words)
    Path("site-packages").mkdir()
    for name in ("train.py", "site-packages/kernel.py"):
        Path(name).write_text("")
    if config:
        Path("config.yaml").write_text(config)
    keeper = ModelCheckpoint(dirpath="checkpoints")
    with caplog.at_level(logging.INFO):
        trainer(MagnitudePruning(0.5), keeper, epochs=3, enable_checkpointing=True).fit(Toy(), data())
    expected = f"lightning-sparse report {keeper.best_model_path} --script train.py" if named else COMPACT
    assert lines(caplog)[-1].endswith(f"; next: {expected}")


def test_a_module_that_was_started_by_its_name_is_no_script(tmp_path, caplog, monkeypatch):
    main = types.ModuleType("__main__")
    main.__spec__ = importlib.machinery.ModuleSpec("train", None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    (tmp_path / "train.py").write_text("")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py")])
    with caplog.at_level(logging.INFO):
        trainer(MagnitudePruning(0.5), ModelCheckpoint(dirpath=tmp_path), epochs=3, enable_checkpointing=True).fit(Toy(), data())
    assert lines(caplog)[-1].endswith(f"; next: {COMPACT}")


SHRINK = "lightning_sparse.shrink(module, x, verbose=True) measures what removing zero rows gains"
COMPACT = "lightning_sparse.export.save_compact(module, path) writes a file without the zeros"
NEXT = {  # callbacks, and the use that their zeros have
    "no zeros": (ReweightedPenalty(LOG_SUM, 1e-9), ""),
    "too few for a smaller file": (MagnitudePruning(0.002), ""),
    "single zeros": (MagnitudePruning(0.5, structure=structure.NM(2, 4)), COMPACT),
    "whole rows": (MagnitudePruning(0.6, structure=structure.Rows()), SHRINK),
    "fewer rows than shrink removes": (MagnitudePruning(0.1, structure=structure.Rows()), COMPACT),
    "columns": (MagnitudePruning(0.6, structure=structure.Columns()), SHRINK),
}


@pytest.mark.filterwarnings("ignore:.* prunings? ")
@pytest.mark.parametrize("case", NEXT)
def test_the_line_names_what_makes_use_of_the_zeros_that_are_there(case, caplog):
    callback, use = NEXT[case]
    network = Toy(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)))
    with caplog.at_level(logging.INFO):
        trainer(callback, epochs=2).fit(network, data())
    (line,) = lines(caplog)
    assert line.partition("; next: ")[2] == use


def test_shrink_is_named_for_zero_channels_of_a_convolution(caplog):
    network = Toy(nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 16, 2, bias=False), nn.Flatten(), nn.Linear(48, 3)))
    with caplog.at_level(logging.INFO):
        trainer(MagnitudePruning(0.7, structure=structure.Rows(), select=["network.1.weight"]), epochs=2).fit(network, data())
    (line,) = lines(caplog)
    assert line.endswith(f"; next: {SHRINK}")
    assert lightning_sparse.shrink(network.cpu(), torch.randn(4, 8)).network[1].out_channels == 8  # it is as the line says


class Words(nn.Sequential):
    """Look up a word for the sign of each input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x > 0).long())


def test_zero_rows_of_an_embedding_are_no_neurons_to_remove(caplog):
    network = Toy(Words(nn.Embedding(32, 4), nn.Flatten(), nn.Linear(32, 3)))
    with caplog.at_level(logging.INFO):
        trainer(MagnitudePruning(0.9, structure=structure.Rows(), select=["network.0.weight"]), epochs=2).fit(network, data())
    assert int((network.network[0].weight == 0).all(1).sum()) > 20
    (line,) = lines(caplog)
    assert line.endswith(f"; next: {COMPACT}")


class Steps(nn.LSTM):
    """Take each input as a sequence of four steps, and return the last output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x.view(-1, 4, 2))[0][:, -1]


def test_zero_rows_of_a_recurrent_layer_are_not_offered_to_shrink(caplog):
    network = Toy(nn.Sequential(Steps(2, 16, batch_first=True), nn.Linear(16, 3)))
    with caplog.at_level(logging.INFO):
        trainer(MagnitudePruning(0.7, structure=structure.Rows(), select=["network.0.weight_hh_l0"]), epochs=2).fit(network, data())
    assert int((network.network[0].weight_hh_l0 == 0).all(1).sum()) > 40
    (line,) = lines(caplog)
    assert line.endswith(f"; next: {COMPACT}")


@pytest.mark.parametrize(("epochs", "says"), [(2, True), (16, False)])
def test_a_target_that_is_met_in_a_few_steps_says_so(epochs, says, caplog):
    with caplog.at_level(logging.INFO):
        trainer(Sparsify(0.5), epochs=epochs).fit(Toy(), data())
    assert ("steps are few" in caplog.text) == says


def test_a_fast_dev_run_has_no_line(caplog):
    with caplog.at_level(logging.INFO):
        trainer(ReweightedPenalty(LOG_SUM, 0.5), fast_dev_run=True).fit(Toy(), data())
    assert lines(caplog) == []


class Worsening(Toy):
    """A toy whose validation score gets worse in every epoch."""

    def validation_step(self, batch, index):
        self.log("score", float(self.current_epoch))


@pytest.mark.filterwarnings("ignore:.*before Sparsify reaches its target", "ignore:ModelCheckpoint.*compares all epochs")
def test_a_best_file_with_fewer_zeros_is_not_paired_with_the_zeros_of_the_network(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("model: {class_path: my.Toy}")  # the command would report on the file
    module, keeper = Worsening(), ModelCheckpoint(tmp_path, monitor="score")
    callbacks = Sparsify(0.8, finish="prune"), EarlyStopping("score", patience=1)
    with caplog.at_level(logging.INFO):
        trainer(*callbacks, keeper, epochs=20, enable_checkpointing=True).fit(module, data(), data())
    state = torch.load(keeper.best_model_path, weights_only=True)["state_dict"]
    matrices = [w for w in state.values() if w.dim() > 1]
    share = sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)
    line = lines(caplog)[-1]  # the one before says that training ended early
    assert f"; the best checkpoint {keeper.best_model_path} was saved before that and holds {share:.2%}; trainer.save_checkpoint" in line
    assert "add BestAfterTarget()" in line
    assert "lightning-sparse report" not in line
