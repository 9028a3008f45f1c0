"""Rows, files, table and figures of the case study, from made-up runs."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_sparse.reproduction import figures, known, rows, runs, table, written
from lightning_sparse.reproduction.rows import EPOCHS, ROWS
from lightning_sparse.reproduction.runs import FIELDS, Job


def result(recipe: str, seed: int, error: float, share: float, **other: Any) -> dict[str, Any]:
    """Make the content of a result.json."""
    found = {"recipe": recipe, "seed": seed, "epochs": 200, "test_error": error, "val_error": error, "nonzero": share}
    found |= {"nonzero_file": share / 2, "weights": 266_200, "seconds": 90.0, "overrides": "", "versions": "torch 2"}
    return found | other


def recorded(folder: Path, shares: list[float], errors: list[float]) -> Path:
    """Write a trajectory.csv."""
    folder.mkdir(parents=True)
    lines = [
        f"{epoch},{share!r},{share / 2!r},{error!r},0.1,{epoch}.5"
        for epoch, (share, error) in enumerate(zip(shares, errors, strict=True), 1)
    ]
    (folder / "trajectory.csv").write_text("\n".join([",".join(FIELDS), *lines]) + "\n")
    return folder


def test_the_published_figures_agree_with_their_trajectories() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    published = [row for row in ROWS if row.shares]
    assert len(published) == 7
    for row in published:
        assert len(row.shares) == len(row.errors) == len(EPOCHS)
        assert row.nonzero == pytest.approx(100 * row.shares[-1], abs=0.051)  # shares have three digits
        assert row.test_error == pytest.approx(row.errors[-1], abs=0.6)


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    file = recorded(tmp_path / "a", [1.0, 0.5], [3.0, 2.0]) / "trajectory.csv"
    whole = runs.read(file)
    assert [(line["epoch"], line["nonzero"]) for line in whole] == [(1, 1.0), (2, 0.5)]
    file.write_text(file.read_text() + "3,0.25,0.1")
    assert runs.read(file) == whole
    file.write_text(",".join(FIELDS)[:9])
    assert runs.read(file) == []
    assert runs.read(tmp_path / "none.csv") == []


def cells(text: str, title: str) -> dict[str, list[str]]:
    """Return a table row by column title; repeated titles hold two cells."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (row,) = [line for line in lines if line[0].partition(" (")[0] == title]
    found: dict[str, list[str]] = {}
    for head, cell in zip(lines[0], row, strict=True):
        found.setdefault(head, []).append(cell)
    return found


def test_the_table_holds_mean_spread_and_the_distance_to_the_published_figures() -> None:
    made = [result("paper/log_sum", seed, error, share) for seed, (error, share) in enumerate([(2.5, 2.0), (3.0, 2.4), (4.1, 3.1)])]
    text = table.markdown(made)
    row = cells(text, "LogSum")
    assert row["test error %"] == ["3.20 (0.82)"]  # deviations -.7 -.2 .9: sqrt(1.34 / 2)
    assert row["non-zero %"] == ["2.50 (0.56)"]  # deviations -.5 -.1 .6: sqrt(.62 / 2)
    assert row["published"] == ["2.93", "1.90"]
    assert row["difference, points"] == ["+0.27"]
    assert row["difference, relative"] == ["+32 %"]  # 2.5 / 1.9
    assert row["non-zero in the file %"] == ["1.25 (0.28)"]
    assert (row["seeds"], row["epochs"], row["minutes a run"]) == (["0, 1, 2"], ["200"], ["1.5 (0.0)"])
    assert cells(text, "AdaProx")["test error %"] == ["not run yet"]
    assert "lightning-sparse reproduce --rows log_sum --epochs 200 --seeds 0 1 2\n" in text
    assert "1. The published run of eta-Trick" in text


def test_one_seed_has_no_deviation_and_another_length_is_reported() -> None:
    text = table.markdown([result("paper/log_sum", 4, 2.5, 2.0, epochs=20)])
    assert cells(text, "LogSum")["test error %"] == ["2.50"]
    assert "runs of 20 do not compare" in text
    assert "do not compare" not in table.markdown([result("paper/log_sum", 4, 2.5, 2.0)])
    assert cells(table.markdown([]), "LogSum")["published"] == ["2.93", "1.90"]


def test_the_commands_name_what_was_run_with_what() -> None:
    made = [result(row.recipe, 0, 1.0, 1.0) for row in ROWS]
    assert table.commands(made) == ["lightning-sparse reproduce --epochs 200 --seeds 0"]
    made += [result("paper/log_sum", 1, 1.0, 1.0), result("mine.yaml", 0, 1.0, 1.0, overrides="--sparsify.lam 1e-2")]
    assert "lightning-sparse reproduce --rows log_sum --epochs 200 --seeds 0 1" in table.commands(made)
    assert "lightning-sparse reproduce --rows mine.yaml --epochs 200 --seeds 0 --sparsify.lam 1e-2" in table.commands(made)


def test_the_data_folder_is_not_written() -> None:
    assert written.portable(("--data.root", "/some/where", "--model.lr", "1 e", "--data.root=/else")) == "--model.lr '1 e'"


def written_runs(tmp_path: Path) -> Path:
    """Write the files of three runs."""
    jobs = [
        Job(recipe, seed, 3, recorded(tmp_path / f"{rows.key_of(recipe)}{seed}", [1.0, 1 / 3, 0.123456789], [9.0, 4.0, 2.0 + seed]))
        for recipe, seed in (("mine.yaml", 0), ("paper/log_sum", 1), ("paper/log_sum", 0))
    ]
    made = [result(job.recipe, job.seed, 2.0 + job.seed / 3, 1.9, epochs=3) for job in jobs]
    files = written.write(made, jobs, tmp_path / "out")
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    return tmp_path / "out"


def test_the_csvs_hold_every_run_and_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "draw", lambda *_: [])  # because it takes a second
    folder = written_runs(tmp_path)
    found = written.read_runs(folder / "runs.csv")
    assert found == [result(r, s, 2.0 + s / 3, 1.9, epochs=3) for r, s in (("paper/log_sum", 0), ("paper/log_sum", 1), ("mine.yaml", 0))]
    with (folder / "trajectories.csv").open() as text:
        lines = list(csv.DictReader(text))
    assert [line["recipe"] for line in lines] == 6 * ["paper/log_sum"] + 3 * ["mine.yaml"]
    trajectories = written.read_trajectories(folder / "trajectories.csv")
    assert [line["nonzero"] for line in trajectories["paper/log_sum"][1]] == pytest.approx([1, 1 / 3, 0.123456789], rel=1e-7)
    curve = figures.mean_and_band(trajectories["paper/log_sum"], "val_error")
    assert curve[-1].tolist() == [3.0, 2.5, 2.0, 3.0]


@pytest.mark.slow
def test_everything_is_drawn_again_from_the_csvs_alone_and_alike(tmp_path: Path) -> None:
    folder = written_runs(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    drawn = {f"figure{number}.{kind}" for number in (1, 2) for kind in ("png", "pdf")}
    assert before.keys() == {"runs.csv", "trajectories.csv", "table.md"} | drawn
    for name in {"table.md"} | drawn:
        (folder / name).unlink()
    written.redraw(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_recorded_runs_replace_training_and_are_written_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "draw", lambda *_: [])
    folder = written_runs(tmp_path)
    wanted = [("paper/log_sum", 0, 3, ()), ("mine.yaml", 0, 3, ("--data.root", "here")), ("paper/log_sum", 1, 3, ())]
    others = [("paper/log_sum", 2, 3, ()), ("paper/log_sum", 0, 4, ()), ("paper/log_sum", 0, 3, ("--sparsify.lam", "1"))]
    jobs = [Job(recipe, seed, epochs, tmp_path / f"job{i}", words) for i, (recipe, seed, epochs, words) in enumerate(wanted + others)]
    assert known.lay_out(folder, jobs) == 3
    assert [job.result.is_file() for job in jobs] == 3 * [True] + 3 * [False]
    assert jobs[0].epochs_done() == 3
    assert known.lay_out(folder, jobs) == 0
    results = [runs.train(job) for job in jobs[:3]]  # reads the files
    written.write(results, jobs[:3], tmp_path / "again")
    for name in (written.RUNS, written.TRAJECTORIES):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


def test_the_duality_gap_is_recorded_for_the_runs_that_log_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "draw", lambda *_: [])
    jobs = [Job("paper/log_sum", seed, 2, recorded(tmp_path / str(seed), [1.0, 0.5], [3.0, 2.0])) for seed in (0, 1)]
    runs.write(jobs[1].trajectory, [line | {runs.GAP: -0.25} for line in runs.read(jobs[1].trajectory)])
    written.write([result("paper/log_sum", seed, 2.0, 1.0, epochs=2) for seed in (0, 1)], jobs, tmp_path / "out")
    found = written.read_trajectories(tmp_path / "out" / written.TRAJECTORIES)["paper/log_sum"]
    assert [line.get(runs.GAP) for seed in (0, 1) for line in found[seed]] == [None, None, -0.25, -0.25]


def test_runs_of_two_lengths_are_not_one_table(tmp_path: Path) -> None:
    lines = [result("a", 0, 1.0, 1.0), result("b", 0, 1.0, 1.0, epochs=20)]
    with (tmp_path / "runs.csv").open("w") as out:
        writer = csv.DictWriter(out, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    with pytest.raises(ValueError, match=r"mixes runs of \[20, 200\] epochs"):
        written.read_runs(tmp_path / "runs.csv")
    with pytest.raises(ValueError, match="a result for each job"):
        written.write([], [], tmp_path)


def test_figure_1_draws_the_known_values() -> None:
    penalty = {title: (penalty, lam) for title, penalty, lam in figures.CURVES}
    w = [0.01, 0.1, 0.5, 1, 2, 5]
    assert figures.on_weights(*penalty["VarDrop (exact)"], w) == pytest.approx([0.00999, 0.09916, 0.4788, 0.9136, 1.6394, 2.7227], abs=6e-5)
    assert figures.on_weights(*penalty["2 LogSum(2)"], w) == pytest.approx([0.00998, 0.09758, 0.4463, 0.8109, 1.3863, 2.5055], abs=6e-5)
    assert figures.on_weights(*penalty["Standout"], [1.0]) == pytest.approx([1 - 2 / math.e])
    for title in ("hard concrete", r"$\sqrt{2}$ MCP($\sqrt{2}/2$)"):
        assert figures.on_weights(*penalty[title], [5.0]) == pytest.approx([0.5], abs=1e-6)
        assert figures.on_vectors(*penalty[title])[:3] == pytest.approx([0, 0.5, 1.0], abs=1e-6)
    one, spread = figures.penalties().axes
    assert len(one.lines) == 5
    assert list(spread.lines[-1].get_xdata())[1:] == [16, 16]


def test_figure_2_draws_the_published_points_beside_runs_of_their_length_alone() -> None:
    line = dict.fromkeys(FIELDS, 0.5)
    for length, count in ((200, 2), (20, 1)):
        found = {"paper/log_sum": {0: [line | {"epoch": epoch} for epoch in range(1, length + 1)]}}
        shares, errors = figures.trajectories(ROWS, found).axes
        assert len(shares.lines) == len(errors.lines) == count
    assert list(shares.lines[0].get_ydata()) == 20 * [50.0]


def test_figure_2_of_runs_on_all_images_says_that_none_are_held_out(tmp_path: Path) -> None:
    lines = [dict.fromkeys(FIELDS, 0.5) | {"epoch": epoch, "val_error": float("nan")} for epoch in (1, 2)]
    figure = figures.trajectories(ROWS, {"paper/log_sum": {0: lines}})
    shares, errors = figure.axes
    assert "no images held out" in errors.get_title()
    assert (shares.get_title(), shares.get_yscale(), errors.get_yscale()) == ("non-zero weights %", "log", "linear")
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
