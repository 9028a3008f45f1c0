"""Operations and bytes of a trained multilayer perceptron with single zeros, counted as in the RigL paper (arXiv 1911.11134, table 2).

Inputs and neurons without weights go first, until none is left: those that nothing reads, and those that read nothing. Then a non-zero
weight takes two operations and four bytes, a bias four bytes, and the positions of the non-zero weights one bit for each place of the
remaining matrices. Beside it: the file of ``export.save_compact`` of the same matrices and biases.

    python tests/benchmarks/shrunk sizes CHECKPOINT.ckpt
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_sparse import export


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="+", type=Path)


def live(matrices: list[Tensor]) -> list[Tensor]:
    """Return which inputs, neurons of each layer and outputs have weights on both sides; all outputs count."""
    parts = [torch.ones(matrices[0].shape[1], dtype=torch.bool), *(torch.ones(len(w), dtype=torch.bool) for w in matrices)]
    while True:
        before = sum(int(part.sum()) for part in parts)
        for index, w in enumerate(matrices):
            there = (w != 0) & parts[index + 1][:, None] & parts[index]
            parts[index] &= there.any(0)
            if index + 1 < len(matrices):
                parts[index + 1] &= there.any(1)
        if sum(int(part.sum()) for part in parts) == before:
            return parts


def bytes_of(weights: int, biases: int, places: int) -> int:
    """Return the bytes of this many non-zero weights in matrices of so many places, and of the biases."""
    return 4 * weights + 4 * biases + -(-places // 8)


def lines(args: argparse.Namespace) -> Iterator[str]:
    yield "| checkpoint | inputs and neurons | non-zero weights | KFLOPs | bytes | compact file |"
    yield "|---|---|--:|--:|--:|--:|"
    for path in args.checkpoint:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        matrices = [w for w in state.values() if w.dim() == 2]
        parts = live(matrices)
        cut = [w[above][:, below] for w, below, above in zip(matrices, parts, parts[1:], strict=False)]
        biases = [b[part] for b, part in zip((b for b in state.values() if b.dim() == 1), parts[1:], strict=True)]
        count = sum(int((w != 0).sum()) for w in cut)
        size = bytes_of(count, sum(b.numel() for b in biases), sum(w.numel() for w in cut))
        with tempfile.TemporaryDirectory() as folder:
            named = {f"{kind}.{i}": t.clone() for kind, many in (("weight", cut), ("bias", biases)) for i, t in enumerate(many)}
            file = export.save_compact(named, Path(folder) / "net.safetensors").stat().st_size
        widths = "-".join(str(int(part.sum())) for part in parts[:-1])
        yield f"| {path.name} | {widths} | {count:,} | {2 * count / 1000:.1f} | {size:,} | {file:,} |"
