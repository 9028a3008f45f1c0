"""Files saved after fit contain the module's weights and a consistent callback state."""

from __future__ import annotations

import pytest
import torch
from every_form import each_kind
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Toy, data, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import MagnitudePruning, ReweightedPenalty

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:lr_scheduler.step"),
]
LOG_SUM = penalties.LogSum(eps=2.0)


def saved(run, path):
    run.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def equal(state, module):
    return state.keys() == module.state_dict().keys() and all(torch.equal(state[name], w) for name, w in module.state_dict().items())


def own_state(file):
    (state,) = [state for state in file["callbacks"].values() if "taken" in state]
    return state


@each_kind
def test_a_file_after_fit_holds_what_was_loaded_since_and_can_be_resumed(form, tmp_path):
    module, callback = Toy(decay=8), form()
    run = trainer(callback, epochs=2)
    run.fit(module, data())
    assert equal(saved(run, tmp_path / "end.ckpt")["state_dict"], module)
    module.load_state_dict(Toy(seed=3).state_dict())
    file = saved(run, tmp_path / "later.ckpt")
    assert equal(file["state_dict"], module)
    assert all(taken.numel() == 0 for taken in own_state(file)["taken"].values())

    class Looking(Toy):
        def on_train_start(self):
            started.append(weights(self))

    started = []
    trainer(form(), epochs=3).fit(Looking(seed=1, decay=8), data(), ckpt_path=tmp_path / "later.ckpt")
    if not callback.frozen:
        assert all(torch.equal(w, file["state_dict"][name]) for name, w in started[0].items())


def test_weights_of_the_best_epoch_loaded_after_fit_are_saved_unchanged(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, run = Toy(), trainer(MagnitudePruning(0.8, every=2), keeper, epochs=6, enable_checkpointing=True)
    run.fit(module, data())
    module.load_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])
    first = sum(int((w == 0).sum()) for w in module.parameters())
    assert first < 100
    file = saved(run, tmp_path / "final.ckpt")
    assert sum(int((w == 0).sum()) for w in file["state_dict"].values()) == first
    assert equal(file["state_dict"], module)


def test_a_frozen_support_is_saved_only_with_weights_that_lie_in_it(tmp_path):
    module, run = Toy(), trainer(ReweightedPenalty(LOG_SUM, 0.5, freeze=0.5), epochs=3)
    run.fit(module, data())
    assert own_state(saved(run, tmp_path / "end.ckpt"))["frozen"] is True
    module.load_state_dict(Toy(seed=3).state_dict())
    assert own_state(saved(run, tmp_path / "later.ckpt"))["frozen"] is False
    again = Toy(seed=1)
    trainer(ReweightedPenalty(LOG_SUM, 0.5, freeze=0.5), epochs=8).fit(again, data(), ckpt_path=tmp_path / "later.ckpt")
    assert any((w == 0).any() for w in again.parameters())


def test_after_an_exception_the_file_has_zeros_until_other_weights_are_loaded(tmp_path):
    class PowerCut(Toy):
        def training_step(self, batch, index):
            if self.trainer.global_step == 14:
                raise InterruptedError("power cut")
            return super().training_step(batch, index)

    module, run = PowerCut(), trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=4)
    with pytest.raises(InterruptedError, match="power cut"):
        run.fit(module, data())
    assert any((w == 0).any() for w in saved(run, tmp_path / "cut.ckpt")["state_dict"].values())
    assert not any((w == 0).any() for w in module.parameters())
    module.load_state_dict(Toy(seed=3).state_dict())
    assert equal(saved(run, tmp_path / "loaded.ckpt")["state_dict"], module)


def test_the_file_of_another_module_keeps_no_state_of_the_trained_one(tmp_path):
    run, other = trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=2), Toy(seed=5)
    run.fit(Toy(), data())
    run.validate(other, data(), verbose=False)
    file = saved(run, tmp_path / "other.ckpt")
    assert equal(file["state_dict"], other)
    assert not any("taken" in state for state in file["callbacks"].values())


def test_a_second_fit_of_another_module_saves_that_one(tmp_path):
    run, other = trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=2), Toy(seed=5)
    run.fit(Toy(), data())
    run.fit_loop.max_epochs = 4
    run.fit(other, data())
    file = saved(run, tmp_path / "other.ckpt")
    assert equal(file["state_dict"], other)
    assert {name: taken.numel() for name, taken in own_state(file)["taken"].items()} == {
        name: int((w == 0).sum()) for name, w in other.named_parameters() if w.dim() > 1
    }
