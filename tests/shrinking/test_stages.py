"""Stages within a budget: when they count, when they end, and that an interrupted run does only what is missing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sparse import coupling, load_shrunk
from lightning_sparse.shrinking import Budget, Stages, choose, remove

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))


class Recorded:
    """The three functions of a run: cut by the size of rows, add 0.01 to the weights, and take a metric from the width."""

    def __init__(self, metrics: dict[int, float] | None = None, fail_at: int = 0) -> None:
        self.metrics, self.fail_at = metrics or {}, fail_at
        self.targets: list[int] = []
        self.tuned = 0

    def cut(self, module: nn.Module, target: int) -> Any:
        self.targets.append(target)
        groups = coupling.groups(module, X)
        rows = module[0].weight.abs().sum(1).tolist()
        scores = {group.name: rows[i] for i, group in enumerate(group for group in groups if group.exact)}
        chosen = choose(module, X, groups, scores, target)
        return remove(module, X, groups, chosen) if chosen else None

    def tune(self, module: nn.Module) -> None:
        self.tuned += 1
        if self.tuned == self.fail_at:
            raise KeyboardInterrupt
        with torch.no_grad():
            module[0].weight.add_(0.01)

    def validate(self, module: nn.Module) -> float:
        return self.metrics.get(module[0].out_features, 0.9)

    def stages(self, folder: Path, budget: Budget, **options: Any) -> Stages:
        return Stages(folder, network(), X, budget, cut=self.cut, tune=self.tune, validate=self.validate, **options)


@pytest.mark.slow
def test_a_goal_ends_the_stages(tmp_path: Path) -> None:
    found = Recorded().stages(tmp_path, Budget(max_params=200), step=0.3)
    small = found.run()
    counts = [stage["parameters"] for stage in found.state.stages]
    assert counts[-1] == sum(p.numel() for p in small.parameters()) <= 200 < counts[-2]
    assert all(stage["counts"] for stage in found.state.stages)
    again = load_shrunk(tmp_path / f"stage-{len(counts)}", network())
    torch.testing.assert_close(again(X), small(X))


@pytest.mark.slow
def test_all_goals_must_be_reached(tmp_path: Path) -> None:
    found = Recorded().stages(tmp_path, Budget(max_params=500, max_multiply_adds=0.2), step=0.3)
    found.run()
    last, before = found.state.stages[-1], found.state.stages[-2]
    assert last["multiply_adds"] <= 0.2 * found.state.dense["multiply_adds"] < before["multiply_adds"]
    assert before["parameters"] <= 500  # one goal alone would have ended the run


def test_a_drop_is_tried_again_with_half_of_the_cut(tmp_path: Path) -> None:
    recorded = Recorded({32: 0.85, 48: 0.89})
    found = recorded.stages(tmp_path, Budget(max_drop=2), step=0.5, most=2)
    assert found.run()[0].out_features == 48
    assert [(stage["counts"], round(stage["drop"], 6)) for stage in found.state.stages] == [(False, 5.0), (True, 1.0)]
    whole = found.state.dense["multiply_adds"]
    assert recorded.targets == [whole // 2, whole * 3 // 4]


@pytest.mark.slow
def test_a_metric_that_is_nan_does_not_count(tmp_path: Path) -> None:
    found = Recorded({32: float("nan")}).stages(tmp_path, Budget(max_params=10), step=0.5, most=1)
    assert found.run() is found.dense


@pytest.mark.slow
def test_the_smallest_network_ends_the_run(tmp_path: Path) -> None:
    found = Recorded().stages(tmp_path, Budget(max_params=10), step=0.6)
    assert found.run()[0].out_features == 8  # choose keeps a multiple of 8, at least one
    assert found.state.stages[-1]["smallest"]
    assert found.budget.missed(found.state.last(), found.state.dense) == ["max_params"]


@pytest.mark.slow
def test_an_interrupted_run_does_only_what_is_missing(tmp_path: Path) -> None:
    whole = Recorded().stages(tmp_path / "whole", Budget(max_params=200), step=0.3)
    expected = whole.run()
    total = len(whole.state.stages)
    assert total > 2

    broken = Recorded(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        broken.stages(tmp_path / "parts", Budget(max_params=200), step=0.3).run()
    rest = Recorded()
    resumed = rest.stages(tmp_path / "parts", Budget(max_params=200), step=0.3)
    small = resumed.run()
    assert (broken.tuned, rest.tuned) == (2, total - 1)
    assert resumed.state.stages == whole.state.stages
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), expected.parameters(), strict=True))

    nothing = Recorded()
    nothing.stages(tmp_path / "parts", Budget(max_params=200), step=0.3).run()
    assert nothing.tuned == 0


def test_a_cut_may_train_what_it_gets(tmp_path: Path) -> None:
    class Trains(Recorded):
        def cut(self, module: nn.Module, target: int) -> Any:
            self.tune(module)
            return super().cut(module, target)

    found = Trains({32: 0.5}).stages(tmp_path, Budget(max_drop=1), step=0.5, most=1)
    found.run()
    assert all(torch.equal(a, b) for a, b in zip(found.dense.parameters(), network().parameters(), strict=True))


@pytest.mark.slow
def test_folders_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    Recorded().stages(tmp_path, Budget(max_params=200), step=0.3).run()
    with pytest.raises(ValueError, match="a run with other settings of max_params, step"):
        Recorded().stages(tmp_path, Budget(max_params=100), step=0.2)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state)[:-20])
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        Recorded().stages(tmp_path, Budget(max_params=200), step=0.3)


@pytest.mark.slow
def test_latency_is_measured_where_a_goal_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sparse.export.latency import Timing
    from lightning_sparse.shrinking import stages

    seen: list[tuple[int, int]] = []

    def measured(before: nn.Module, after: nn.Module, inputs: torch.Tensor, budget: float, device: str) -> dict[str, Timing]:
        assert before[0].out_features == 64
        seen.append((after[0].out_features, len(inputs)))
        ratio = 64 / after[0].out_features
        return {"after": Timing(1e-3 / ratio, ratio, ratio, ratio)}

    monkeypatch.setattr(stages, "measure", measured)
    found = Recorded().stages(tmp_path / "a", Budget(speed_up=2.0), step=0.3, timed_inputs=torch.zeros(16, 8))
    found.run()
    ratios = [stage["times_faster"] for stage in found.state.stages]
    assert ratios[-1] >= 2 > ratios[-2]
    assert seen == [(64, 16), *((round(64 / ratio), 16) for ratio in ratios)]
    found = Recorded().stages(tmp_path / "b", Budget(max_latency=0.3), step=0.3)
    found.run()
    times = [stage["milliseconds"] for stage in found.state.stages]
    assert times[-1] <= 0.3 < times[-2]
    seen.clear()
    Recorded().stages(tmp_path / "c", Budget(max_params=200), step=0.3).run()
    assert not seen


@pytest.mark.slow
def test_a_measured_budget(tmp_path: Path) -> None:
    found = Recorded().stages(tmp_path, Budget(speed_up=1e6), step=0.6, most=1)
    found.run()
    (stage,) = found.state.stages
    assert stage["milliseconds"] > 0
    assert stage["times_faster"] > 0
    assert found.budget.missed(stage, found.state.dense) == ["speed_up"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give max_drop, or at least one of"),
        ({"max_drop": -1}, "max_drop must be at least 0"),
        ({"max_drop": float("nan")}, "max_drop must be at least 0"),
        ({"max_params": 0}, "max_params must be a whole number >= 1"),
        ({"max_multiply_adds": 1.5}, r"max_multiply_adds must lie in \(0, 1\)"),
        ({"max_multiply_adds": 50}, r"max_multiply_adds must lie in \(0, 1\), got 50; did you mean 0.5\?"),
        ({"max_latency": 0}, "max_latency must be a finite number > 0"),
        ({"speed_up": 1}, "speed_up must be larger than 1"),
        ({"speed_up": 2, "device": "tpu"}, "'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_bad_budgets_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**given)


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        Budget(speed_up=2, device="cuda")


def test_goals_are_independent_of_each_other() -> None:
    dense = {"parameters": 100, "multiply_adds": 100, "milliseconds": 1.0, "times_faster": 1.0}
    small = {"parameters": 50, "multiply_adds": 40, "milliseconds": 0.5, "times_faster": 2.0}
    passed = {"max_params": 50, "max_multiply_adds": 0.4, "max_latency": 0.5, "speed_up": 2.0}
    failed = {"max_params": 49, "max_multiply_adds": 0.39, "max_latency": 0.49, "speed_up": 2.01}
    for name in itertools.chain(passed):
        assert Budget(**{name: passed[name]}).missed(small, dense) == []
        assert Budget(**passed | {name: failed[name]}).missed(small, dense) == [name]
