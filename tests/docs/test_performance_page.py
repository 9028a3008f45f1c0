"""docs/performance.md equals its generator's output; verdicts follow from the rows."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from performance import before_after, options, page, record, rounds, sections, step_cost, tables, time_to_quality
from performance.__main__ import COMMANDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
COMMAND = "python tests/benchmarks/performance page --write docs/performance.md"


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page.page(), f"run {COMMAND}"
    pictures = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert all((PAGE.parent / picture).is_file() for picture in pictures), "run python tests/benchmarks/performance profiles"


def test_a_page_without_records_names_the_commands(tmp_path: Path) -> None:
    text = page.page(tmp_path)
    for name in (*page.NAMES, *page.APART, *page.FURTHER, "profiles"):
        assert f"Not run yet: `{page.command(name)}`." in text
    commands = [shlex.split(line.partition("`")[2].rstrip("`.")) for line in text.splitlines() if line.startswith("Not run yet: ")]
    assert {(PAGE.parent.parent / folder / "__main__.py").is_file() for _, folder, *_ in commands} == {True}
    assert {name for _, _, name, *_ in commands} <= COMMANDS.keys()
    words = [(name, words) for _, _, name, *words in commands if words]
    (moved,) = [given for name, given in words if name == "time_to_quality"]
    assert time_to_quality.options().parse_args(moved).shift == 1
    parsers = {"step_cost": step_cost.options_of(), "peers": options.parser("", "peers"), "before_after": before_after.options_of()}
    chosen = (parsers[name].parse_args(given) for name, given in words if name in parsers and "--nets" in given)
    assert {given.out.stem: given.nets for given in chosen} == {name: [net] for name, (_, net) in page.APART.items()} | {
        key: [net for net in ("lenet", "resnet18") if key.endswith(f"_{net}")] or ["resnet18", "transformer"] for key in page.FURTHER
    } | {"step_cost_lenet_default": ["lenet"]}
    assert "![" not in text


def test_a_record_becomes_a_table_with_verdicts_and_its_command(tmp_path: Path) -> None:
    met = {"arm": "penalty", "value": 0.004, "ratio": 1.04, "low": 1.02, "high": 1.05, "goal": 1.05, "met": True, "floor": "read w"}
    missed = met | {"arm": "mask", "ratio": 2.0, "goal": 1.5, "met": False}
    again = met | {"arm": rounds.AGAIN, "ratio": 1.0, "low": 0.9, "high": 1.05, "goal": None, "met": None}
    command = "python tests/benchmarks/performance step_cost --rounds 9"
    found = {"lenet": {"stray": 0.1, "arms": [met, missed, again], "seconds": {"penalty": [0.004]}}}
    record.write(tmp_path / "step_cost.json", command, {"rounds": 9, "large_values": 10**8}, found)
    lines = page.page(tmp_path).splitlines()
    assert "**LeNet-300-100**" in lines
    assert "| arm | ms | ratio | quartiles | A/A | goal | verdict |" in lines
    assert "| penalty | 4 | 1.04 | 1.02 to 1.05 | 0.1 | 1.05 | met |" in lines
    assert "| mask | 4 | 2 | 1.02 to 1.05 | 0.1 | 1.5 | missed by 0.4 |" in lines
    (made,) = [line for line in lines if line.startswith(f"`{command}`")]
    assert "torch " in made
    assert made.endswith("rounds 9, large values 100,000,000.")


def test_a_network_that_was_measured_by_itself_counts_once(tmp_path: Path) -> None:
    row = {"arm": "penalty", "value": 0.004, "ratio": 1.04, "low": 1.02, "high": 1.05, "goal": 1.05, "met": True}
    both = {net: {"stray": 0.1, "arms": [row | {"value": value}]} for net, value in (("lenet", 0.123), ("transformer", 0.456))}
    record.write(tmp_path / "step_cost.json", "python one", {}, both)
    assert {"123", "456"} <= set(page.page(tmp_path).replace("|", " ").split())
    record.write(tmp_path / "step_cost_lenet.json", "python other", {}, {"lenet": {"stray": 0.1, "arms": [row | {"value": 0.789}]}})
    cells = page.page(tmp_path).replace("|", " ").split()
    assert [cells.count(value) for value in ("123", "456", "789")] == [0, 1, 1]


def test_verdicts_need_a_goal() -> None:
    row = {"ratio": 3.0, "low": 2.9, "high": 3.1, "stray": 0.5, "goal": 2.0, "met": False}
    assert sections.judged(row, sections.stray_of(row, [row]))["verdict"] == "missed by 0.5"
    assert sections.judged(row | {"goal": None, "met": None}, 0.0)["verdict"] is None
    assert sections.stray_of({"ratio": 1.0}, []) is None


def test_lists_of_rows_are_found_wherever_they_lie() -> None:
    results = {"a": {"rows": [{"x": 1}], "times": [1.0, 2.0]}, "b": [{"y": 2}], "none": []}
    assert [*sections.found_in(results)] == [(("a", "rows"), [{"x": 1}]), (("b",), [{"y": 2}])]
    assert [*sections.found_in([{"x": 1}])] == [((), [{"x": 1}])]


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (True, "yes"), (12345, "12,345"), (1234.5, "1234"), (0.12345, "0.123"), ("a|b", "a|b")]
)
def test_cells_are_short(value: object, text: str) -> None:
    assert tables.cell(value) == text


def test_columns_that_hold_nothing_are_left_out() -> None:
    assert tables.markdown([{"a": "x|y", "b_c": None, "d": 1}]) == "| a | d |\n| --- | --- |\n| x\\|y | 1 |"
    assert tables.aligned([{"name": "a", "n": 10}, {"name": "bcd", "n": 2}]) == "name   n\na     10\nbcd    2"
