"""SparseCheckpoint: a best checkpoint counts only if its file has the target sparsity."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from toys import Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, SparseCheckpoint, Sparsify, SparsityMonitor
from lightning_sparse.conformance.neighbours import Backboned
from lightning_sparse.conformance.ranks import DDP, on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
LOG_SUM = penalties.LogSum(eps=2.0)
slow = pytest.mark.slow
needs_ema = pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="this version of Lightning has no EMAWeightAveraging")


class Scored(Toy):
    """A toy whose validation score falls in every epoch (each is a new best) or rises (the first is best)."""

    falls = True

    def validation_step(self, batch, index):
        self.log("score", -float(self.current_epoch) if self.falls else float(self.current_epoch))


def share(path):
    matrices = [w for w in torch.load(path, weights_only=True)["state_dict"].values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


def fit(keeper, *others, module=None, epochs=6, **options):
    run = trainer(*others, keeper, epochs=epochs, enable_checkpointing=True)
    run.fit(Scored() if module is None else module, data(), data(), **options)
    return run


def every(folder, target, **more):
    return SparseCheckpoint(target, dirpath=folder, monitor="score", filename="{epoch}", save_top_k=-1, **more)


def test_a_misspelt_monitor_is_refused_after_the_first_validation_not_when_the_target_is_met(tmp_path):
    module = Scored()
    keeper = SparseCheckpoint(0.9, dirpath=tmp_path, monitor="scoer", mode="min")
    with pytest.raises(MisconfigurationException, match=r"SparseCheckpoint\(monitor='scoer'\): .* closest: 'score'.* Logged are .*'score'"):
        fit(keeper, Sparsify(0.9), module=module)
    assert module.trainer.current_epoch == 0


def due(files, target):
    return sorted(path.name for path in files if share(path) >= target)


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """Return the sparsity of each epoch's file, without a target."""
    folder = tmp_path_factory.mktemp("all")
    fit(every(folder, 0.0), ReweightedPenalty(LOG_SUM, 0.3))
    return [share(folder / f"epoch={epoch}.ckpt") for epoch in range(6)]


def test_files_are_saved_as_best_exactly_where_they_hold_the_target(shares, tmp_path):
    assert shares[0] < shares[3] < shares[5]
    keeper = every(tmp_path, shares[3])
    fit(keeper, ReweightedPenalty(LOG_SUM, 0.3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch={e}.ckpt" for e in range(6) if shares[e] >= shares[3]]
    assert keeper.held
    assert keeper.highest == pytest.approx(max(shares))
    assert all(share(path) >= shares[3] for path in tmp_path.iterdir())


@slow
def test_a_target_that_no_whole_number_of_weights_gives_is_met_by_the_nearest_one(tmp_path):
    size = sum(w.numel() for w in Toy().state_dict().values() if w.dim() > 1)
    target = 0.7
    while (round(target * size) / size) >= target:  # rounded down
        target += 0.001
    keeper = every(tmp_path / "files", target)
    fit(keeper, ReweightedPenalty(LOG_SUM, target_sparsity=target))
    assert keeper.best_model_path
    assert share(keeper.best_model_path) == round(target * size) / size < target


def test_an_early_better_score_without_the_target_is_no_best(shares, tmp_path):
    module = Scored()
    module.falls = False
    keeper = SparseCheckpoint(shares[3], dirpath=tmp_path, monitor="score", filename="{epoch}")
    fit(keeper, ReweightedPenalty(LOG_SUM, 0.3), module=module)
    first = next(epoch for epoch, value in enumerate(shares) if value >= shares[3])
    assert first > 0
    assert Path(keeper.best_model_path).name == f"epoch={first}.ckpt"
    assert float(keeper.best_model_score) == first


@slow
def test_the_last_file_is_written_from_the_start(tmp_path):
    keeper = SparseCheckpoint(1.0, dirpath=tmp_path, monitor="score", save_last=True)
    with pytest.warns(UserWarning, match="was never met"):
        fit(keeper, ReweightedPenalty(LOG_SUM, 0.3), epochs=2)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1
    assert keeper.best_model_path == ""


@slow
def test_a_target_never_reached_is_reported_with_the_largest_sparsity(shares, tmp_path):
    said = f"target_sparsity=0.999 was never met when a file was due; the largest sparsity there was {max(shares):.4g}"
    with pytest.warns(UserWarning, match=re.escape(said)):
        fit(every(tmp_path, 0.999), ReweightedPenalty(LOG_SUM, 0.3))
    assert list(tmp_path.iterdir()) == []


def test_without_a_sparsity_callback_one_is_recommended(tmp_path):
    with pytest.warns(UserWarning, match=r"target_sparsity=0.9 was never met .* There is no sparsity callback in the Trainer: add one"):
        fit(every(tmp_path, 0.9), epochs=1)


@slow
def test_the_state_is_resumed(shares, tmp_path):
    with pytest.warns(UserWarning, match="was never met"):
        run = fit(every(tmp_path, 0.999), ReweightedPenalty(LOG_SUM, 0.3), epochs=3)
    run.save_checkpoint(tmp_path / "three.ckpt")
    again = every(tmp_path, 0.999)

    class Looking(Scored):
        def on_train_start(self):
            assert again.highest == pytest.approx(max(shares[:3]))
            assert not again.held

    with pytest.warns(UserWarning, match="was never met"):
        fit(again, ReweightedPenalty(LOG_SUM, 0.3), module=Looking(), epochs=4, ckpt_path=tmp_path / "three.ckpt")
    assert again.highest >= max(shares[:3])


@slow
def test_several_callbacks_are_counted_together(tmp_path):
    own = [ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"]), AdaptiveProx(LOG_SUM, 1e-4, select=["network.2.*"])]
    keeper = every(tmp_path, 0.0)
    fit(keeper, *own)
    seen = [share(path) for path in tmp_path.iterdir()]
    assert keeper.highest == pytest.approx(max(seen))
    assert 0 < max(seen) < 128 / 176 + 0.01


class Dying(Scored):
    """A toy that sets a quarter of the first layer to zero before the third epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.network[0].weight.data[:4] = 0.0
            self.network[0].weight.register_hook(lambda grad: grad * (self.network[0].weight != 0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@slow
@pytest.mark.parametrize(
    ("others", "names"), [((), 176), ((SparsityMonitor(["network.0.weight"]),), 128)], ids=["alone", "beside a monitor"]
)
def test_without_a_sparsity_callback_exact_zeros_count(others, names, tmp_path):
    keeper = every(tmp_path, 32 / names)
    fit(keeper, *others, module=Dying(), epochs=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=2.ckpt", "epoch=3.ckpt"]
    assert keeper.highest == 32 / names


@slow
def test_the_weights_that_model_pruning_masks_count(tmp_path):
    keeper = every(tmp_path, 0.5)
    fit(keeper, ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False), SparsityMonitor(), epochs=2)
    assert keeper.highest == max(share(path) for path in tmp_path.iterdir()) > 0.7


@slow
@needs_ema
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("own", [(ReweightedPenalty(LOG_SUM, 0.3),), ()], ids=["penalty", "exact zeros"])
def test_beside_an_average_the_files_own_weights_count(own, weights_only, tmp_path):
    keeper = every(tmp_path, 0.0, save_weights_only=weights_only)
    fit(keeper, callbacks.EMAWeightAveraging(decay=0.9), *own, module=None if own else Dying())
    assert keeper.highest == max(share(path) for path in tmp_path.iterdir())
    assert (keeper.highest > 0) == (bool(own) or weights_only)


@pytest.mark.parametrize("target", [-0.1, 1.5, float("nan"), True, "half"])
def test_an_invalid_target_is_refused(target):
    with pytest.raises((TypeError, ValueError), match=r"target must .*got"):
        SparseCheckpoint(target)


def test_a_link_to_a_best_that_may_not_exist_is_refused():
    with pytest.raises(ValueError, match="use save_last=True"):
        SparseCheckpoint(0.5, save_last="link")


@slow
def test_it_is_made_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = {"class_path": "SparseCheckpoint", "init_args": {"target": 0.9, "monitor": "val/loss", "mode": "max", "save_top_k": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": {"logger": False, "accelerator": "cpu", "callbacks": [entry]}}))
    monkeypatch.setattr("sys.argv", ["fit.py", "--config", "run.yaml"])
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=0)
    (keeper,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SparseCheckpoint)]
    assert (keeper.target, keeper.monitor, keeper.mode, keeper.save_top_k) == (0.9, "val/loss", "max", 3)
    assert "target=0.9" in keeper.state_key


def _two_ranks(rank, folder, average):
    """Fit with an average, with different data on each rank."""
    keeper, module = every(folder, 0.3), Scored(seed=rank)
    others = [callbacks.EMAWeightAveraging(decay=0.3)] if average else []
    run = trainer(*others, AdaptiveMask(LOG_SUM, 0.5), keeper, epochs=4, enable_checkpointing=True, **DDP)
    run.fit(module, data(seed=2 * rank), data(seed=1))
    return dict(module.state_dict()), keeper.highest, sorted(map(str, keeper.best_k_models))


@slow
@pytest.mark.parametrize("average", [False, pytest.param(True, marks=needs_ema)])
def test_two_ranks_agree_on_what_is_saved(average, tmp_path):
    one, two = on_ranks(_two_ranks, tmp_path, average)
    assert all(torch.equal(w, two[0][name]) for name, w in one[0].items())
    assert one[1:] == two[1:]
    assert one[1] > 0.3
    assert sorted(map(str, tmp_path.iterdir())) == one[2] != []
    assert all(share(path) >= 0.3 for path in tmp_path.iterdir())


def _unfreezing(rank):
    own, thaw = ReweightedPenalty(LOG_SUM, 0.5), callbacks.BackboneFinetuning(1, backbone_initial_ratio_lr=1.0)
    trainer(thaw, own, epochs=3, **DDP).fit(Backboned(), data(seed=2 * rank), data(seed=1))


@slow
def test_parameters_unfrozen_under_ddp_are_refused_if_ranks_diverge():
    """DDP does not average gradients of weights that were frozen when it wrapped the module; Lightning's own run diverges, too."""
    with pytest.raises(RuntimeError, match=r"backbone.weight.* differs on rank 1(.|\n)*frozen when DDP wrapped"):
        on_ranks(_unfreezing)


@slow
def test_a_target_above_that_of_the_callback_is_reported_before_training(tmp_path):
    said = r"SparseCheckpoint\(target_sparsity=0.9\) .* Sparsify makes 0.8 of them zero, so it would save none: give it target_sparsity=0.8"
    with pytest.warns(UserWarning, match="was never met"), pytest.warns(UserWarning, match=said) as found:
        fit(every(tmp_path, 0.9), Sparsify(0.8))
    ours = [text for one in found if (text := str(one.message)).startswith("SparseCheckpoint")]
    assert [re.match(said, text) is not None for text in ours] == [True, False]  # before the warning at the end


@slow
@pytest.mark.parametrize("target", [0.8, 0.7])
def test_a_target_that_the_callback_meets_is_not(target, tmp_path):
    fit(every(tmp_path, target), Sparsify(0.8))


def test_a_metric_that_rises_without_a_mode_is_reported(recwarn):
    for monitor, mode in (("val_loss", None), ("val/mape", None), (None, None), ("val/accuracy", "max"), ("val/accuracy", "min")):
        SparseCheckpoint(0.8, monitor=monitor, **({} if mode is None else {"mode": mode}))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"monitor='val/accuracy'\) without a mode keeps the file of the smallest .* give mode='max'"):
        SparseCheckpoint(0.8, monitor="val/accuracy")
