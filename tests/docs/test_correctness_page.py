"""docs/correctness.md contains every check, with the outcomes in tests/benchmarks/conformance/results.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from subjects import OTHERS, OURS

from lightning_sparse import conformance

DOCS = Path(__file__).resolve().parents[2] / "docs"
STORE = Path(__file__).resolve().parents[1] / "benchmarks" / "conformance" / "results.json"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    text = (DOCS / "correctness.md").read_text()
    table = text.partition("<!-- checks: begin -->")[2].partition("<!-- checks: end -->")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {title: cells for title, *cells in lines}


def test_every_check_has_a_row_and_no_row_is_left_over(rows):
    assert set(rows) - {"check"} == {check.title for check in conformance.CHECKS.values()}
    assert rows["check"] == [*OURS, *OTHERS]


def test_the_cells_are_the_recorded_outcomes(rows):
    kept = json.loads(STORE.read_text())
    marks = {"yes": "pass", "n/a": "n/a", "**no**": "fail"}
    for name, check in conformance.CHECKS.items():
        cells = [marks[re.sub(r" \(\d+\)$", "", cell)] for cell in rows[check.title]]
        assert cells == [kept[name][column][0] for column in rows["check"]], name


def test_no_callback_of_ours_is_recorded_as_failing():
    kept = json.loads(STORE.read_text())
    assert [(name, column) for name, row in kept.items() for column in OURS if row[column][0] == "fail"] == []
