"""One line of a table: error, weights, multiply-adds, bytes, and latency beside the network it was cut from."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_sparse.export import latency
from lightning_sparse.shrinking import Report
from lightning_sparse.shrinking.report import count_multiply_adds

HEAD = ("network", "widths", "test error", "parameters", "multiply-adds", "bytes", "batch 1", "batch 16", "batch 256", "A/A", "difference")


@dataclass(frozen=True)
class Row:
    """Figures of one network. Latencies are times faster than the network before, medians of interleaved rounds in one run."""

    title: str
    widths: str
    error: float
    parameters: int
    multiply_adds: int
    size: int
    faster: dict[int, float]
    again: tuple[float, float]
    difference: float

    @staticmethod
    def of(title: str, model: nn.Module, before: nn.Module, test: tuple[Tensor, Tensor], report: Report | None = None) -> Row:
        """Measure one network on a test set."""
        x, y = test
        model, before = model.eval(), before.eval()
        error = 100 * float((scores(model, x).argmax(1) != y).float().mean())
        faster, again = speeds(model, before, x) if report else ({}, [1.0])
        widths = " ".join(f"{axis} {b}/{a}" for axis, (a, b, _) in report.widths.items()) if report else ""
        count = sum(p.numel() for p in model.parameters())
        difference = report.difference if report else 0.0
        extremes = (min(again), max(again))
        return Row(title, widths, error, count, count_multiply_adds(model, x[:1]), saved_bytes(model), faster, extremes, difference)

    def cells(self) -> list[str]:
        speeds = [f"{self.faster[batch]:.2f}x" if batch in self.faster else "" for batch in (1, 16, 256)]
        again = f"{self.again[0]:.2f} to {self.again[1]:.2f}" if self.faster else ""
        counts = [f"{self.error:.2f} %", f"{self.parameters:,}", f"{self.multiply_adds:,}", f"{self.size:,}"]
        return [self.title, self.widths, *counts, *speeds, again, f"{self.difference:.0e}" if self.faster else ""]


@torch.no_grad()
def scores(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs in batches."""
    return torch.cat([model(part) for part in x.split(500)])


def speeds(model: nn.Module, before: nn.Module, x: Tensor) -> tuple[dict[int, float], list[float]]:
    """Return how many times faster the model is at each batch size, and the same ratios of the network before against itself (A/A)."""
    faster, again = {}, []
    for batch in (1, 16, 256):
        with torch.inference_mode():
            found = latency.measure({"before": partial(before, x[:batch]), "after": partial(model, x[:batch])}, "before", 4.0, (21, 201))
        faster[batch] = found["after"].times_faster
        again.append(found[latency.AGAIN].times_faster)
    return faster, again


def saved_bytes(model: nn.Module) -> int:
    """Return the size of the state dict as ``torch.save`` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(model.state_dict(), path)
        return path.stat().st_size


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "--:|" * (len(HEAD) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])
