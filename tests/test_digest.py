"""The hash with which ranks compare weights and zeros."""

from __future__ import annotations

import pytest
import torch

from lightning_sparse import _digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_hash_changes_with_every_single_weight_and_zero(dtype):
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
