"""docs/export.md comes from its records, and its sentences about goals follow the figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import exported
import pytest
import torch
from torch import nn

from lightning_sparse.export import latency

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def record():
    return json.loads(exported.RECORDS.read_text(encoding="utf-8"))


def test_the_page_is_up_to_date(record):
    remedy = "run python tests/benchmarks/exported.py --only --write docs/export.md"
    assert (ROOT / "docs" / "export.md").read_text(encoding="utf-8") == exported.page(record), remedy


def test_the_verdict_follows_the_figures(record):
    rows = copy.deepcopy(record["results"]["lenet"])
    (row,) = [row for row in rows if row["target"] == 0.98]
    for times, word in ((1.99, "missed"), (2.0, "met")):
        row["latency"]["256"]["csr"] = [1.0, times, times, times]
        assert f"all layers in CSR {times:.1f} ({times:.1f} to {times:.1f}), {word}" in exported.verdict(rows)


def test_each_format_gives_the_networks_outputs(record):
    for row in record["results"]["lenet"]:
        assert abs(row["zeros"] - row["target"]) < 1e-3
        for title, difference in row["difference"].items():
            assert difference < (1e-3 if "fp16" in title else 1e-5), title
        assert row["bytes"]["compact"][0] < row["bytes"]["dense"][0] / 10
    assert all(row["difference"] < 1e-5 for part in ("linear", "encoder") for row in record["results"][part])


def test_the_readme_quotes_the_record(record):
    (row,) = [row for row in record["results"]["lenet"] if row["target"] == 0.98]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    whole, small = (row["bytes"][title][0] for title in ("dense", "compact"))
    assert f"{exported.faster(row['latency']['256']['csr'])} times faster" in text
    assert f"{whole / small:.1f} times smaller" in text


@pytest.mark.parametrize("blocks", [1, 4])
def test_zeros_are_made_where_weights_are_small(blocks):
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    before = layer.weight.detach().clone()
    exported.zero_(layer, 0.75, blocks)
    zeros = layer.weight == 0
    assert zeros.float().mean() == 0.75
    assert torch.equal(layer.weight[~zeros], before[~zeros])
    if blocks == 1:
        assert before[zeros].abs().max() < before[~zeros].abs().min()
    else:
        assert all(part.all() or not part.any() for part in zeros.unflatten(0, (4, 4)).unflatten(2, (4, 4)).transpose(1, 2).reshape(16, 16))


def test_arms_are_timed_beside_the_dense_one(monkeypatch):
    monkeypatch.setattr(latency, "_seconds", lambda call, *_: call())
    found = exported.timed({"dense": lambda: 0.004, "other": lambda: 0.001}, 0.01)
    assert found["other"] == [1.0, 4.0, 4.0, 4.0]
    assert found[latency.AGAIN][1:] == [1.0, 1.0, 1.0]
