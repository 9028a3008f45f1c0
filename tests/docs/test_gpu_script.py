"""The script for CUDA devices works as far as a CPU can tell, and refuses to pretend."""

from __future__ import annotations

import json
import sys

import gpu
import pytest
import torch


def later():
    return 1e9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_times_the_counted_steps_only():
    for name in ("ReweightedPenalty", gpu.PLAIN):
        watch = gpu.Watch(gpu.SMOKE)
        module = gpu.fit("transformer", gpu.SMOKE, gpu.arms()[name], watch)
        assert len(watch.marks) == gpu.SMOKE.counted + 1
        assert watch.milliseconds() > 0
        assert module.trainer.global_step == module.steps


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore")
def test_wrong_compiled_steps_would_show(monkeypatch):
    (row, *_) = list(gpu.compiled(gpu.SMOKE, later))
    assert row["outcome"] == "equal"
    whole = gpu._weights

    def wrong(form, mode, size):
        before, after = whole(form, None, size)
        return before, {name: w + (0.1 if mode else 0.0) for name, w in after.items()}

    monkeypatch.setattr(gpu, "_weights", wrong)
    assert {row["outcome"] for row in gpu.compiled(gpu.SMOKE, later)} == {"WRONG"}


def test_the_last_interval_is_the_median_of_marks():
    watch = gpu.Watch(gpu.SMOKE)
    watch.marks = [0.0, 0.010, 0.012, 0.014]
    assert watch.milliseconds() == pytest.approx(2.0)


def test_without_a_device_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here; --smoke"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--only", "syncs", "structured", "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert all("CUDA only" in rows[0]["skipped"] for rows in found.values())
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--minutes", "0", "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert {rows[0]["skipped"] for rows in found.values()} == {"no time left of 0 minutes"}
