"""The race: docs/race.md equals its generator's output, interrupted races go on, failures and missing cells are shown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from race import again, one, page, problems, records, run, table
from race.problems import BUDGETS, PROBLEMS, Problem
from race.ways import DENSE, WAYS
from torch import nn

from lightning_sparse.examples.resnet import ResNet

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMAND = "python tests/benchmarks/race page"


def made_up(method: str, error: float, target: float = 0.9, seed: int = 0, **more: Any) -> records.Record:
    found = {"problem": "lenet", "budget": "short", "target": target, "method": method, "seed": seed}
    errors = {"validation_error": error, "test_error": error + 1, "missed": 0, "versions": {"torch": "2"}}
    return found | errors | more


RUNS = [
    made_up(DENSE, 1.0, 0.0),
    made_up("Sparsify", 3.0),
    made_up("Sparsify", 4.0, seed=1),
    made_up("MagnitudePruning", 3.1),
    made_up("MagnitudePruning", 4.3, seed=1),
    made_up("AdaptiveMask", 0.5, seed=1),  # on another number of seeds than Sparsify: not compared
    {**made_up("EtaTrick", 0.0), "error": "ValueError: too bad"},
]


def test_the_page_is_up_to_date() -> None:
    text = (DOCS / "race.md").read_text(encoding="utf-8")
    assert text == page.page(records.read()), f"run {COMMAND}"
    pictures = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures
    assert all((DOCS / picture).is_file() for picture in pictures), f"run {COMMAND}"


def test_a_table_shows_mean_range_and_seeds() -> None:
    lines = table.table(RUNS, "lenet", "short").splitlines()
    assert lines[0] == "| method | 90% zeros | seeds |"
    assert "| dense | 2.00 | 1 |" in lines
    assert "| Sparsify | 4.50 (4.00 to 5.00) | 2 |" in lines
    assert not any("EtaTrick" in line for line in lines)


def test_the_best_is_found_by_validation_on_the_same_seeds() -> None:
    row = table.verdicts(RUNS).splitlines()[-1]
    assert row == "| lenet | short | 90% | Sparsify (3.50) | MagnitudePruning (3.70) | Sparsify (3.50) | 0.00 | 2 |"
    worse = [*RUNS, made_up("pruning, LAMP", 2.0), made_up("pruning, LAMP", 2.0, seed=1)]
    assert "| pruning, LAMP (2.00) | pruning, LAMP (2.00) | Sparsify (3.50) | 1.50 ± 0.50 | 2 |" in table.verdicts(worse)


def test_the_goals_name_the_cells_that_miss_them() -> None:
    won, masks, own = table.goals([*RUNS, made_up("ReweightedPenalty", 0.1, seed=1)]).splitlines()
    assert won.startswith("- 1 of 1 cells: the best dual form")
    assert "0.20 points better" in won
    assert masks.startswith("- 0 of 1 cells (not lenet short 90% (0.40)): AdaptiveMask")
    assert own.startswith("- 1 of 1 cells: Sparsify")
    worse = [*RUNS, made_up("pruning, LAMP", 2.0), made_up("pruning, LAMP", 2.0, seed=1)]
    won, masks, own = table.goals(worse).splitlines()
    assert won.startswith("- 0 of 1 cells (not lenet short 90% (1.50 ± 0.50))")
    assert "-1.50 points better" in won
    assert masks.startswith("- 0 of 0 cells: ")
    assert own.startswith("- 0 of 1 cells (not lenet short 90% (1.50 ± 0.50)): Sparsify")
    easier = [run | {"target": 0.8} for run in RUNS]  # below the goals' range
    assert table.goals(easier).startswith("- 0 of 0 cells")


def test_failures_and_missing_cells_are_on_the_page() -> None:
    text = page.page(RUNS)
    assert "lenet / short / 0.9 / EtaTrick / 0: ValueError: too bad" in text
    assert f"lenet, short: 3 of {5 * (len(WAYS) - 1)} cells have a run, 0 have three seeds" in text
    assert "resnet, long: 0 of" in text
    assert "{{" not in text
    assert "![Error]" not in text  # no picture of a single share
    assert "![Error](race/lenet_short.png)" in page.page([*RUNS, made_up("Sparsify", 3.0, 0.98)])


def test_a_line_that_was_cut_off_is_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    for record in RUNS:
        records.add(record, file)
    with file.open("a") as out:
        out.write(json.dumps(made_up("HardConcrete", 1.0))[:-10])
    assert [records.key(record) for record in records.read(file)] == [records.key(record) for record in RUNS]


def test_a_dense_run_is_planned_once_and_seeds_come_first() -> None:
    planned = run.plan(["lenet"], ["short"], [0.9, 0.98], [DENSE, "Sparsify"], [0, 1])
    assert [(one["method"], one["target"], one["seed"]) for one in planned] == [
        (DENSE, 0.0, 0), ("Sparsify", 0.9, 0), ("Sparsify", 0.98, 0), (DENSE, 0.0, 1), ("Sparsify", 0.9, 1), ("Sparsify", 0.98, 1),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in WAYS if name != "ModelPruning"])
def test_every_way_meets_its_target_to_the_weight_and_is_measured_on_each_part(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    parts = tuple((part, part[:, :3].argmax(1)) for part in x.split(200))
    net = lambda weights: nn.Sequential(nn.Linear(8, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))  # noqa: E731
    monkeypatch.setitem(PROBLEMS, "toy", Problem("toy", lambda folder: parts, net, "adamw", 1e-2, batch=20))  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(BUDGETS, "tiny", 60)
    planned = {"problem": "toy", "budget": "tiny", "target": 0.8, "method": method, "seed": 0}
    record = one.train(planned, Path())
    assert "error" not in record, record
    assert record["missed"] == 0
    assert 0 <= record["validation_error"] < 60
    assert record["zeros"] == (0 if method == DENSE else round(0.8 * 330))
    json.dumps(record)


def test_the_text_s_labels_are_the_next_bytes() -> None:
    for x, y in problems.text(Path()):
        assert torch.equal(x[0, 1:], y[0, :-1])
        assert y[0, -1] == x[1, 0]
    training, validation = problems.text(Path())[:2]
    assert not (training[0][:, None] == validation[0][:20]).all(-1).any()


def test_fine_tuning_starts_from_the_given_weights(tmp_path: Path) -> None:
    given = ResNet(20).layers
    torch.save(given.state_dict(), tmp_path / "weights.th")
    made = PROBLEMS["finetune"].network(tmp_path / "weights.th")
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), made.parameters(), strict=True))
    assert PROBLEMS["finetune"].steps("short") == BUDGETS["short"] // 5
    with pytest.raises(ValueError, match="give --weights FILE"):
        PROBLEMS["finetune"].network(None)


def test_an_exception_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBLEMS, "broken", Problem("broken", lambda folder: [][0], nn.Module, "adamw", 1.0))
    record = one.train({"problem": "broken", "budget": "short", "target": 0.9, "method": "Sparsify", "seed": 0}, Path())
    assert record["error"].startswith("IndexError")


def test_a_network_is_trained_and_then_once_more_for_each_row_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    part = (x, (x[:, 0] > 0).long())

    def net(weights: Path | None) -> nn.Module:
        return nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 2))

    monkeypatch.setitem(PROBLEMS, "toy", Problem("toy", lambda folder: (part, part, part), net, "adamw", 1e-2, batch=20))
    monkeypatch.setitem(BUDGETS, "short", 60)
    given = argparse.Namespace(data=Path(), weights=None, steps=30, rate=0.5, target=0.8, forms=["Sparsify"], freeze=[0.25, 0.5])
    rows = [*again.run(given, "toy", 0, [])]
    assert [row["freeze"] for row in rows] == [0.25, 0.5]
    assert all(row["validation_error"] < 40 for row in rows)
    assert [*again.run(given, "toy", 0, rows[1:])] == rows[:1]
    assert [*again.run(given, "toy", 0, rows)] == []
    assert len([*again.run(given, "toy", 1, rows)]) == 2
    other = {**rows[0], "seed": 1, "validation_error": rows[0]["validation_error"] + 2}
    mean = rows[0]["validation_error"] + 1
    assert again.table([rows[0], other, {**rows[1], "form": "AdaptiveMask"}]).splitlines()[2:] == [
        f"| toy | 30 | 0.5 | 80% | Sparsify | {mean:.2f} |  | 2 |",
        f"| toy | 30 | 0.5 | 80% | AdaptiveMask |  | {rows[1]['validation_error']:.2f} | 1 |",
    ]
