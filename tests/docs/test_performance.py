"""Arithmetic of the benchmarks on hand-computed values, independent of timings."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from performance import arguments, arms, compared, filled, held, hooks, operators, per_weight, record, rounds, scaling

from lightning_sparse import noise


def test_every_second_round_goes_backwards_and_the_base_stands_in_it_twice() -> None:
    called: list[str] = []
    arms = {name: lambda name=name: float(called.append(name) or len(called)) for name in ("plain", "own", "other")}
    times = rounds.measure(arms, "plain", rounds=3, warm_up=1)
    turns = [called[start : start + 4] for start in range(0, 16, 4)]
    assert turns[1] == turns[3] == ["plain", "own", "plain", "other"]
    assert turns[0] == turns[2] == ["other", "plain", "own", "plain"]
    assert list(times) == ["plain", "own", "other", rounds.AGAIN]
    assert times["plain"] == [5.0, 12.0, 13.0]  # the first in its round, the last, the first
    assert times[rounds.AGAIN] == [7.0, 10.0, 15.0]  # in the middle of the others


def test_a_second_base_given_explicitly_is_used_for_a_a() -> None:
    times = rounds.measure({rounds.AGAIN: lambda: 3.0, "plain": lambda: 1.0, "own": lambda: 2.0}, "plain", rounds=2)
    assert times == {"plain": [1.0] * 2, "own": [2.0] * 2, rounds.AGAIN: [3.0] * 2}


def test_ratios_are_medians_over_rounds_with_quartiles() -> None:
    times = {"plain": [1.0, 2.0, 4.0], "own": [2.0, 2.0, 6.0], rounds.AGAIN: [1.1, 2.0, 3.6]}
    plain, own, again = rounds.ratios(times, "plain", {"own": 1.35})
    assert (own.value, own.low, own.ratio, own.high, own.goal) == (2.0, 1.0, 1.5, 2.0, 1.35)
    assert (plain.ratio, plain.goal) == (1.0, None)
    assert (again.low, again.high) == pytest.approx((0.9, 1.1))


def test_a_goal_is_met_if_ratio_minus_stray_is_below_it() -> None:
    line = rounds.Ratio("own", 1.0, ratio=1.25, low=1.2, high=1.3, goal=1.125)
    assert line.met(0.125)
    assert not line.met(0.12)
    assert rounds.Ratio("own", 1.0, 1.0, 1.0, 1.0).met(0.0) is None
    found = [line, rounds.Ratio(rounds.AGAIN, 1.0, 1.0, low=0.75, high=1.125)]
    assert rounds.stray(found) == 0.25
    assert [row["met"] for row in rounds.lines(found)] == [True, None]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = record.write(tmp_path / "new" / "some.json", "python some.py", {"rounds": 9}, [{"ratio": 1.23456789, "met": True, "n": 10**8}])
    found = record.read("some", file.parent)
    assert found is not None
    assert found["results"] == [{"ratio": 1.23457, "met": True, "n": 10**8}]
    assert (found["command"], found["settings"], found["threads"]) == ("python some.py", {"rounds": 9}, torch.get_num_threads())
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record.read("other", tmp_path) is None


def test_floors_count_each_array_once() -> None:
    assert per_weight.bytes_of("penalty") == 3 * 4  # w, g in; g out
    assert per_weight.bytes_of("prox") == 2 * 4  # w in and out
    assert per_weight.bytes_of("mask") == (2 + 1) * 4 + (3 + 1) * 4  # w, H in, s w out; g, w, s w in, s g out
    assert {name.removesuffix(arms.COMPILED) for name in scaling.FORMS} == set(per_weight.ITEMS)
    assert len(scaling.FORMS) == 2 * len(per_weight.ITEMS)
    assert per_weight.copier(8, iter(range(100)).__next__)() == 1 / (2 * 8 * 4)


def test_the_slope_of_a_line_is_recovered() -> None:
    found = per_weight.line({count: 3e-9 * count + 2e-4 for count in (10**6, 10**7, 10**8)})
    assert (found.slope, found.start) == pytest.approx((3e-9, 2e-4))
    assert found.stray == pytest.approx(0, abs=1e-9)
    assert per_weight.line({10.0: 5.0}) == per_weight.Line(0.5, 0.0, 0.0)
    assert per_weight.line({0.0: 1.0, 1.0: 3.0, 2.0: 2.0}).stray == pytest.approx(0.5)  # 1.5, 2, 2.5 on the line; 3 is 0.5 above 2


def test_a_cost_minus_stray_is_compared_with_its_goal() -> None:
    found = compared.row([3.0, 6.0, 5.0], again=[0.5, -0.25, 0.0], base=("floor", [2.0, 2.0, 2.0]), goal=2.3, of="cost")
    assert (found["cost"], found["floor"]) == (5.0, 2.0)
    assert (found["ratio"], found["low"], found["high"]) == (2.5, 1.5, 3.0)
    assert found["stray"] == 0.25  # of the floor
    assert found["met"]
    assert compared.scaled(found, 1e3, "cost")["cost"] == 5000.0


def test_the_cost_of_a_size_is_what_a_step_takes_beyond_the_plain_one() -> None:
    count, gigabyte = 10**7, 1e-9  # seconds a byte
    times = {"plain": [0.1] * 3, "penalty": [0.1 + 0.36] * 3, rounds.AGAIN: [0.1] * 3, "copy": [gigabyte] * 3}
    row = scaling.size_row("penalty", count, times)
    assert (row["ns_per_weight"], row["floor_ns"], row["ratio"]) == pytest.approx((36.0, 12.0, 3.0))
    assert (row["goal"], row["met"]) == (2.0, False)
    assert scaling.size_row("penalty", 10**6, times)["goal"] is None
    (slope,) = scaling.slopes([row | {"weights": n, "ns_per_weight": 36.0} for n in (10**5, 10**6, 10**7)])
    assert (slope["slope_ns"], slope["ratio"]) == pytest.approx((36.0, 3.0))


def test_the_number_of_tensors_is_held_against_the_first() -> None:
    times = {"plain 1": [1.0] * 2, "plain 50": [2.0] * 2, "again 50": [2.0] * 2, "prox 1": [2.0] * 2, "prox 50": [5.0] * 2}
    row = scaling.tensor_row("prox", 50, 1, times)
    assert (row["ms"], row["ms_in_1"], row["ratio"], row["met"]) == (3000.0, 1000.0, 3.0, False)


def test_steps_are_timed_from_one_batch_to_the_next() -> None:
    module = filled.Filled(50, tensors=3)
    assert (module.count, len(module.layers), module.layers[0].weight.shape) == (48, 3, (4, 4))
    assert filled.seconds(module, (), steps=3, clock=itertools.count(step=2).__next__) == 2
    assert all(float(weight.grad.min()) == pytest.approx(1e-3) for weight in module.parameters())  # type: ignore[union-attr]


def test_hooks_are_timed_one_by_one() -> None:
    callback = Callback()
    spent = hooks.timed(callback, itertools.count().__next__)
    callback.on_fit_start(None, None)  # type: ignore[arg-type]
    callback.on_fit_start(None, None)  # type: ignore[arg-type]
    assert {name: value for name, value in spent.items() if value} == {"on_fit_start": 2}


def test_storages_are_counted_until_they_are_freed() -> None:
    meter = held.Storages()
    with meter.watching():
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        assert meter.take() == (8000, 8000)
        del second
        assert meter.take() == (4000, 8000)
        drawn = noise.random_words(1000, torch.device("cpu"))  # numpy's memory
        assert meter.take()[0] >= 4000
        assert (drawn.view(torch.int16) >= 0).shape == first.shape
        assert meter.take() == (6000, 7000)
    assert held.ENVIRONMENT["MALLOC_MMAP_THRESHOLD_"].isdecimal()


def test_operators_are_compared_with_the_plain_run() -> None:
    own = {"add": operators.Cost(5.0, 1.0), "mm": operators.Cost(8.0, 2.0)}
    assert list(operators.beyond(own, {"mm": operators.Cost(7.0, 2.0)}).items()) == [("add", 5.0), ("mm", 1.0)]
    assert [operators.is_operator(name) for name in ("aten::add", "autograd::engine", "file.py(3): f")] == [True, False, False]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (["penalties/log_sum.py(3): omega", "step.py(320): watched"], "penalties/log_sum.py: omega"),
        (["examples/mlp.py(3): forward", "step.py(320): watched", "methods/base.py(1): progress"], "methods/base.py: progress"),
        (["examples/mlp.py(3): forward", "step.py(320): watched"], None),  # the user's own step, which the package only calls
    ],
)
def test_operators_belong_to_the_innermost_function_that_is_no_part_of_the_users_step(frames: list[str], expected: str | None) -> None:
    event = None
    for frame in reversed(frames):
        event = SimpleNamespace(name=f"site-packages/lightning_sparse/{frame}", cpu_parent=event)
    assert operators.caller(SimpleNamespace(cpu_parent=event)) == expected


def test_arguments_say_what_they_accept() -> None:
    assert arguments.whole(10)("1e7") == 10**7
    for text in ("0", "2.5", "many", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"must be a whole number >= 1, got '{text}'"):
            arguments.whole()(text)
    words = ["performance scaling", "--rounds", "2", "--out", "/some/where/x.json", "--on", "a b", "--root", "/some/data", "--x=/y/z"]
    assert arguments.command(words) == "python tests/benchmarks/performance scaling --rounds 2 --on 'a b' --root data --x=z"
