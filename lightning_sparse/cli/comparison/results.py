"""Results of a comparison: the table of means over seeds, the CSV of all runs and the frontier picture."""

from __future__ import annotations

import csv
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_sparse import _checks, plots
from lightning_sparse.cli.comparison.runs import Run
from lightning_sparse.cli.errors import UsageError

Record = dict[str, Any]
NO_SPREAD = "one seed: no spread is known"
_LONGEST = 260  # characters of a footnote
_LONGEST_CELL = 200  # of a reason in the table
_VALIDATION = ("val", "valid")


class Cell(NamedTuple):
    """Mean and sample standard deviation over the finished seeds of one method at one setting, and reasons of those that failed."""

    method: str
    setting: float | None
    values: list[float]
    zeros: list[float]
    seconds: list[float]
    failed: list[str]

    @property
    def mean(self) -> float:
        """The mean of the metric; NaN if no seed is finished."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float | None:
        """The sample standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def metric_of(records: Iterable[Record], given: str | None) -> str:
    """Return the metric to compare: the ``given`` one, or a validation metric that the runs logged.

    Raises UsageError, with the logged names, for a metric that no run has, or if there is no validation metric.
    """
    names = list(dict.fromkeys(name for record in records for name in record.get("metrics", {})))
    if given is not None:
        if names and given not in names:
            raise UsageError(f"no run logged {given!r}{_checks.closest(given, names)}; the runs logged {', '.join(names)}")
        return given
    validation = [name for name in names if name.lower().startswith(_VALIDATION)]
    found = [name for name in validation if rises(name)] or validation
    if names and not found:
        raise UsageError(f"the runs logged no validation metric: give --metric, one of {', '.join(names)}")
    return found[0] if found else "metric"


def rises(name: str, mode: str | None = None) -> bool:
    """Return True if larger is better: as ``mode`` ("max" or "min") says, else guessed from the name."""
    return _checks.is_larger_better(name) if mode is None else mode == "max"


def cells(runs: Sequence[Run], records: Sequence[Record], metric: str) -> list[Cell]:
    """Group the runs by method and setting, in order."""
    found: dict[tuple[str, float | None], Cell] = {}
    for run, record in zip(runs, records, strict=True):
        cell = found.setdefault((run.method, run.setting), Cell(run.method, run.setting, [], [], [], []))
        if "failed" in record:
            cell.failed.append(f"seed {run.seed}: {record['failed']}")
        elif metric not in record["metrics"]:
            cell.failed.append(f"seed {run.seed}: logged no {metric}")
        else:
            cell.values.append(record["metrics"][metric])
            cell.zeros.append(record["zeros"])
            cell.seconds.append(record["seconds"])
    return list(found.values())


def best(all_cells: Iterable[Cell], up: bool) -> dict[float | None, list[str]]:
    """Return the methods with the best mean at each setting; several, where the means that the table shows are equal."""
    found: dict[float | None, list[Cell]] = {}
    for cell in all_cells:
        if not math.isnan(cell.mean):
            found.setdefault(cell.setting, []).append(cell)
    first = {setting: (max if up else min)(cell.mean for cell in cells) for setting, cells in found.items()}
    return {setting: [cell.method for cell in cells if _figure(cell.mean) == _figure(first[setting])] for setting, cells in found.items()}


def _figure(mean: float) -> str:
    return f"{mean:.4f}"


def markdown(all_cells: Sequence[Cell], metric: str, setting: str, up: bool) -> str:
    """Return the table: one line for each method and setting; the best at a setting are bold, several where their figures tie.

    Below it, a note where no spread is known.
    """
    winners = best(all_cells, up)
    lines = [f"| method | {setting} | {metric} | zeros % | seconds | seeds |", "|---|---|---|---|---|---|"]
    for cell in all_cells:
        asked = "" if cell.setting is None else f"{cell.setting:g}"
        if not cell.values:
            lines.append(f"| {cell.method} | {asked} | failed: {_flat(cell.failed[0])} | | | 0 of {len(cell.failed)} |")
            continue
        shown = _figure(cell.mean) + ("" if cell.spread is None else f" ({cell.spread:.4f})")
        shown = f"**{shown}**" if cell.method in winners.get(cell.setting, ()) and cell.setting is not None else shown
        zeros, seconds = 100 * statistics.fmean(cell.zeros), statistics.fmean(cell.seconds)
        seeds = f"{len(cell.values)}" + (f" of {len(cell.values) + len(cell.failed)}: {_flat(cell.failed[0])}" if cell.failed else "")
        lines.append(f"| {cell.method} | {asked} | {shown} | {zeros:.2f} | {seconds:.1f} | {seeds} |")
    if any(len(cell.values) == 1 for cell in all_cells) and all(cell.spread is None for cell in all_cells):
        lines += ["", NO_SPREAD]
    return "\n".join(lines)


def footnotes(runs: Sequence[Run], records: Sequence[Record]) -> list[str]:
    """Return the warnings that runs have recorded, one line for those of a method that differ only in their figures, shortened."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for run, record in zip(runs, records, strict=True):
        for text in record.get("warnings", []):
            _, names = found.setdefault((run.method, re.split(r"[\d\[(]", text)[0]), (text, []))
            names.append(run.name)
    return [
        f"{', '.join(names[:3])}{_more(len(names) - 3)}: {textwrap.shorten(text, _LONGEST, placeholder=' ...')}"
        for text, names in found.values()
    ]


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _flat(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= _LONGEST_CELL else f"{flat[:_LONGEST_CELL].rstrip()} ..."


def write_csv(file: Path, runs: Sequence[Run], records: Sequence[Record], setting: str) -> Path:
    """Write one line for each run: its settings, its figures and, if it failed, the reason."""
    names = list(dict.fromkeys(name for record in records for name in record.get("metrics", {})))
    tests = list(dict.fromkeys(name for record in records for name in record.get("test", {})))
    with file.open("w", newline="", encoding="utf-8") as out:
        fields = ["method", setting, "seed", "zeros", "steps", "seconds", *names, *tests, "failed"]
        writer = csv.DictWriter(out, list(dict.fromkeys(fields)), extrasaction="ignore")
        writer.writeheader()
        for run, record in zip(runs, records, strict=True):
            figures = {**record.get("metrics", {}), **record.get("test", {})}
            writer.writerow({"method": run.method, setting: run.setting, "seed": run.seed, **record, **figures})
    return file


def frontier(all_cells: Sequence[Cell], metric: str) -> Any:
    """Plot the metric against the zeros in %, one line for each method, and the dense network as a horizontal line."""
    figure = plots.Picture(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    for cell in (cell for cell in all_cells if cell.setting is None and cell.values):
        axis.axhline(cell.mean, label=cell.method, color="black", linestyle="--", linewidth=1.2)
    methods = dict.fromkeys(cell.method for cell in all_cells if cell.setting is not None)
    for method, marker in zip(methods, "osD^vP*X<>" * len(methods), strict=False):
        own = [cell for cell in all_cells if cell.method == method and cell.values]
        x = [100 * statistics.fmean(cell.zeros) for cell in own]
        axis.errorbar(
            x, [cell.mean for cell in own], yerr=[cell.spread or 0.0 for cell in own], label=method, marker=marker, capsize=3, linewidth=1.6
        )
    axis.set(xlabel="zeros, % of the selected weights", ylabel=metric)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def regularisation_path(runs: Sequence[Run], records: Sequence[Record], metric: str) -> Any:
    """Plot, against lam, the non-zero weights of each parameter in % and, below, the metric."""
    pairs = [(run.setting or 0.0, record) for run, record in zip(runs, records, strict=True) if "failed" not in record]
    figure = plots.Picture(figsize=(7.5, 7), layout="constrained")
    layers, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    lams = [lam for lam, _ in pairs]
    for name in dict.fromkeys(name for _, record in pairs for name in record["by_parameter"]):
        layers.plot(lams, [100 * (1 - record["by_parameter"].get(name, math.nan)) for _, record in pairs], marker="o", label=name)
    layers.plot(lams, [100 * (1 - record["zeros"]) for _, record in pairs], color="black", linestyle="--", label="all selected weights")
    below.plot(lams, [record["metrics"].get(metric, math.nan) for _, record in pairs], marker="o", color="black")
    layers.set(ylabel="non-zero, %", xscale="log", yscale="log")
    below.set(xlabel="lam", ylabel=metric)
    for axis in (layers, below):
        axis.grid(alpha=0.3)
    layers.legend(fontsize="small")
    return figure
