"""Checkpoints between runs: from dense runs, from other callbacks, and from failed runs."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Spy, Toy, data, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.schedules import LinearWarmup

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
LOG_SUM = penalties.LogSum(eps=2.0)


@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveProx, AdaptiveMask])
def test_a_dense_checkpoint_is_continued_sparse_and_freezes_in_time(form, tmp_path):
    dense, seen = trainer(epochs=2), []
    dense.fit(Toy(), data())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    callback = form(LOG_SUM, LinearWarmup(0.5, 0.6), freeze=0.25)
    spy = Spy(lambda moment, module: seen.append((callback.lam, callback.frozen)) if moment == "batch end" else None)
    trainer(callback, spy, epochs=4).fit(Toy(), data(), ckpt_path=tmp_path / "dense.ckpt")
    assert [frozen for _, frozen in seen] == [False] * 5 + [True] * 3  # shares of the 8 remaining steps
    assert [lam for lam, _ in seen] == pytest.approx([0.5 * min(1, step / 4.8) for step in range(1, 9)])


@pytest.mark.parametrize(("first", "second"), [(ReweightedPenalty, AdaptiveMask), (AdaptiveMask, AdaptiveProx)])
def test_a_form_swapped_on_resume_continues_the_live_weights_and_the_clock(first, second, tmp_path):
    saved, checked = [], []

    class Saving(Toy):
        def on_train_epoch_end(self):
            saved.append({name: one.attachment.live(name).clone() for name in one.parameters})

    class Resuming(Toy):
        def on_train_start(self):
            checked.append(other.step)
            assert all(torch.equal(self.get_parameter(name), w) for name, w in saved[1].items())

    one, other = first(LOG_SUM, 0.5, freeze=0.25), second(LOG_SUM, 0.5, freeze=0.25)
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(one, keeper, epochs=4, enable_checkpointing=True).fit(Saving(), data())
    path = tmp_path / "epoch=1.ckpt"
    file = torch.load(path, weights_only=True)["state_dict"]
    assert any((file[name] == 0).any() and (w != 0).all() for name, w in saved[1].items())
    with pytest.warns(UserWarning, match=f"form: {first.__name__} -> {second.__name__}"):
        trainer(other, epochs=4).fit(Resuming(seed=1), data(), ckpt_path=path)
    assert checked == [8]
    assert (other.step, other.frozen) == (16, True)


@pytest.mark.skipif("save_on_exception" not in inspect.signature(ModelCheckpoint).parameters, reason="this Lightning has no such option")
@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveMask])
def test_a_weights_only_file_written_on_exception_holds_the_zeros(form, tmp_path):
    shown = []

    class PowerCut(Toy):
        def training_step(self, batch, index):
            if self.trainer.global_step == 6:
                shown.append({name: callback.thresholded(name) for name in callback.parameters})
                raise RuntimeError("power cut")
            return super().training_step(batch, index)

    callback, keeper = form(LOG_SUM, 0.5), ModelCheckpoint(tmp_path, save_on_exception=True, save_weights_only=True, every_n_epochs=50)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(callback, keeper, enable_checkpointing=True).fit(PowerCut(), data())
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert any((w == 0).any() for w in shown[0].values())
    assert all(torch.equal(state[name], w) for name, w in shown[0].items())
