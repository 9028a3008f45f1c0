"""The pages of docs/results equal their generator's output; a table shows the runs of a record."""

from __future__ import annotations

import pytest
import results_page

NAMES = sorted(path.stem for path in (results_page.RESULTS / "records").glob("*.csv"))


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_up_to_date(name: str) -> None:
    text = (results_page.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert text == results_page.page(name), f"run python tests/benchmarks/results_page.py {name} --write"


def test_a_table_shows_shares_in_percent_and_only_metrics_that_were_measured() -> None:
    dense = {"method": "dense", "target": "", "seed": "0", "zeros": "0.0", "steps": "7", "val/bits": "2.5", "test/bits": ""}
    sparse = {**dense, "method": "A", "target": "0.9", "zeros": "0.9001", "val/accuracy": "0.1234"}
    assert results_page.table([dense, sparse]).splitlines() == [
        "| method | target, % | seed | zeros, % | steps | val accuracy, % | val bits a byte |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `dense` |  | 0 | 0.00 | 7 |  | 2.5000 |",
        "| `A` | 90 | 0 | 90.01 | 7 | 12.34 | 2.5000 |",
    ]


def test_a_page_holds_the_tables_of_several_records(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(results_page, "HERE", tmp_path)
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    (tmp_path / "records" / "short").mkdir(parents=True)
    (tmp_path / "results_net.md").write_text("{table} and {table short}")
    for folder, zeros in (("records", "0.5"), ("records/short", "0.25")):
        row = f"method,target,seed,zeros,steps\nA,0.9,0,{zeros},7\n"
        (tmp_path / folder / "net.csv").write_text(row)
    first, _, second = results_page.page("net").partition(" and ")
    assert "| 50.00 |" in first
    assert "| 25.00 |" in second
