"""The comparison of mask and penalty on small networks: its page, its verdicts, and one short run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "benchmarks"))

import exchange_networks as networks  # noqa: E402

DOCS = HERE.parent / "docs" / "exchange"


def test_the_page_is_that_of_the_recorded_runs():
    assert (DOCS / "networks.md").read_text(encoding="utf-8") == networks.page(networks.read(DOCS / "networks.jsonl"))


def test_no_recorded_run_of_the_mask_form_is_near_a_constant_answer():
    rows = [row for row in networks.read(DOCS / "networks.jsonl") if row["form"] == "mask"]
    assert {row["problem"] for row in rows} == {problem.name for problem in networks.PROBLEMS}
    assert all(row["loss"] < 0.5 * row["constant"] for row in rows)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((1.0, 1.0, 0.2, 2.3), "met"),
        ((0.6, 0.5, 0.2, 2.3), "missed: zeros"),
        ((1.6, 1.2, 0.2, 2.3), "missed: zeros, loss"),
        ((1.0, 1.0, 2.2, 2.3), "missed: a constant answer"),
    ],
)
def test_verdicts(found, expected):
    assert networks.verdict(*found) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MLP, squared loss", "GRU"])
def test_the_mask_form_trains_as_the_penalty_does(name):
    problem = next(one for one in networks.PROBLEMS if one.name == name)
    penalty, mask = (networks.run(problem, networks.form(kind), seed=3) for kind in ("penalty", "mask"))
    assert mask["loss"] < 1.25 * penalty["loss"]
    assert mask["loss"] < 0.3 * mask["constant"]
    assert 1 / 1.5 < mask["zeros"] / penalty["zeros"] < 1.5


def test_a_command_that_was_interrupted_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    known = {"problem": "GRU", "form": "dense", "seed": 0}
    path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    networks.train(path, [0], ["GRU"], ["dense"])
    assert networks.read(path) == [known]
