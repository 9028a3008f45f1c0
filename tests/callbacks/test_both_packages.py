"""Every callback under both packages of Lightning, ``lightning.pytorch`` and ``pytorch_lightning``, in one process."""

from __future__ import annotations

import ast
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from every_form import each_kind
from torch import nn
from toys import data

import lightning_sparse.callbacks as ours
from lightning_sparse import penalties
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty, SparseCheckpoint, SparsityMonitor, compatibility

LOG_SUM = penalties.LogSum(eps=2.0)
PACKAGES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


class Steps:
    """A mixin with the toy's network and steps, for a LightningModule of either package."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def module(package, **methods):
    return type("Model", (Steps, package.LightningModule), methods)()


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(package, callbacks, network=None, epochs=2, **options):
    network = module(package) if network is None else network
    trainer = package.Trainer(max_epochs=epochs, callbacks=callbacks, log_every_n_steps=1, **(QUIET | options))
    trainer.fit(network, data(), data(seed=1))
    return SimpleNamespace(trainer=trainer, module=network, weights={n: p.detach().clone() for n, p in network.named_parameters()})


def zeros(weights):
    return sum(int((w == 0).sum()) for w in weights.values())


@pytest.fixture(params=PACKAGES.values(), ids=list(PACKAGES))
def package(request):
    return request.param


@each_kind
def test_both_packages_train_the_same_weights(form):
    runs = [fit(package, [form()]) for package in PACKAGES.values()]
    assert zeros(runs[0].weights) > 0
    assert all(torch.equal(w, runs[1].weights[name]) for name, w in runs[0].weights.items())
    assert runs[0].trainer.callback_metrics["sparsity/total"] == runs[1].trainer.callback_metrics["sparsity/total"]


@pytest.mark.parametrize("make", [SparsityMonitor, lambda: ReweightedPenalty(LOG_SUM, 0.5), lambda: MagnitudePruning(0.5)])
def test_a_single_callback_is_accepted(package, make):
    assert "sparsity/total" in fit(package, make()).trainer.callback_metrics


def test_sparse_checkpoint_is_the_only_checkpoint_callback_and_the_last(package, tmp_path):
    keeper = SparseCheckpoint(0.4, dirpath=tmp_path, monitor="train/loss", save_top_k=-1, filename="{epoch}")
    run = fit(package, [keeper, MagnitudePruning(0.5), SparsityMonitor()], enable_checkpointing=True, epochs=3)
    assert run.trainer.checkpoint_callbacks == [keeper]
    assert run.trainer.callbacks[-1] is keeper
    assert keeper.best_model_path
    assert torch.load(keeper.best_model_path, weights_only=True)["state_dict"].keys() == run.module.state_dict().keys()


def test_sparse_checkpoint_alone_keeps_its_own_settings(package, tmp_path):
    keeper = SparseCheckpoint(0.0, dirpath=tmp_path, monitor="val/loss", mode="max", save_top_k=2, filename="{epoch}")
    fit(package, keeper, enable_checkpointing=True)
    assert (keeper.monitor, keeper.mode, keeper.save_top_k, len(keeper.best_k_models)) == ("val/loss", "max", 2, 2)
    with pytest.raises(Exception, match="enable_checkpointing=False"):
        package.Trainer(callbacks=[keeper], **QUIET)


@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_either_package_end_sparse(package, average):
    averaging = getattr(package.callbacks, average)
    make = averaging(decay=0.5) if average.startswith("EMA") else averaging(swa_lrs=1e-2, swa_epoch_start=1)
    run = fit(package, [make, ReweightedPenalty(LOG_SUM, 0.5)], epochs=4)
    assert 0 < zeros(run.weights) < 176
    assert run.trainer.callback_metrics["sparsity/total"] == zeros(run.weights) / 176


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_files_of_one_package_resume_in_the_other(package, tmp_path):
    other = next(one for one in PACKAGES.values() if one is not package)
    keeper = package.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(package, [ReweightedPenalty(LOG_SUM, 0.5), keeper], epochs=4, enable_checkpointing=True)
    network, again = module(other), other.callbacks.ModelCheckpoint(tmp_path)
    trainer = other.Trainer(max_epochs=4, callbacks=[ReweightedPenalty(LOG_SUM, 0.5), again], **(QUIET | {"enable_checkpointing": True}))
    trainer.fit(network, data(), data(seed=1), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(p.detach(), whole.weights[name]) for name, p in network.named_parameters())


def test_csv_figures_are_those_of_the_module(package, tmp_path):
    logger = package.loggers.CSVLogger(tmp_path, name=None, version="run")
    run = fit(package, [ReweightedPenalty(LOG_SUM, 0.5), SparsityMonitor()], logger=logger)
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    totals = [line.split(",")[lines[0].split(",").index("sparsity/total")] for line in lines[1:]]
    assert float([total for total in totals if total][-1]) == pytest.approx(zeros(run.weights) / 176)


def test_wandb_loggers_of_either_package_are_found(package, tmp_path):
    config = {}
    run = SimpleNamespace(config=SimpleNamespace(update=lambda values, **_: config.update(values)), summary={})
    silent = {name: lambda *_, **__: None for name in ("__init__", "log_metrics", "log_hyperparams", "finalize", "after_save_checkpoint")}
    names = {"name": "run", "version": "1", "save_dir": str(tmp_path), "experiment": run, "_prefix": ""}
    logger = type("Kept", (package.loggers.WandbLogger,), silent | names)()
    found = fit(package, [ReweightedPenalty(LOG_SUM, 0.5)], logger=[package.loggers.CSVLogger(tmp_path), logger])
    assert config["sparsify"]["class_path"] == "ReweightedPenalty"
    assert run.summary["sparsity/total"] == zeros(found.weights) / 176


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_of_either_package_are_refused(package, name):
    run = package.Trainer(callbacks=[ReweightedPenalty(LOG_SUM, 0.5)], **QUIET)
    run.strategy.__class__ = type("Posed", (getattr(package.strategies, name),), {})
    with pytest.raises(ValueError, match="ReweightedPenalty does not support Posed"):
        run.callbacks[0].setup(run, module(package), "fit")


def test_users_hooks_are_detected_in_either_package(package):
    plain, own = module(package), module(package, setup=lambda self, stage: None)
    patched = module(package)
    patched.configure_gradient_clipping = lambda *_, **__: None
    asked = (("setup", plain), ("setup", own), ("configure_gradient_clipping", patched))
    seen = [compatibility.overrides(hook, one) for hook, one in asked]
    assert seen == [False, True, True]


def test_a_class_that_only_shares_a_name_is_no_lightning_class(package):
    assert compatibility.is_a(package.callbacks.EMAWeightAveraging(), "WeightAveraging")
    assert not compatibility.is_a(type("WeightAveraging", (), {})(), "WeightAveraging")


def test_copies_and_pickles_keep_both_packages(package):
    for made in (SparsityMonitor(), SparseCheckpoint(0.5), ReweightedPenalty(LOG_SUM, 0.5)):
        for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert isinstance(again, package.Callback)


LATER = """
import sys
from lightning_sparse.callbacks import AdaptiveMask, SparsityMonitor
from lightning_sparse.callbacks.compatibility import AnyCallback
bases = AnyCallback.__bases__
print("imported by us:", "pytorch_lightning" in sys.modules)
first = SparsityMonitor()
import pytorch_lightning as pl
print("at once:", issubclass(AnyCallback, pl.Callback))
class Mine(AdaptiveMask): pass
print("when a class is derived:", issubclass(Mine, pl.Callback))
AnyCallback.__bases__ = bases
print("without:", isinstance(first, pl.Callback))
second = SparsityMonitor()
print("when one is made:", isinstance(first, pl.Callback), isinstance(second, pl.Callback))
"""


@pytest.mark.slow
def test_pytorch_lightning_is_not_imported_by_us_and_may_be_imported_later():
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = ["imported by us: False", "at once: False", "when a class is derived: True", "without: False", "when one is made: True True"]
    assert done.stdout.splitlines() == expected


def test_no_callback_asks_isinstance_of_one_package_alone():
    """``isinstance``, ``issubclass`` and ``is_overridden`` of ``lightning.pytorch`` support only one package."""
    odd = []
    for path in Path(ours.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning.")]
        names = {alias.asname or alias.name for node in imports for alias in node.names}
        odd += [f"{path.name}: imports is_overridden" for name in names if name == "is_overridden"]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "issubclass"):
                asked = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
                odd += [f"{path.name}:{call.lineno}: {call.func.id} of {name}" for name in asked & names]
    assert odd == []
