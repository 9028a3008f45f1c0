"""Table of figures that ``fit`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_sparse import counts


@dataclass(frozen=True)
class Trained:
    """Figures of one trained network, from its checkpoint: test metrics, and {name: (zeros, size)} of the selected weights.

    ``beside`` names those of them that are biases and norms in the groups of the others.
    """

    file: Path
    metrics: dict[str, float]
    zeros: counts.Counts
    seconds: float
    beside: tuple[str, ...] = ()

    @property
    def nonzero(self) -> int:
        return sum(size - zeros for zeros, size in self.zeros.values())

    @property
    def size(self) -> int:
        return sum(size for _, size in self.zeros.values())


@dataclass(frozen=True)
class Result:
    """Figures of the table; ``dense`` is None without ``dense_twin``."""

    sparse: Trained
    dense: Trained | None
    files: dict[str, Path] = field(default_factory=dict)


def show(result: Result) -> None:
    """Print the table and the paths of the files."""
    networks = {"dense twin": result.dense, "sparse": result.sparse}
    columns = {title: trained for title, trained in networks.items() if trained is not None}
    table = Table(title="counted and tested from the checkpoint files", title_justify="left")
    table.add_column("")
    for title in columns:
        table.add_column(title, justify="right")
    for label, cells in rows(list(columns.values())):
        table.add_row(label, *cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for label, path in result.files.items():
        print(f"{label + ':':17} {path}")


def rows(columns: list[Trained]) -> list[tuple[str, list[str]]]:
    """Return rows (label, one cell per network): test metrics, non-zero weights per layer and in total, compression, time."""
    names = list(dict.fromkeys(name for column in columns for name in column.metrics))
    metrics = [(name, [f"{column.metrics[name]:.4f}" for column in columns]) for name in names]
    beside = columns[0].beside
    layers = [(f"non-zero {name}", [_count(*c.zeros[name]) for c in columns]) for name in columns[0].zeros if name not in beside]
    rest = [[sum(column.zeros[name][i] for name in beside) for i in (0, 1)] for column in columns]
    layers += [("non-zero biases and norms in their groups", [_count(zeros, size) for zeros, size in rest])] if beside else []
    total = [_count(column.size - column.nonzero, column.size) for column in columns]
    return [
        *metrics,
        *layers,
        ("non-zero, total", total),
        ("zeros", [f"{100 * (1 - column.nonzero / column.size):.2f} %" for column in columns]),
        ("compression (weights / non-zero)", [_ratio(column) for column in columns]),
        ("training seconds", [f"{column.seconds:.1f}" for column in columns]),
    ]


def _count(zeros: int, size: int) -> str:
    return f"{size - zeros} of {size}"


def _ratio(column: Trained) -> str:
    return f"{column.size / column.nonzero:.1f}x" if column.nonzero else "all zero"
