"""The length of a run: refused if required but unknown, updated if epochs change, restored by a resumed run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from every_form import one_of_each_kind
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Repeated, Toy, data, several, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import AdaptiveMask, MagnitudePruning, ReweightedPenalty
from lightning_sparse.conformance.lengths import stream
from lightning_sparse.conformance.toys import Stateful
from lightning_sparse.schedules import LinearWarmup

LOG_SUM = penalties.LogSum(eps=2.0)
NEEDY = {
    "pruning": partial(MagnitudePruning, 0.5, every=2),
    "freeze": partial(ReweightedPenalty, LOG_SUM, 0.5, freeze=0.25),
    "warm-up": partial(AdaptiveMask, LOG_SUM, LinearWarmup(0.5, 0.5)),
    "target": partial(ReweightedPenalty, LOG_SUM, target_sparsity=0.5),
}
needy = pytest.mark.parametrize("form", NEEDY.values(), ids=NEEDY.keys())
WAYS = {"epochs": {"epochs": 4}, "neither": {"epochs": -1}, "time": {"epochs": -1, "max_time": "00:00:01:00"}}


@needy
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_an_unknown_length_is_refused_before_training_with_what_to_give(form, options):
    module = Toy()
    before = weights(module)
    with pytest.raises(
        ValueError, match=r"needs the length of the run, .*: give the Trainer max_steps, or limit_train_batches and max_epochs >= 1"
    ):
        trainer(form(), **options).fit(module, stream(), data(seed=1))
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())


@pytest.mark.parametrize("form", several(NEEDY, "pruning", "target"))
@pytest.mark.parametrize("options", [{"epochs": -1, "max_steps": 40}, {"epochs": 10, "limit_train_batches": 4}], ids=["steps", "batches"])
def test_it_is_known_by_steps_or_by_batches_an_epoch(form, options):
    callback, module = form(), Toy()
    trainer(callback, **options).fit(module, stream())
    assert callback.step == callback.total == 40
    assert (module.network[0].weight == 0).any()


def test_a_form_whose_strength_is_constant_needs_none():
    module = Toy()
    trainer(ReweightedPenalty(LOG_SUM, 0.5), epochs=4).fit(module, stream())
    assert (module.network[0].weight == 0).any()


@needy
@pytest.mark.parametrize("loader", [lambda: stream(), lambda: Repeated(None, 0)], ids=["none taken", "none there"])
@pytest.mark.filterwarnings("ignore:Total length of .* is zero")
@pytest.mark.filterwarnings("ignore:.*returned 0 length", "ignore:.*this fit trained no step")
def test_a_run_without_batches_is_no_run_of_unknown_length(form, loader):
    callback, given = form(), loader()
    trainer(callback, limit_train_batches=1.0 if hasattr(given, "count") else 0).fit(Toy(), given, data(seed=1))
    assert callback.step == 0


@pytest.mark.parametrize("form", [*one_of_each_kind, *several(NEEDY, *NEEDY)])
@pytest.mark.filterwarnings("ignore:ReweightedPenalty had only")
def test_a_fast_dev_run_completes(form):
    callback = form()
    run = trainer(callback, fast_dev_run=True)
    run.fit(Toy(), data(), data(seed=1))
    assert callback.step == run.global_step == 1


class Changing(Toy):
    """A stateful loader with a different length in each epoch."""

    def __init__(self, *lengths, **options):
        super().__init__(**options)
        self.lengths = lengths

    def train_dataloader(self):
        loader = Stateful(data())
        loader.batches = [batch for _ in range(2) for batch in data()][: self.lengths[self.trainer.current_epoch]]
        return loader


class Seen(MagnitudePruning):
    """Record the known length after each batch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.seen.append(self.total)


RUN = {"epochs": 4, "reload_dataloaders_every_n_epochs": 1}


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_each_epoch_measures_the_run_again_and_the_ramp_ends_where_it_should(manual):
    class Manual(Changing):
        automatic_optimization = not manual

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            if not manual:
                return loss
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    callback, module = Seen(0.5, every=1, end=1.0, scope="layer"), Manual(6, 2, 4, 1)
    trainer(callback, **RUN).fit(module)
    assert callback.seen == [24] * 6 + [12] * 2 + [16] * 4 + [13]
    assert int((module.network[0].weight == 0).sum()) == 64


def test_accumulated_batches_and_max_steps_are_measured_again_too():
    callback = Seen(0.5, every=1)
    trainer(callback, accumulate_grad_batches=2, **RUN).fit(Changing(6, 3, 3, 1))
    assert callback.seen == [12] * 6 + [9] * 3 + [9] * 3 + [8]
    callback = Seen(0.5, every=1)
    trainer(callback, max_steps=11, **RUN).fit(Changing(6, 1, 4, 1))
    assert callback.seen == [11] * 6 + [9] + [11] * 4


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("step", [4, 7, 10])
def test_a_resumed_run_knows_the_lengths_of_the_epochs_before(step, tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole, module = Seen(0.5, every=1, end=1.0), Changing(6, 2, 4, 1)
    trainer(whole, keeper, enable_checkpointing=True, **RUN).fit(module)
    again, resumed = Seen(0.5, every=1, end=1.0), Changing(6, 2, 4, 1, seed=1)
    trainer(again, **RUN).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert again.seen == whole.seen[step:]
    assert all(torch.equal(w, weights(module)[name]) for name, w in weights(resumed).items())
