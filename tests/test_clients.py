"""The table of the callbacks inside other programs says what fell short."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

import clients

PAGE = Path(__file__).resolve().parent.parent / "docs" / "clients.md"


def row(form, **changes):
    known = {"program": "one", "package": "pytorch_lightning", "form": form, "measure": "error", "guess": 0.9, "restores": False}
    known |= {"outcome": "runs", "logged": 0.8, "module": 0.8, "file": 0.8, "loaded": 0.8, "file_differs": [], "loaded_differs": []}
    return known | {"error": 0.1, "error_loaded": 0.1, "share_of_all": 0.9, "steps": 20, "said": []} | changes


DENSE = row("dense", logged=None, module=0.0, file=0.0, loaded=0.0)


def test_the_page_is_up_to_date():
    rows = clients.read(clients.RESULTS / "runs.jsonl")
    versions = json.loads((clients.RESULTS / "versions.json").read_text(encoding="utf-8"))
    remedy = "run python tests/benchmarks/clients.py --table --write docs/clients.md"
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
def test_what_falls_short_is_named(changes, said):
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


def test_nothing_is_installed_where_this_project_is(tmp_path):
    with pytest.raises(SystemExit, match="name another folder with --venv"):
        clients.install(Path(sys.prefix))
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(SystemExit, match="name another folder with --venv"):
        clients.install(tmp_path)
