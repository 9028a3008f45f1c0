"""The grid, two-stage runs and records of the exchange benchmark."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET
from exchange import mnist, records, switch
from exchange.grid import MASK, NETS, Arm, arm, grid
from exchange.plan import Planned, arms, everything, plan
from exchange.switch import Switched

from lightning_sparse.cli import main, recipes
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.reproduction import runs
from lightning_sparse.reproduction.runs import FIELDS, Job

pytestmark = QUIET
SHORT = ("--trainer.check_val_every_n_epoch", "1", "--report.dense_twin", "false", "--model.sizes", "[64,20,10]")


def test_the_grid_is_what_was_asked_for() -> None:
    lenet = [made for made in grid() if made.net == "lenet_300_100" and made.penalty]
    assert len(lenet) == 2 * 3  # penalties, forms
    assert all(len(made.strengths) == (1 if made.calibrated == "no" else 5) for made in lenet)
    assert arm("lenet_300_100", "mcp", "mask_uncalibrated").strengths == (5e-4,)
    assert arm("vit", "logsum", "mask_uncalibrated").strengths == NETS["vit"].lams
    assert arm("lenet_300_100", "logsum", "mask").strengths == (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
    assert arm("lenet_300_100", "mcp", "penalty").strengths == (5e-5, 1.5e-4, 5e-4, 1e-3, 2e-3)
    assert {made.net for made in grid() if made.form == "MagnitudePruning"} == set(NETS)
    for net in NETS.values():
        assert recipes.content(recipes.find(net.recipe))["trainer"]["max_epochs"] == net.epochs


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    made = plan(everything(), [0, 1], tmp_path, ("--data.root", "data"))
    assert len({run.job.folder for run in made}) == len(made) == len({(run.job.recipe, run.job.seed, commanded(run.job)) for run in made})
    assert made[0].job.folder.name == "lenet_300_100-logsum-penalty-0.0001-60-seed0"
    switched = next(run.job for run in made if isinstance(run.job, Switched) and run.job.switch == 20)
    assert switched.before.overrides == (*MASK, "--sparsify.lam.lam", "0.0003", "--data.root", "data")
    assert (switched.before.epochs, switched.before.until) == (60, 20)


def commanded(job: Job) -> tuple[str, ...]:
    return (*job.overrides, *((*job.first, str(job.switch)) if isinstance(job, Switched) else ()))


@pytest.mark.slow
@pytest.mark.parametrize("made", everything(), ids=lambda made: made.name)
def test_every_arms_words_are_understood(made: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    strength = (made.strength, f"{made.strengths[-1]:g}")
    for words in (made.words, made.first) if made.first else (made.words,):
        assert main(["check", NETS[made.net].recipe, *words, *strength]) == 0
        said = capsys.readouterr().out
        assert (made.form in said) or (made.first and said)
        assert f"{made.strengths[-1]:g}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "lenet_300/*"], "no arm is named lenet_300/*; the arms are lenet_300_100/logsum/penalty"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--seeds", "-1"], "--seeds must be whole numbers >= 0"),
        (["--strengths", "0"], "--strengths must be > 0"),
        (["--known", "nowhere"], "--known must name a folder with the runs.csv"),
        (["--finished"], "no run in runs/exchange is finished"),
    ],
)
def test_invalid_input_fails_before_anything_is_written(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        mnist.run(*mnist.parser().parse_known_args(words))
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_chosen_runs_are_listed_and_a_folder_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--list", "--arms", "vit/*/mask", "lenet_5/pruning", "--seeds", "3"]
    mnist.run(*mnist.parser().parse_known_args(words))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 runs, 4 of them and 48 epochs to go, 2 at once"
    assert lines[1:3] == ["  0/12 lenet_5-pruning-0.9-12-seed3", "  0/12 lenet_5-pruning-0.95-12-seed3"]
    (made,) = plan(arms(["vit/*/mask"], []), [0], tmp_path, ())
    made.announce()
    made.announce()
    other = replace(made, arm=replace(made.arm, variant="another"))
    with pytest.raises(UsageError, match="holds a run of"):
        other.announce()


def done(planned: Planned, gap: bool) -> None:
    """Write the files of a finished run."""
    planned.announce()
    line = dict.fromkeys(FIELDS, 0.25) | ({"duality_gap": -0.125} if gap else {})
    runs.write(planned.job.trajectory, [line | {"epoch": epoch} for epoch in (1.0, 2.0)])
    job = planned.job
    found: dict[str, Any] = {"recipe": job.recipe, "seed": job.seed, "epochs": job.epochs, "test_error": 1.5, "val_error": 2.0}
    found |= {"nonzero": 3.0, "nonzero_file": 2.5, "weights": 266_200, "seconds": 9.0, "versions": "torch 2, lightning 2"}
    job.result.write_text(json.dumps(found | {"overrides": " ".join(job.overrides)}))


def test_records_are_laid_out_as_the_runs_that_they_are_of(tmp_path: Path) -> None:
    common = ("--data.root", str(tmp_path))
    chosen = [*arms(["lenet_300_100/*/mask", "vit/pruning"], []), *arms(["*0.33"], ["switch"])]
    made = plan(chosen, [0], tmp_path / "a", common)
    for planned in made:
        done(planned, gap=planned.arm.form != "MagnitudePruning")
    (tmp_path / "a" / "unfinished").mkdir()
    files = records.write(tmp_path / "a")
    found, epochs = records.recorded(tmp_path / "a")
    assert len(found) == len(epochs) == 5 + 5 + 3 + 2
    by_arm = {run["arm"]: run for run in found}
    assert by_arm["vit/pruning"]["lam"] == 0.8
    assert by_arm["study/switch/0.33"]["first"].startswith("20 epochs of --sparsify AdaptiveMask")
    assert str(tmp_path) not in files[0].read_text()
    assert "duality_gap" not in epochs[by_arm["vit/pruning"]["run"]][0]
    assert epochs[by_arm["study/switch/0.33"]["run"]][1]["duality_gap"] == -0.125
    assert records.lay_out(tmp_path / "a", tmp_path / "b") == 15
    assert records.lay_out(tmp_path / "a", tmp_path / "b") == 0
    again = records.write(tmp_path / "b")
    assert [file.read_text() for file in again] == [file.read_text() for file in files]
    for planned in plan(chosen, [0], tmp_path / "b", common):
        planned.announce()
        assert planned.job.epochs_done() == 2
        assert switch.train(planned.job)["test_error"] == 1.5


def test_networks_may_have_lengths_of_their_own_but_not_two(tmp_path: Path) -> None:
    for epochs in (None, 2):
        for planned in plan(arms(["vit/pruning"], []), [0], tmp_path, (), epochs, [0.5]):
            done(planned, gap=False)
    records.write(tmp_path)
    with pytest.raises(ValueError, match=r"mixes runs of \[2, 12\] epochs of vit"):
        records.read_runs(tmp_path / "runs.csv")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resuming at step")
def test_a_switched_run_is_the_mask_form_and_then_the_penalty_form(tmp_path: Path) -> None:
    mask, other = (*SHORT, "--sparsify", "AdaptiveMask", "--sparsify.gap_samples", "2"), (*SHORT, "--sparsify.gap_samples", "2")
    whole, plain = (Job("digits", 0, 4, tmp_path / name, words) for name, words in (("mask", mask), ("penalty", other)))
    switched = Switched("digits", 0, 4, tmp_path / "switched", other, first=mask, switch=2)
    found = [switch.train(job) for job in (whole, plain, switched)]
    assert float(torch.full((4,), 1e-40).mul(1.0).sum()) > 0  # this process's settings are unchanged
    lines = [[{**line, "seconds": 0.0} for line in runs.read(job.trajectory)] for job in (whole, plain, switched)]
    assert [line["epoch"] for line in lines[2]] == [1, 2, 3, 4]
    assert lines[2][:2] == lines[0][:2]
    assert all("duality_gap" in line for line in lines[2])
    assert not {json.dumps(line) for line in lines[2][2:]} & {json.dumps(line) for line in (*lines[0], *lines[1])}
    assert found[2]["overrides"] == " ".join(other)
    assert switched.epochs_done() == 4
    config = (tmp_path / "switched" / "config.yaml").read_text()
    assert "ReweightedPenalty" in config
    assert "AdaptiveMask" not in config
    assert "AdaptiveMask" in (tmp_path / "switched" / "first" / "config.yaml").read_text()


def test_a_gap_column_comes_and_goes_with_what_is_logged(tmp_path: Path) -> None:
    recorder = runs.Recorder(tmp_path / "trajectory.csv")
    line = dict.fromkeys(FIELDS, 0.5)
    runs.write(recorder.file, [])
    for epoch, gap in enumerate(({}, {"duality_gap": -1.5}, {}), 1):
        recorder._append(line | {"epoch": epoch} | gap)
        assert len(runs.read(recorder.file)) == epoch
    assert [found.get("duality_gap") for found in runs.read(recorder.file)] == [None, -1.5, None]
    assert runs.columns([line]) == list(FIELDS)
