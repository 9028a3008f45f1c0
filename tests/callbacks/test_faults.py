"""Faults in a run and in its files: values that are not finite, damaged files, and that the checks would notice a broken form."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from toys import Repeated, Toy, data, hooks, trainer, weights

from lightning_sparse import archive, conformance, curvature, mask_rules, noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.conformance.faults import _steep

NAN, INF = float("nan"), float("inf")
LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 0.5),
    "frozen": partial(ReweightedPenalty, LOG_SUM, 0.5, freeze=0.9),
    "prox": partial(AdaptiveProx, LOG_SUM, 0.2),
    "exact prox": partial(AdaptiveProx, LOG_SUM, 0.2, exact=True),
    "mask": partial(AdaptiveMask, LOG_SUM, 0.5),
    "mask, Bernoulli": partial(AdaptiveMask, LOG_SUM, 0.5, noise=noise.ScaledBernoulli(), curvature=None),
    "mask, top-k": partial(AdaptiveMask, mask_rules.TopK(0.5)),
    "mask, sampled": partial(AdaptiveMask, LOG_SUM, 0.5, curvature=curvature.SampledFisher(output="network", every=1)),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Late(Toy):
    """Remembers its weights at each batch's end; from step 5 on its loss goes through ``spoil``."""

    def __init__(self, spoil=None, **options):
        super().__init__(**options)
        self.spoil, self.before = spoil, None

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return self.spoil(self, loss) if self.spoil and self.trainer.global_step >= 5 else loss

    def on_train_batch_end(self, *args):
        self.before = weights(self)


def poison(value, name):
    """Something in the graph whose gradient with respect to one parameter alone is not finite, while the loss stays."""

    def fault(module, loss):
        total = module.get_parameter(name).sum()
        return loss + _steep(value, total) - total

    return fault


SPOILS = {
    "NaN loss": (lambda module, loss: loss * NAN, "the loss is nan at optimiser step 5; the weights are those before this batch"),
    "infinite loss": (lambda module, loss: loss + INF, "the loss is inf at optimiser step 5"),
    "NaN gradients": (lambda module, loss: _steep(NAN, loss), "NaN and 0 infinite values, 'network.2.weight' holds 48 NaN"),
    "infinite gradients": (lambda module, loss: _steep(-INF, loss), "infinite values"),
    "one NaN gradient": (poison(NAN, "network.2.weight"), "gradient of 'network.2.weight' holds 48 NaN"),
}  # fmt: skip


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("spoil", SPOILS)
def test_values_that_are_not_finite_stop_the_run_before_the_step(form, spoil, tmp_path):
    fault, message = SPOILS[spoil]
    module, keeper = Late(fault), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    count = hooks(module)
    with pytest.raises(FloatingPointError) as error:
        trainer(form(), keeper, epochs=3, enable_checkpointing=True).fit(module, data(), data())
    assert message in str(error.value)
    assert all(torch.equal(w, module.before[name]) for name, w in weights(module).items())
    assert hooks(module) == count
    assert len([*tmp_path.glob("*.ckpt")]) == 5
    module = Late()  # and the run goes on from the file before the fault
    trainer(form(), epochs=3).fit(module, data(), data(), ckpt_path=tmp_path / "step=5.ckpt")
    assert all(bool(w.isfinite().all()) for w in weights(module).values())


DATA = {"NaN": torch.full((4, 8), NAN), "inf": torch.full((4, 8), INF)}


@every_form
@pytest.mark.parametrize("kind", DATA)
def test_data_that_are_not_finite_stop_the_run_before_the_step(form, kind):
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
def test_weights_that_are_not_finite_are_refused_and_keep_their_bits(form, kind, sanity):
    module = Toy()
    with torch.no_grad():
        module.network[2].weight.view(-1).view(torch.int32)[7] = BITS[kind]
    before, count = {name: w.view(torch.int32) for name, w in weights(module).items()}, hooks(module)
    number = "1 NaN and 0" if "NaN" in kind else "0 NaN and 1"
    with pytest.raises(ValueError, match=f"'network.2.weight' holds {number} infinite values before training starts"):
        trainer(form(), num_sanity_val_steps=sanity).fit(module, data(), data())
    assert all(torch.equal(w.view(torch.int32), before[name]) for name, w in weights(module).items())
    assert hooks(module) == count


def test_a_step_that_harms_the_weights_is_told_before_they_are_saved(tmp_path):
    """The gradients are left to a hook of the module's own, which does not mend them."""

    class Hooked(Late):
        def on_before_optimizer_step(self, optimizer):
            pass

    keeper = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1)
    module = Hooked(lambda module, loss: _steep(NAN, loss) if module.trainer.global_step == 7 else loss)
    with pytest.raises(FloatingPointError, match=r"holds 128 NaN .* after optimiser step 8; files written before that are whole"):
        trainer(FORMS["penalty"](), keeper, epochs=3, enable_checkpointing=True).fit(module, data())
    assert [path.stem for path in tmp_path.glob("*.ckpt")] == ["step=4"]


def test_the_loss_after_a_harmful_step_names_the_weights():
    class Hooked(Late):
        def on_before_optimizer_step(self, optimizer):
            pass

    module = Hooked(lambda module, loss: _steep(NAN, loss))
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at optimiser step 6; 'network.0.weight' holds \d+ NaN .* since an earlier"
    ):
        trainer(FORMS["penalty"](), epochs=3).fit(module, data())


def test_gradients_that_the_module_mends_itself_are_left_to_it():
    class Mending(Late):
        def on_before_optimizer_step(self, optimizer):
            for p in self.parameters():
                p.grad.nan_to_num_(0.0, 0.0, 0.0)

    module = Mending(lambda module, loss: _steep(NAN, loss))
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


@pytest.mark.parametrize("form", ["penalty", "exact prox", "mask", "mask, sampled"])
def test_a_grad_scaler_skips_its_infinite_gradients_and_the_run_goes_on(form):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Late(lambda module, loss: _steep(INF, loss) if module.trainer.global_step < 7 else loss)
    callback = FORMS[form]()
    run = trainer(callback, epochs=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    run.fit(module, data())
    assert run.global_step == 16
    assert callback.step == 14  # two were skipped
    assert all(bool(w.isfinite().all()) for w in weights(module).values())
    estimates = [] if not isinstance(callback, AdaptiveMask) else [*callback.curvature.mean.values()]
    assert all(bool(estimate.isfinite().all()) for estimate in estimates)
    assert len(estimates) == (2 if "mask" in form else 0)


# -- files ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    run = trainer(FORMS["mask"](), epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(path := tmp_path_factory.mktemp("files") / "whole.ckpt")
    return path


def refused(path: Path, own_weights: bool) -> str:
    module = Toy(seed=1)
    before, count = weights(module), hooks(module)
    module.training_step = lambda *args: pytest.fail("training began")
    with pytest.raises(Exception) as error:  # noqa: PT011 - torch's own, of many kinds
        trainer(FORMS["mask"](), epochs=3).fit(module, data(), ckpt_path=path)
    assert hooks(module) == count
    assert not own_weights or all(torch.equal(w, before[name]) for name, w in weights(module).items())
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("share", [i / 20 for i in range(20)])
def test_a_file_cut_at_any_place_is_refused_and_nothing_is_loaded(share, file, tmp_path):
    raw = file.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(raw[: int(share * len(raw))])
    refused(tmp_path / "cut.ckpt", own_weights=True)
    assert torch.load(file, weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_flipped_bits_are_told_by_their_checksum(file, tmp_path):
    """Wherever torch reads the flipped file as another one than was saved."""
    raw, whole, silent = file.read_bytes(), torch.load(file, weights_only=True), 0
    path, places = tmp_path / "flipped.ckpt", random.Random(0)
    for _ in range(300):
        flipped, place = bytearray(raw), places.randrange(len(raw))
        flipped[place] ^= 1 << places.randrange(8)
        path.write_bytes(bytes(flipped))
        try:
            read = torch.load(path, weights_only=True)
        except Exception:
            continue
        if conformance.resume.first_difference(read, whole):
            silent += 1
            with pytest.raises(ValueError, match=r"flipped.ckpt is damaged"):
                archive.check(path)
    assert silent > 30


def test_a_flipped_bit_in_a_weight_stops_the_trainer_before_training(file, tmp_path):
    raw = bytearray(file.read_bytes())
    weight = torch.load(file, weights_only=True)["state_dict"]["network.0.weight"]
    place = raw.find(weight.numpy().tobytes())
    raw[place + 2] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(bytes(raw))
    assert not torch.equal(torch.load(tmp_path / "flipped.ckpt", weights_only=True)["state_dict"]["network.0.weight"], weight)
    assert "flipped.ckpt is damaged: its entry" in refused(tmp_path / "flipped.ckpt", own_weights=False)


def test_files_without_checksums_and_what_is_no_file_pass(file, tmp_path):
    content = torch.load(file, weights_only=True)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "bare.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    for path in (file, tmp_path / "old.ckpt", tmp_path / "bare.ckpt", tmp_path, tmp_path / "none.ckpt", "s3://bucket/a.ckpt", None):
        archive.check(path)
    assert torch.load(tmp_path / "bare.ckpt", weights_only=True)["global_step"] == 4


def test_a_file_of_another_form_model_or_selection(file, tmp_path):
    other = AdaptiveProx(LOG_SUM, 0.2, select=["network.0.weight"])  # another state key: the run starts sparse anew
    with pytest.warns(UserWarning, match="Be aware that when using"):
        trainer(other, epochs=2).fit(Toy(), data(), ckpt_path=file)
    assert list(other.parameters) == ["network.0.weight"]
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"model": Toy().state_dict()}, foreign)
    assert refused(foreign, own_weights=True)
    shutil.copy(file, tmp_path / "wide.ckpt")
    wide = Toy(torch.nn.Sequential(torch.nn.Linear(8, 17), torch.nn.ReLU(), torch.nn.Linear(17, 3)))
    with pytest.raises(RuntimeError, match=r"size mismatch for network.0.weight"):
        trainer(FORMS["mask"](), epochs=2).fit(wide, data(), ckpt_path=tmp_path / "wide.ckpt")
    assert hooks(wide) == 0


OPTIONS = {
    "threshold": partial(ReweightedPenalty, LOG_SUM, 0.5, threshold=0.01),
    "keep_zeros": partial(ReweightedPenalty, LOG_SUM, 0.5, keep_zeros=True),
    "a rule of one's own": partial(ReweightedPenalty, mask_rules.LinearRamp(0.5)),
    "gap": partial(AdaptiveMask, LOG_SUM, 0.5, gap_samples=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMS, *OPTIONS])
def test_every_file_that_is_saved_loads_with_weights_only(name, tmp_path):
    make = (FORMS | OPTIONS)[name]
    keeper = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    run = trainer(make(), keeper, epochs=2, enable_checkpointing=True)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        state = torch.load(path, weights_only=True)["callbacks"][make().state_key]
        assert state["taken"].keys() == {"network.0.weight", "network.2.weight"}


@pytest.mark.slow
def test_two_callbacks_in_one_file_load_with_weights_only(tmp_path):
    first, second = ReweightedPenalty(LOG_SUM, 0.5, select=["network.0.*"]), AdaptiveMask(LOG_SUM, 0.5, select=["network.2.*"])
    run = trainer(first, second, epochs=1)
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert [*states[first.state_key]["taken"], *states[second.state_key]["taken"]] == ["network.0.weight", "network.2.weight"]


# -- broken forms, and the check that must notice each -----------------------------------------------------------------------


class Blind(AdaptiveProx):
    """Looks at no gradient."""

    def on_before_optimizer_step(self, *args):
        pass


class Heedless(Blind):
    """Nor at losses, nor at the weights that it begins with."""

    def on_before_backward(self, *args):
        pass

    def on_train_start(self, trainer, module):
        self._measure(trainer)

    on_sanity_check_start = on_train_start
    on_validation_start = on_train_epoch_end = on_before_backward


class Forgetful(AdaptiveMask):
    """Leaves everything as it is when something goes wrong."""

    def on_exception(self, *args):
        pass


class Trusting(ReweightedPenalty):
    """Looks at no checksum, and starts anew whatever it is given."""

    def on_load_checkpoint(self, *args):
        pass


class Odd(ReweightedPenalty):
    """Saves a path."""

    def state_dict(self):
        return super().state_dict() | {"folder": Path.cwd()}


MUTANTS = {
    "a_loss_that_is_not_finite": partial(Heedless, LOG_SUM, 0.5),
    "gradients_that_are_not_finite": partial(Blind, LOG_SUM, 0.2),
    "weights_that_are_not_finite": partial(Heedless, LOG_SUM, 0.5),
    "an_exception_leaves_the_module": partial(Forgetful, LOG_SUM, 0.5, noise=noise.ScaledBernoulli()),
    "ctrl_c_leaves_the_module": partial(Forgetful, LOG_SUM, 0.5),
    "a_full_disk_while_saving": partial(Forgetful, LOG_SUM, 0.5),
    "flipped_bits_are_refused": partial(Trusting, LOG_SUM, 0.5),
    "files_load_safely": partial(Odd, LOG_SUM, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_a_broken_form_is_caught_by_the_check_that_should(check):
    outcome = conformance.outcome(conformance.Subject("broken", Alone(MUTANTS[check])), check)
    assert outcome.verdict == "fail", outcome


class Alone:
    """A list of one callback, made anew; picklable."""

    def __init__(self, make):
        self.make = make

    def __call__(self):
        return [self.make()]
