"""What the ranks' agreement is made of, in one process: the hash of weights and zeros, and the shared curvature."""

from __future__ import annotations

import threading

import pytest
import torch

from lightning_sparse import _digest
from lightning_sparse.curvature import EmpiricalFisher


def test_curvature_is_the_mean_over_the_ranks_that_saw_the_layer():
    meeting, shared, results = threading.Barrier(2), [None, None], [None, None]
    parameters = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    seen = [{"a": torch.tensor([1.0, 3.0])}, {"b": torch.ones(3), "a": torch.tensor([3.0, 5.0])}]

    def run(rank):
        def reduce(value):
            shared[rank] = value.clone()
            meeting.wait(10)
            mean = (shared[0] + shared[1]) / 2
            meeting.wait(10)
            return mean

        fisher = EmpiricalFisher(every=1)
        fisher.begin(0, 1)
        fisher._pending = dict(seen[rank])
        fisher.end(reduce, parameters)
        results[rank] = {name: fisher.estimate(name) for name in parameters}

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    for result in results:
        torch.testing.assert_close(result["a"], torch.tensor([2.0, 4.0]))
        torch.testing.assert_close(result["b"], torch.ones(3))
        assert result["c"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_hash_tells_every_single_weight_and_zero_apart(dtype):
    w = torch.randn(5, 3, dtype=torch.float64).to(dtype)
    zeros = w.abs() < 0.3
    found = {int(_digest.digest(w, zeros))}
    for place in range(w.numel()):
        for part, value in ((w, -w.view(-1)[place]), (zeros, ~zeros.view(-1)[place])):
            changed = part.clone()
            changed.view(-1)[place] = value
            found.add(int(_digest.digest(changed, zeros) if part is w else _digest.digest(w, changed)))
    assert len(found) == 1 + 2 * w.numel()
    assert int(_digest.digest(w.clone(), zeros.clone())) in found


def test_a_hash_does_not_depend_on_its_chunks(monkeypatch):
    w = torch.randn(1000)
    whole = int(_digest.digest(w, w < 0))
    monkeypatch.setattr(_digest, "_CHUNK", 7)
    assert int(_digest.digest(w, w < 0)) == whole
