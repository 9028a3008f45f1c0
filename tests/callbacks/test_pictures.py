"""How many histograms and tables a W&B run gets, whatever the Trainer knows of its length."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import WandbLogger
from toys import Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty, _wandb
from lightning_sparse.callbacks._pictures import Pictures
from lightning_sparse.conformance._wandb_file import read_run

LOG_SUM = penalties.LogSum(eps=2.0)


def logged(epochs: int, steps: int, total: float) -> tuple[list[int], int]:
    """The steps at which a run of so many epochs logs, and how many of them come with the table."""
    pictures, at, tables, step = Pictures(), [], 0, 0
    for _ in range(epochs):
        for left in reversed(range(steps)):
            step += 1
            if pictures.due_in_epoch(step, total, left) or (left == 0 and pictures.due_at_epoch_end(step, total)):
                at.append(step)
                tables += pictures.has_table
    return at, tables


@pytest.mark.parametrize("steps", [1, 8, 100])
@pytest.mark.parametrize("epochs", [60, 200, 1000, 10_000])
@pytest.mark.parametrize("known", [1, 50, math.inf], ids=["to its end", "stopped at a fiftieth", "length unknown"])
def test_about_fifty_a_run_whatever_its_length(epochs, steps, known):
    if epochs * steps > 100_000:
        epochs = 100_000 // steps
    at, tables = logged(epochs, steps, epochs * steps * known)
    assert 25 <= len(at) <= 90
    assert tables <= 7


@pytest.mark.parametrize(("steps", "least"), [(200, 8), (1000, 25), (10_000, 50)])
@pytest.mark.parametrize("known", [1, math.inf])
def test_one_huge_epoch_has_some_in_its_middle(steps, least, known):
    at, _ = logged(1, steps, steps * known)
    assert least <= len(at) <= 90
    assert at[0] == 20


def test_short_epochs_have_theirs_at_their_ends_and_long_gaps_stay_a_small_part_of_a_known_run():
    at, _ = logged(200, 8, 1600)
    assert all(step % 8 == 0 for step in at)
    assert at[:10] == [8 * epoch for epoch in range(1, 11)]
    assert max(after - before for before, after in itertools.pairwise(at)) <= 1600 / 30 + 8
    assert {step % 469 for step in logged(20, 469, 20 * 469)[0][-15:]} == {0}


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


class Kept(WandbLogger):
    """Keeps what it is given, and starts no run."""

    name = version = save_dir = None
    experiment = SimpleNamespace(config=Config(), summary={})

    def __init__(self) -> None:
        self._prefix, self.rows = "", []

    def log_hyperparams(self, params):
        pass

    finalize = after_save_checkpoint = log_hyperparams

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, set(metrics)))

    def at(self, name: str) -> list[int]:
        return [step for step, names in self.rows if name in names]


RUNS = {
    "max_epochs": {"epochs": 60},
    "max_steps": {"epochs": -1, "max_steps": 240},
    "far max_epochs, max_steps": {"epochs": 10_000, "max_steps": 240},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_a_runs_histograms_and_tables_are_few_and_the_last_ones_are_of_its_end(options):
    logger = Kept()
    run = trainer(ReweightedPenalty(LOG_SUM, 0.01), logger=logger, **options)
    run.fit(Toy(), data())
    histograms, tables = logger.at("sparsity/abs_w"), logger.at("sparsity/layers")
    assert 25 <= len(histograms) <= 60
    assert len(tables) <= 7
    assert histograms[-1] == tables[-1] == run.global_step == 240


def test_a_run_that_is_stopped_early_has_its_share_and_its_end():
    logger = Kept()
    stop = EarlyStopping("val/loss", patience=30, min_delta=10.0)
    run = trainer(ReweightedPenalty(LOG_SUM, 0.01), stop, logger=logger, epochs=10_000)
    run.fit(Toy(), data(), data())
    assert run.current_epoch < 40
    assert 18 <= len(logger.at("sparsity/abs_w")) <= 40
    assert logger.at("sparsity/layers")[-1] == run.global_step


@pytest.mark.parametrize("validate", [{}, {"val_check_interval": 50}])
def test_one_long_epoch_has_some_before_its_end(validate):
    logger = Kept()
    run = trainer(ReweightedPenalty(LOG_SUM, 0.01), logger=logger, epochs=-1, max_steps=150, **validate)
    run.fit(Toy(), data(16 * 200), data())
    assert len(logger.at("sparsity/abs_w")) >= 5
    assert logger.at("sparsity/abs_w")[-1] == 150


def test_several_callbacks_share_one_table():
    logger, rows = Kept(), []
    own = [ReweightedPenalty(LOG_SUM, 0.01, select=["network.0.*"]), MagnitudePruning(0.5, every=1, select=["network.2.*"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_wandb, "_log", lambda logger, step, histograms, table: rows.append([row[0] for row in table]))
        trainer(*own, logger=logger, epochs=2).fit(Toy(), data())
    assert rows == [["network.0.weight", "network.2.weight"]] * 3


@pytest.mark.slow  # wandb's own start and end
def test_an_offline_run_holds_one_line_of_tables_in_few_files(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    module = Toy()
    trainer(MagnitudePruning(0.5, every=4), logger=logger, epochs=60).fit(module, data())
    logger.experiment.finish()
    run = read_run(tmp_path)
    files = list(tmp_path.rglob("*.table.json"))
    assert len([row for row in run.history if "sparsity/layers" in row]) == len(files) <= 7
    assert 25 <= len([row for row in run.history if "sparsity/abs_w" in row]) <= 60
    last = {row[0]: row[3] for row in run.tables["sparsity/layers"]["data"]}
    assert last == {name: int((p != 0).sum()) for name, p in module.named_parameters() if p.dim() > 1}
