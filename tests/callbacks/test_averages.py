"""With WeightAveraging and StochasticWeightAveraging: figures, files, resumes and the order of callbacks.

The conformance suite checks that the average is sparse in validation, in files and after fit.
"""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from toys import Toy, data, hooks, trainer, weights

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, SparsityMonitor
from lightning_sparse.schedules import LinearWarmup

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]
LOG_SUM = penalties.LogSum(eps=2.0)
slow = pytest.mark.slow
needs_ema = pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="this version of Lightning has no EMAWeightAveraging")
both_orders = pytest.mark.parametrize("first", [True, False], ids=["before", "after"])


def ema():
    return callbacks.EMAWeightAveraging(decay=0.5)


def swa():
    return StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)


AVERAGES = [pytest.param(ema, marks=needs_ema), swa]


def ordered(first, callback, *others):
    return [callback, *others] if first else [*others, callback]


def share(tensors):
    matrices = [w for w in tensors if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices)


@pytest.mark.slow
@both_orders
@pytest.mark.parametrize("average", AVERAGES)
def test_the_final_figures_count_what_the_module_holds(average, first):
    module, callback, averaging = Toy(), ReweightedPenalty(LOG_SUM, 0.5), average()
    run = trainer(*ordered(first, callback, averaging), epochs=4)
    run.fit(module, data(), data())
    assert hooks(averaging._average_model) == 0
    assert 0 < share(module.parameters()) < 1
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(share(module.parameters()), abs=1e-7)
    for name, w in weights(module).items():
        if w.dim() > 1:
            assert float(run.callback_metrics[f"sparsity/{name}"]) == pytest.approx(float((w == 0).float().mean()), abs=1e-7)


@slow
@pytest.mark.parametrize("average", AVERAGES)
def test_the_final_total_of_two_callbacks_beside_an_average_is_their_joint_count(average):
    module = Toy()
    own = [ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"]), AdaptiveProx(LOG_SUM, 0.1, select=["network.2.*"])]
    run = trainer(own[0], average(), own[1], epochs=4)
    run.fit(module, data())
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(share(module.parameters()), abs=1e-7)
    assert all((module.network[i].weight == 0).any() for i in (0, 2))


@slow
@needs_ema
def test_a_monitor_alone_counts_the_average_that_ends_the_fit():
    class Dying(Toy):
        def on_train_batch_end(self, *args):
            self.network[0].weight.data[0] = 0.0 if self.trainer.global_step > 4 else 1.0

    module = Dying()
    run = trainer(callbacks.EMAWeightAveraging(decay=0.5), SparsityMonitor(), epochs=2)
    run.fit(module, data())
    assert share(module.parameters()) == 0  # because the average still contains earlier values
    assert float(run.callback_metrics["sparsity/total"]) == 0


@slow
@needs_ema
@both_orders
def test_each_epochs_total_is_a_count_of_its_file(first, tmp_path):
    totals, keeper = [], ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    class Looking(Toy):
        def on_train_epoch_start(self):
            totals.append(float(self.trainer.callback_metrics.get("sparsity/total", -1)))

    trainer(*ordered(first, ReweightedPenalty(LOG_SUM, 0.5), ema()), keeper, epochs=4, enable_checkpointing=True).fit(Looking(), data())
    files = [torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True) for epoch in range(3)]
    assert totals[1:] == pytest.approx([share(file["state_dict"].values()) for file in files], abs=1e-7)
    assert any(share(file["state_dict"].values()) != share(file["current_model_state"].values()) for file in files)


class Kept(Toy):
    """Record the weights when training starts."""

    started = None

    def on_train_start(self):
        self.started = weights(self)


@pytest.fixture
def files(tmp_path):
    """Save files of a dense and a sparse run with EMA in the second of four epochs; also return the sparse run's raw average."""
    averages = []

    class Noting(Toy):
        def on_train_epoch_end(self):
            averages.append({name: w.detach().clone() for name, w in average._average_model.module.named_parameters()})

    for name, own in (("sparse", [ReweightedPenalty(LOG_SUM, 0.5)]), ("plain", [])):
        average, keeper = ema(), ModelCheckpoint(tmp_path, filename=name, save_top_k=-1, every_n_epochs=2)
        trainer(*own, average, keeper, epochs=3, enable_checkpointing=True).fit(Noting(), data())
    return tmp_path, averages[1]


@slow
@needs_ema
def test_a_run_without_averaging_continues_from_the_average_in_the_file(files):
    folder, average = files
    module, callback = Kept(seed=1), ReweightedPenalty(LOG_SUM, 0.5)
    trainer(callback, epochs=4).fit(module, data(), ckpt_path=folder / "sparse.ckpt")
    assert all(torch.equal(module.started[name], w) for name, w in average.items())
    assert callback.step == 16


@slow
@needs_ema
def test_a_file_without_an_average_starts_one_from_the_live_weights(tmp_path):
    first, live, started = trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=2), [], []

    class Noting(Toy):
        def on_train_epoch_end(self):
            live.append(weights(self))
            self.trainer.save_checkpoint(tmp_path / "one.ckpt")

    class Looking(Toy):
        def on_train_start(self):
            started.append({name: w.detach().clone() for name, w in average._average_model.module.named_parameters()})

    first.fit(Noting(), data())
    assert any((w == 0).any() for w in torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"].values())
    average = ema()
    trainer(average, ReweightedPenalty(LOG_SUM, 0.5), epochs=4).fit(Looking(seed=1), data(), ckpt_path=tmp_path / "one.ckpt")
    assert all(torch.equal(started[0][name], w) for name, w in live[-1].items())


@slow
@needs_ema
@both_orders
def test_a_run_resumed_at_its_end_leaves_the_weights_and_the_average_sparse(first, tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="end")
    trainer(ReweightedPenalty(LOG_SUM, 0.5), ema(), keeper, epochs=2, enable_checkpointing=True).fit(Toy(), data())
    module, average = Toy(seed=1), ema()
    run = trainer(*ordered(first, ReweightedPenalty(LOG_SUM, 0.5), average), epochs=2)
    run.fit(module, data(), ckpt_path=tmp_path / "end.ckpt")
    assert share(module.parameters()) > 0
    run.save_checkpoint(tmp_path / "after.ckpt")
    file = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert share(file.values()) > 0
    seen = []
    module.validation_step = lambda *args: seen.append(share(module.parameters()))
    run.validate(module, data(), verbose=False)
    assert seen[0] == share(file.values())


@slow
@needs_ema
def test_a_file_written_when_a_run_fails_holds_the_sparse_average_and_resumes(tmp_path):
    class PowerCut(Toy):
        def training_step(self, batch, index):
            if self.trainer.global_step == 6:
                raise RuntimeError("power cut")
            return super().training_step(batch, index)

    average = ema()
    run = trainer(average, ReweightedPenalty(LOG_SUM, 0.5), epochs=4)
    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(PowerCut(), data())
    raw = {name: w.detach().clone() for name, w in average._average_model.module.named_parameters()}
    run.save_checkpoint(tmp_path / "cut.ckpt")
    assert share(torch.load(tmp_path / "cut.ckpt", weights_only=True)["state_dict"].values()) > 0

    class Looking(Toy):
        def on_train_start(self):
            again = self.trainer.callbacks[1]._average_model.module
            assert all(torch.equal(w, raw[name]) for name, w in again.named_parameters())

    trainer(ReweightedPenalty(LOG_SUM, 0.5), ema(), epochs=4).fit(Looking(), data(), ckpt_path=tmp_path / "cut.ckpt")


@both_orders
def test_shares_of_a_run_do_not_count_the_epoch_that_renews_batch_norm(first):
    seen = []

    class Looking(Toy):
        def on_train_batch_end(self, *args):
            seen.append((callback.lam, callback.frozen))

    network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    callback = ReweightedPenalty(LOG_SUM, LinearWarmup(0.5, 0.5), freeze=0.25)
    trainer(*ordered(first, callback, swa()), epochs=4).fit(Looking(network), data())
    assert len(seen) > 16
    assert [frozen for _, frozen in seen[:16]] == [False] * 11 + [True] * 5  # because a batch ends after its step
    assert [lam for lam, _ in seen[:8]] == pytest.approx([0.5 * step / 8 for step in range(1, 9)])


@slow
def test_no_noise_is_drawn_where_batch_norm_is_renewed():
    used = []
    network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    network[0].register_forward_hook(lambda layer, inputs, output: used.append(layer.weight.detach().clone()))
    trainer(AdaptiveMask(LOG_SUM, 0.5, noise=noise.ScaledBernoulli()), swa(), epochs=4).fit(Toy(network), data())
    assert len(used) == 20
    assert not torch.equal(used[14], used[15])
    assert all(torch.equal(w, used[16]) for w in used[17:])  # the only step of that epoch comes after its last forward
    assert torch.equal(used[16] == 0, network[0].weight == 0)


@pytest.mark.parametrize("average", AVERAGES)
def test_sparsity_callbacks_come_first_and_keep_their_order(average):
    one, monitor = ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"]), SparsityMonitor()
    two = AdaptiveProx(LOG_SUM, 0.1, select=["network.2.*"])
    averaging = average()
    run = trainer(monitor, averaging, one, two, epochs=1)
    run.fit(Toy(), data())
    assert [callback for callback in run.callbacks if callback in (one, two, monitor, averaging)] == [one, two, monitor, averaging]


@slow
@needs_ema
@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveMask])
def test_validation_does_not_affect_the_average(form):
    """Repeated validation within epochs changes neither the run nor its average."""
    ends = []
    for often in (2, 4):
        average, module = ema(), Toy()
        trainer(form(LOG_SUM, 0.5), average, epochs=1, val_check_interval=often).fit(module, data(), data())
        ends.append(weights(module))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())
