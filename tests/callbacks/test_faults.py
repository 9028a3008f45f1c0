"""Non-finite values in loss, gradients, data and weights stop the run before they reach a weight or a file."""

from __future__ import annotations

import pytest
import torch
from every_form import FORMS, every_form
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from toys import Repeated, Toy, data, hooks, trainer, weights

from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.conformance.faults import steep

NAN, INF = float("nan"), float("inf")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Late(Toy):
    """A toy that records its weights at the end of each batch, and applies ``spoil`` to the loss from step 5 on."""

    def __init__(self, spoil=None, **options):
        super().__init__(**options)
        self.spoil, self.before = spoil, None

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return self.spoil(self, loss) if self.spoil and self.trainer.global_step >= 5 else loss

    def on_train_batch_end(self, *args):
        self.before = weights(self)


def poison(value, name):
    """Make the gradient of one parameter non-finite without changing the loss."""

    def fault(module, loss):
        total = module.get_parameter(name).sum()
        return loss + steep(value, total) - total

    return fault


SPOILS = {
    "NaN loss": (lambda module, loss: loss * NAN, "the loss is nan at optimiser step 5; the weights are those before this batch"),
    "infinite loss": (lambda module, loss: loss + INF, "the loss is inf at optimiser step 5"),
    "NaN gradients": (lambda module, loss: steep(NAN, loss), "NaN and 0 infinite values, 'network.2.weight' holds 48 NaN"),
    "infinite gradients": (lambda module, loss: steep(-INF, loss), "infinite values"),
    "one NaN gradient": (poison(NAN, "network.2.weight"), "gradient of 'network.2.weight' holds 48 NaN"),
}  # fmt: skip


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("spoil", SPOILS)
def test_nonfinite_values_stop_the_run_before_the_step(form, spoil, tmp_path):
    fault, message = SPOILS[spoil]
    module, keeper = Late(fault), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    count = hooks(module)
    with pytest.raises(FloatingPointError) as error:
        trainer(form(), keeper, epochs=3, enable_checkpointing=True).fit(module, data(), data())
    assert message in str(error.value)
    assert all(torch.equal(w, module.before[name]) for name, w in weights(module).items())
    assert hooks(module) == count
    assert len([*tmp_path.glob("*.ckpt")]) == 5
    module = Late()  # the run resumes from the file before the fault
    trainer(form(), epochs=3).fit(module, data(), data(), ckpt_path=tmp_path / "step=5.ckpt")
    assert all(bool(w.isfinite().all()) for w in weights(module).values())


DATA = {"NaN": torch.full((4, 8), NAN), "inf": torch.full((4, 8), INF)}


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("kind", DATA)
def test_nonfinite_data_stop_the_run_before_the_step(form, kind):
    module = Toy()
    before, count = weights(module), hooks(module)
    with pytest.raises(FloatingPointError, match=r"(the loss is (nan|inf)|the gradient of .*) at optimiser step 0"):
        trainer(form()).fit(module, Repeated((DATA[kind], torch.zeros(4, dtype=torch.long)), 3))
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())
    assert hooks(module) == count


def test_saturated_infinite_data_show_in_the_gradients_alone():
    class Saturated(Toy):
        def training_step(self, batch, index):
            return self.network(batch[0]).tanh().square().sum()

    module, x = Saturated(torch.nn.Linear(8, 3)), torch.eye(8)
    x[3, 3] = INF
    with pytest.raises(FloatingPointError, match=r"the gradient of 'network.weight' .* while the loss is finite; .*detect_anomaly=True"):
        trainer(FORMS["penalty"]()).fit(module, Repeated((x, torch.zeros(8)), 1))


BITS = {"NaN": 0x7FC01234, "negative NaN": -0x3FEDCC, "inf": 0x7F800000, "-inf": -0x800000}


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("sanity", [0, 2])
def test_nonfinite_weights_are_refused_and_unchanged(form, kind, sanity):
    module = Toy()
    with torch.no_grad():
        module.network[2].weight.view(-1).view(torch.int32)[7] = BITS[kind]
    before, count = {name: w.view(torch.int32) for name, w in weights(module).items()}, hooks(module)
    number = "1 NaN and 0" if "NaN" in kind else "0 NaN and 1"
    with pytest.raises(ValueError, match=f"'network.2.weight' holds {number} infinite values before training starts"):
        trainer(form(), num_sanity_val_steps=sanity).fit(module, data(), data())
    assert all(torch.equal(w.view(torch.int32), before[name]) for name, w in weights(module).items())
    assert hooks(module) == count


@pytest.mark.slow
def test_weights_damaged_by_a_step_are_reported_before_saving(tmp_path):
    """The module's own hook handles gradients but does not fix them."""

    class Hooked(Late):
        def on_before_optimizer_step(self, optimizer):
            pass

    keeper = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1)
    module = Hooked(lambda module, loss: steep(NAN, loss) if module.trainer.global_step == 7 else loss)
    with pytest.raises(FloatingPointError, match=r"holds 128 NaN .* after optimiser step 8; files written before that are intact"):
        trainer(FORMS["penalty"](), keeper, epochs=3, enable_checkpointing=True).fit(module, data())
    assert [path.stem for path in tmp_path.glob("*.ckpt")] == ["step=4"]


def test_the_loss_after_a_harmful_step_names_the_weights():
    class Hooked(Late):
        def on_before_optimizer_step(self, optimizer):
            pass

    module = Hooked(lambda module, loss: steep(NAN, loss))
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at optimiser step 6; 'network.0.weight' holds \d+ NaN .* since an earlier"
    ):
        trainer(FORMS["penalty"](), epochs=3).fit(module, data())


@pytest.mark.slow
def test_gradients_that_the_module_mends_itself_are_left_to_it():
    class Mending(Late):
        def on_before_optimizer_step(self, optimizer):
            for p in self.parameters():
                p.grad.nan_to_num_(0.0, 0.0, 0.0)

    module = Mending(lambda module, loss: steep(NAN, loss))
    run = trainer(FORMS["penalty"](), epochs=3)
    run.fit(module, data())
    assert run.global_step == 12
    assert all(bool(w.isfinite().all()) for w in weights(module).values())


@pytest.mark.parametrize(("value", "stops"), [(INF, False), (NAN, True)])
def test_clipping_by_value_mends_inf_but_not_nan(value, stops):
    options = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    run, module = trainer(FORMS["penalty"](), epochs=2, **options), Late(poison(value, "network.0.weight"))
    if stops:
        with pytest.raises(FloatingPointError, match="holds 128 NaN"):
            run.fit(module, data())
    else:
        run.fit(module, data())
        assert run.global_step == 8
    assert all(bool(w.isfinite().all()) for w in weights(module).values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["penalty", "exact prox", "mask, each step", "mask, sampled"])
def test_a_grad_scaler_skips_its_infinite_gradients_and_the_run_goes_on(form):
    scaler, steps = torch.amp.GradScaler("cpu", init_scale=2.0**10), []

    def counted(parameters):
        optimizer = torch.optim.Adam(parameters, 1e-2)
        optimizer.register_step_post_hook(lambda *args: steps.append(args))
        return optimizer

    module = Late(lambda module, loss: steep(INF, loss) if module.trainer.global_step < 7 else loss, optimizer=counted)
    callback = FORMS[form]()
    run = trainer(callback, epochs=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    run.fit(module, data())
    assert run.global_step == 16
    assert callback.step == len(steps)
    assert 8 <= len(steps) <= 14  # at least two were skipped
    assert all(bool(w.isfinite().all()) for w in weights(module).values())
    estimates = [] if not isinstance(callback, AdaptiveMask) else [*callback.curvature.mean.values()]
    assert all(bool(estimate.isfinite().all()) for estimate in estimates)
    assert len(estimates) == (2 if "mask" in form else 0)
