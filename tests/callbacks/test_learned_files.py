"""Checkpoints of callbacks with learned parameters: plain structure, exact resumes, use by other callbacks, damaged states."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from learned_forms import FORMS, LOG_SUM, decaying, ended, every_form, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import data, trainer

from lightning_sparse.callbacks import ReweightedPenalty
from lightning_sparse.conformance.resume import first_difference
from lightning_sparse.conformance.toys import Stateful

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:resuming at step"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def shape_of(checkpoint):
    """Return groups, sizes and keys of the optimiser and scheduler states in a file."""
    optimizer, schedule = checkpoint["optimizer_states"][0], checkpoint["lr_schedulers"][0]
    groups = [(group["params"], sorted(group)) for group in optimizer["param_groups"]]
    lengths = {key: len(value) for key, value in schedule.items() if isinstance(value, list)}
    return groups, {i: sorted(state) for i, state in optimizer["state"].items()}, lengths


@pytest.mark.slow
@every_form
def test_a_file_holds_the_optimiser_as_without_the_callback(form, tmp_path):
    for name, callback in (("own", form()), ("plain", None)):
        fit(callback, decaying(), keep=tmp_path / name, epochs=1)
    own, plain = (torch.load(tmp_path / name / "step=3.ckpt", weights_only=True) for name in ("own", "plain"))
    assert shape_of(own) == shape_of(plain)


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("others", ["nothing", "ReweightedPenalty"])
def test_files_go_from_a_learned_form_to_others_and_back(form, others, tmp_path):
    other = (lambda: None) if others == "nothing" else (lambda: ReweightedPenalty(LOG_SUM, 0.3))
    fit(form(), decaying(), keep=tmp_path / "own")
    there = fit(other(), decaying(seed=1), path=tmp_path / "own" / "step=6.ckpt", keep=tmp_path / "other", epochs=3)
    assert there.global_step == 12
    assert len(there.optimizers[0].param_groups) == 1
    back = form()
    assert fit(back, decaying(seed=2), path=tmp_path / "other" / "step=10.ckpt", epochs=4).global_step == 16
    assert all(bool((kept["step"] == 6).all()) for kept in back.state_dict()["moments"].values())  # added at step 10 of 16


MAKES = {"Adam": partial(torch.optim.Adam, lr=1e-2), "fused": partial(torch.optim.Adam, lr=1e-2, fused=True)}
MAKES |= {"SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9), "AMSGrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True)}


CASES = [(form, "Adam", accumulate) for form in FORMS for accumulate in (1, 2)] + [("VarDrop", make, 1) for make in MAKES if make != "Adam"]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "make", "accumulate"), CASES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(form, make, accumulate, tmp_path):
    form, make = FORMS[form], MAKES[make]
    whole, callback = decaying(make=make), form()
    first = ended(whole, callback, fit(callback, whole, keep=tmp_path, epochs=4, accumulate_grad_batches=accumulate))
    assert first["own"]["moments"].keys() == first["own"]["learned"].keys() == {"network.0.weight", "network.2.weight"}
    assert all(first["own"]["moments"].values())
    for step in (1, 3, 4):
        again, resumed = decaying(seed=1, make=make), form()
        second = fit(resumed, again, path=tmp_path / f"step={step}.ckpt", epochs=4, accumulate_grad_batches=accumulate)
        assert first_difference(first, ended(again, resumed, second)) == ""


def test_a_file_written_after_the_fit_holds_the_moments(tmp_path):
    callback = FORMS["joint"]()
    run = fit(callback, decaying(), epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert all(float(kept["step"]) == 4 and kept["exp_avg_sq"].any() for kept in state["moments"].values())


@pytest.mark.slow
def test_a_second_fit_of_a_callback_starts_anew():
    callback, ends = FORMS["joint"](), []
    for _ in range(2):
        module = decaying()
        run = fit(callback, module)
        ends.append(ended(module, callback, run))
    assert first_difference(*ends) == ""


DAMAGE = {
    "'learned'": lambda state: state["learned"].update({"network.0.weight": torch.full((16, 8), torch.nan)}),
    "'learned' of 'network.0.weight' has shape": lambda state: state["learned"].update({"network.0.weight": torch.zeros(2)}),
    "'moments'": lambda state: state.update(moments=[1]),
    "it lacks 'moments'": lambda state: state.pop("moments"),
    "'ratios'": lambda state: state.update(ratios={"network.0.weight": -1.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("named", DAMAGE)
def test_damaged_state_is_refused_by_name(named, tmp_path):
    callback = FORMS["joint"]()
    fit(callback, decaying(), epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    DAMAGE[named](checkpoint["callbacks"][callback.state_key])
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=f"state of EtaTrick is damaged: {named}"):
        fit(FORMS["joint"](), decaying(), path=tmp_path / "b.ckpt")


class Averaging:
    """WeightAveraging, if Lightning has it."""

    def __new__(cls):
        callbacks = pytest.importorskip("lightning.pytorch.callbacks")
        if not hasattr(callbacks, "WeightAveraging"):
            pytest.skip("Lightning before 2.6")
        return callbacks.WeightAveraging(avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new)


@pytest.mark.slow
@every_form
def test_beside_an_average_the_learned_parameters_are_those_of_the_run(form, tmp_path):
    """An average changes neither learned parameters nor keys of a file, and has the callback's zeros."""
    alone, beside = form(), form()
    fit(alone, decaying())
    trainer(beside, Averaging(), epochs=2).fit(decaying(), Stateful(data()))
    assert first_difference(alone.state_dict()["learned"], beside.state_dict()["learned"]) == ""
    run = trainer(form(), Averaging(), ModelCheckpoint(tmp_path, filename="a"), epochs=1, enable_checkpointing=True)
    run.fit(decaying(), data())
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == set(decaying().state_dict())
