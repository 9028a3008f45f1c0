"""The table of callbacks in other programs lists the shortcomings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clients import run as clients

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"


def row(form, **changes):
    known = {"program": "one", "package": "pytorch_lightning", "form": form, "measure": "error", "guess": 0.9, "restores": False}
    known |= {"outcome": "runs", "logged": 0.8, "module": 0.8, "file": 0.8, "loaded": 0.8, "file_differs": [], "loaded_differs": []}
    return known | {"error": 0.1, "error_loaded": 0.1, "share_of_all": 0.9, "steps": 20, "said": []} | changes


DENSE = row("dense", logged=None, module=0.0, file=0.0, loaded=0.0)


def test_the_page_is_up_to_date():
    rows = clients.read(clients.RESULTS / "runs.jsonl")
    versions = json.loads((clients.RESULTS / "versions.json").read_text(encoding="utf-8"))
    remedy = "run python tests/benchmarks/clients --table --write docs/clients.md"
    assert PAGE.read_text(encoding="utf-8") == clients.page(rows, versions), remedy
    assert len({one["program"] for one in rows}) >= 6


def test_a_good_run_has_no_faults():
    assert clients.faults(row("AdaptiveMask, target"), DENSE) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcome": "TypeError: no"}, "stops: TypeError: no"),
        ({"file_differs": ["a.weight"]}, "the file differs from the module in a.weight"),
        ({"loaded_differs": ["a.weight"]}, "the loaded module differs in a.weight"),
        ({"logged": 0.5}, "0.5000 is logged"),
        ({"logged": 0.2, "module": 0.2}, "the target is missed"),
        ({"module": 0.2, "restores": True}, "restored an epoch before the target"),
        ({"error": 0.89}, "no better than a constant answer"),
    ],
)
def test_shortcomings_are_named(changes, said):
    found = row("AdaptiveMask, target", **changes)
    assert clients.faults(found, DENSE) == [said]
    assert said in clients.table([DENSE, found])


def test_a_monitor_that_changes_training_is_named():
    found = row("SparsityMonitor, alone", logged=0.0, module=0.0, error=0.2)
    assert clients.faults(found, DENSE) == ["trains otherwise than without a callback"]


def test_the_summary_counts():
    rows = [DENSE, row("EtaTrick, target", error=0.9), row("HardConcrete, lam", outcome="KeyError: step"), row("AdaptiveProx, lam")]
    assert clients.summary(rows) == (
        "Of 3 runs in 1 programs 1 stopped with an exception, 0 had a file or a loaded module that differs from the module, "
        "1 ended no better than a constant answer, 0 missed the target."
    )


def test_rows_are_read_by_program_setting_and_callback(tmp_path):
    ran = ["two: EtaTrick, lam", "two: dense", "One: SparsityMonitor, alone"]
    ran += ["One: EtaTrick, target", "One: dense", "One: PenaltyLoss, target"]
    rows = [row(form, program=program) for program, form in (one.split(": ") for one in ran)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    assert clients.read(tmp_path / "runs.jsonl") == [rows[i] for i in (4, 5, 3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("only", "forms", "kept"),
    [(None, None, []), (["two"], None, [0]), (None, ["dense"], [2]), (["two"], ["dense"], [0, 2])],
)
def test_repeated_runs_are_removed_from_the_file(tmp_path, only, forms, kept):
    rows = [row("dense", program="One"), row("dense", program="two"), row("EtaTrick, lam", program="two")]
    file = tmp_path / "runs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    clients.forget(file, only, forms)
    assert clients.read(file) == [rows[i] for i in kept]


def test_a_programs_selection_is_shown():
    chosen = [DENSE | {"select": ["*"]}, row("MagnitudePruning, target", select=["*"])]
    assert "20 steps; 90% of the parameters are selected, by `select=['*']`." in clients.table(chosen)
    assert "20 steps; 90% of the parameters are selected." in clients.table([DENSE, row("MagnitudePruning, target")])


def test_programs_whose_process_fails_are_named(tmp_path, monkeypatch):
    ends = {"good": 0, "bad": 1}

    def run(command, **options):
        return subprocess.CompletedProcess(command, ends.get(command[3], 0), stdout="good\nbad\n")

    monkeypatch.setattr(clients.subprocess, "run", run)
    assert clients.train(Path("python"), tmp_path / "runs.jsonl", None, None, 1) == ["bad"]
    assert clients.train(Path("python"), tmp_path / "runs.jsonl", ["good"], None, 1) == []


def test_nothing_is_installed_where_this_project_is(tmp_path):
    with pytest.raises(SystemExit, match="name another folder with --venv"):
        clients.install(Path(sys.prefix))
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(SystemExit, match="name another folder with --venv"):
        clients.install(tmp_path)
