"""Number of histograms and tables in a W&B run, for known and unknown run lengths."""

from __future__ import annotations

import itertools
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import WandbLogger
from torch import nn
from toys import Repeated, Toy, data, several, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty, SparsityMonitor
from lightning_sparse.conformance._wandb_file import read_run
from lightning_sparse.structure import Columns, Element, Rows

LOG_SUM = penalties.LogSum(eps=2.0)


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


class Kept(WandbLogger):
    """A logger that records what it gets and starts no run."""

    name = version = save_dir = None
    experiment = SimpleNamespace(config=Config(), summary={})

    def __init__(self) -> None:
        self._prefix, self.rows, self.tables, self.groups = "", [], [], []

    def log_hyperparams(self, params):
        pass

    finalize = after_save_checkpoint = log_hyperparams

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, set(metrics)))
        self.tables += [metrics["sparsity/layers"].data] if "sparsity/layers" in metrics else []
        self.groups += [metrics["sparsity/groups_left"].data] if "sparsity/groups_left" in metrics else []

    def at(self, name: str) -> list[int]:
        return [step for step, names in self.rows if name in names]


RUNS = {"max_epochs": {"epochs": 60}, "far max_epochs, max_steps": {"epochs": 10_000, "max_steps": 240}}


@pytest.mark.parametrize("options", several(RUNS, "far max_epochs, max_steps"))
def test_a_runs_histograms_and_tables_are_few_and_the_last_ones_are_of_its_end(options):
    logger = Kept()
    run = trainer(ReweightedPenalty(LOG_SUM, 0.01), logger=logger, **options)
    run.fit(Toy(), data())
    histograms, tables = logger.at("sparsity/abs_w"), logger.at("sparsity/layers")
    assert 25 <= len(histograms) <= 60
    assert tables == [240]
    assert histograms[-1] == run.global_step == 240
    assert histograms[:10] == [4 * epoch for epoch in range(1, 11)]
    assert {step % 4 for step in histograms} == {0}
    if "max_steps" not in options:
        assert max(after - before for before, after in itertools.pairwise(histograms)) <= 240 / 30 + 4


class Stop(Callback):
    """Stop a run early whose length the Trainer does not know or overestimates."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 500


LENGTHS = {
    "500 epochs of a step": ({"epochs": 500}, 1),
    "the same, of far more": ({"epochs": 100_000}, 1),
    "5 epochs of 100 steps": ({"epochs": 5}, 100),
    "an epoch of unknown length": ({"epochs": -1}, 1000),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "steps"), LENGTHS.values(), ids=LENGTHS.keys())
def test_about_fifty_histograms_for_any_run_length(options, steps):
    logger, batch = Kept(), next(iter(data()))
    trainer(ReweightedPenalty(LOG_SUM, 0.01), Stop(), logger=logger, **options).fit(Toy(), Repeated(batch, steps))
    at, (table,) = logger.at("sparsity/abs_w"), logger.tables
    assert (14 if steps > 1 else 25) <= len(at) <= 90
    assert len({row[0] for row in table}) <= 8
    assert at[-1] == 500
    assert at[0] == (1 if steps == 1 else 20)


class Many(Toy):
    """A toy with 3,400 additional weights that no step uses."""

    def __init__(self):
        super().__init__()
        self.unused = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3400))


@pytest.mark.slow
def test_a_table_that_would_be_cut_off_by_wandb_drops_its_oldest_steps():
    logger, module = Kept(), Many()
    trainer(ReweightedPenalty(LOG_SUM, 0.01), logger=logger, epochs=3).fit(module, Repeated(next(iter(data()))))
    (table,) = logger.tables
    assert [row[0] for row in table] == [2] * 3402 + [3] * 3402


def test_a_run_that_is_stopped_early_has_its_share_and_its_end():
    logger = Kept()
    stop = EarlyStopping("val/loss", patience=30, min_delta=10.0)
    run = trainer(ReweightedPenalty(LOG_SUM, 0.01), stop, logger=logger, epochs=10_000)
    run.fit(Toy(), data(), data())
    assert run.current_epoch < 40
    assert 18 <= len(logger.at("sparsity/abs_w")) <= 40
    assert logger.at("sparsity/layers") == [run.global_step]


@pytest.mark.parametrize("validate", [{}, {"val_check_interval": 50}])
def test_one_long_epoch_has_some_before_its_end(validate):
    logger = Kept()
    run = trainer(ReweightedPenalty(LOG_SUM, 0.01), logger=logger, epochs=-1, max_steps=150, **validate)
    run.fit(Toy(), data(16 * 200), data())
    assert len(logger.at("sparsity/abs_w")) >= 5
    assert logger.at("sparsity/abs_w")[-1] == 150


def two():
    return [ReweightedPenalty(LOG_SUM, 0.01, select=["network.0.*"]), MagnitudePruning(0.5, every=1, select=["network.2.*"])]


def test_several_callbacks_share_one_table():
    logger = Kept()
    trainer(*two(), logger=logger, epochs=3).fit(Toy(), data())
    (table,) = logger.tables
    assert [row[:2] for row in table] == [[step, f"network.{layer}.weight"] for step in (4, 8, 12) for layer in (0, 2)]


class Left(Callback):
    """Record how many groups are left at the end of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch:
            self.on_fit_end(trainer, module)

    def on_fit_end(self, trainer, module):
        self.seen += [[trainer.global_step, name, *pair] for name, pair in trainer.callbacks[0].groups_left().items()]


def test_groups_that_are_left_are_one_table_of_each_set_in_all_epochs():
    logger, left = Kept(), Left()
    pruning = MagnitudePruning(0.5, every=1, structure=Rows(), select=["network.0.*"])
    run = trainer(pruning, ReweightedPenalty(LOG_SUM, 0.01, select=["network.2.*"]), left, logger=logger, epochs=2)
    run.fit(Toy(), data())
    (table,) = logger.groups
    assert [[step, name, live, count] for step, name, _, count, live, _ in table] == left.seen
    assert [row[:2] for row in table] == [[4, "network.0.weight"], [8, "network.0.weight"]]
    assert table[-1][3:] == [16, live := left.seen[-1][2], pytest.approx(1 - live / 16)]
    assert 0 < live < 16
    figures = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("sparsity/groups")}
    assert figures == pytest.approx(dict.fromkeys(["sparsity/groups", "sparsity/groups/network.0.weight"], table[-1][5]))
    assert logger.at("sparsity/groups_left") == logger.at("sparsity/layers") == [8]


def test_a_monitor_of_a_plain_model_writes_the_table_of_its_groups_once():
    logger, module = Kept(), Toy()
    with torch.no_grad():
        module.network[0].weight[:, :3] = 0.0
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    trainer(SparsityMonitor(structure=Columns()), logger=logger, epochs=2).fit(module, data())
    (table,) = logger.groups
    columns = {name: list(w.any(0)) for name, w in module.named_parameters() if w.dim() > 1}
    assert [row[:2] + row[3:5] for row in table] == [[8, name, len(left), sum(left)] for name, left in columns.items()]
    assert table[0][4] == table[0][3] - 3
    assert logger.at("sparsity/groups_left") == [8]


def test_single_weights_have_no_table_of_groups():
    logger = Kept()
    trainer(*two(), logger=logger, epochs=1).fit(Toy(), data())
    assert (len(logger.tables), logger.groups) == (1, [])


class Stops(Toy):
    """A toy that raises ``error`` in the third epoch."""

    error: BaseException = RuntimeError("no more")

    def training_step(self, batch, index):
        if self.current_epoch == 2:
            raise self.error
        return super().training_step(batch, index)


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_interrupted_run_logs_the_table_so_far(error, request):
    handler = signal.getsignal(signal.SIGINT)  # because Lightning replaces it on an interrupt
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    logger, module = Kept(), Stops()
    module.error = error
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(*two(), logger=logger, epochs=4).fit(module, data())
    (table,) = logger.tables
    assert [row[0] for row in table] == [4, 4, 8, 8]


def test_a_run_that_can_log_no_more_keeps_its_error():
    class Closed(Kept):
        def log_metrics(self, metrics, step=None):
            if "sparsity/layers" in metrics:
                raise ValueError("the run is finished")

    said = "sparsity/layers could not be logged: ValueError: the run is finished"
    with pytest.warns(UserWarning, match=said), pytest.raises(RuntimeError, match="no more"):
        trainer(*two(), logger=Closed(), epochs=4).fit(Stops(), data())


def test_each_fit_logs_its_own_table():
    logger = Kept()
    run = trainer(ReweightedPenalty(LOG_SUM, 0.01), logger=logger, epochs=2)
    run.fit(Toy(), data())
    run.fit_loop.max_epochs = 3
    run.fit(run.lightning_module, data())
    assert [{row[0] for row in table} for table in logger.tables] == [{4, 8}, {12}]


@pytest.mark.slow  # wandb's own start and end
@pytest.mark.parametrize(("structure", "count"), [(Element(), 1), (Rows(), 2)])
def test_an_offline_run_holds_each_table_in_one_file(structure, count, tmp_path, wandb_offline):
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    module = Toy()
    trainer(MagnitudePruning(0.5, every=4, structure=structure), logger=logger, epochs=60).fit(module, data())
    logger.experiment.finish()
    run = read_run(tmp_path)
    files = list(tmp_path.rglob("*.table.json"))
    assert len([row for row in run.history if "sparsity/layers" in row]) == 1
    assert len(files) == count
    assert 25 <= len([row for row in run.history if "sparsity/abs_w" in row]) <= 60
    last = {row[1]: row[4] for row in run.tables["sparsity/layers"]["data"]}
    assert last == {name: int((p != 0).sum()) for name, p in module.named_parameters() if p.dim() > 1}
    rows = {row[1]: row[3:5] for row in run.tables["sparsity/groups_left"]["data"]} if count > 1 else {}
    matrices = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    assert rows == ({name: [len(p), int(p.any(1).sum())] for name, p in matrices.items()} if count > 1 else {})
