"""Measure a shrunk network beside the given one, write its programs, and print the table."""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightning_sparse import export, surgery
from lightning_sparse.cli import formats
from lightning_sparse.cli.failures import in_words
from lightning_sparse.cli.formats import Format
from lightning_sparse.cli.saved import Saved
from lightning_sparse.cli.text import as_flags
from lightning_sparse.export import conversion, latency, program
from lightning_sparse.shrinking import Shrunk

SAMPLES = 64  # example inputs
_INT8 = "dynamic int8"
_SAME = {"parameters": "as given", "multiply-adds of one sample": "as given"}  # of the network in int8


@dataclass(frozen=True)
class Shown:
    """The table that :func:`show` printed: titles of the columns, rows of cells, and the lines below it."""

    titles: list[str]
    rows: list[tuple[str, ...]]
    notes: list[str]


def show(saved: Saved, found: Shrunk[Any], folder: Path, tuned: bool = False, device: str = "cpu") -> Shown:
    """Write ``model.pt2``, measure both networks in evaluation mode, and print the table and how to load the files.

    ``tuned`` is for a network that was fine-tuned: adds a column of dynamic int8 of the given network, and ``model.onnx``, and compares
    no outputs. Latency is measured on ``device``; metrics on the CPU. Both networks keep the mode that they are in.
    """
    with surgery.evaluating(saved.module, found.module):  # a fit leaves its network in training mode
        return _shown(saved, found, folder, tuned, device)


def _shown(saved: Saved, found: Shrunk[Any], folder: Path, tuned: bool, device: str) -> Shown:
    inputs, name = saved.inputs(), type(saved.module).__name__
    load = f"lightning_sparse.load_shrunk({str(folder)!r}, {name})"
    notes = [*map(as_flags, found.report.notes()), f"shrunk: {load}", *_programs(found.module, inputs, folder)]
    with tempfile.TemporaryDirectory() as scratch:
        columns = [formats.dense(saved, Path(scratch)), Format("shrunk", folder / "model.pt", found.module, found.module, load)]
        quantised = (_int8(saved, Path(scratch)) if device == "cpu" else "torch has it for CPUs only") if tuned else None
        if isinstance(quantised, str):
            notes.append(f"no {_INT8}: {quantised}")
        elif quantised is not None:
            columns.append(quantised)
        if device == "cpu":
            times = formats.latencies(columns, inputs)
        else:
            moved = [replace(one, call=conversion.copied(one.tested).to(device)) for one in columns]
            times = formats.latencies(moved, tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs))
        measured = formats.rows(saved, columns, times, program.sized(inputs, SAMPLES))
    counted = found.report.rows()
    rows = [(label, before, f"{after}, {ratio}", *[_SAME.get(label, "")] * (len(columns) - 2)) for label, before, after, ratio in counted]
    rows += [(label, *cells) for label, cells in measured if not (tuned and label.startswith("largest difference"))]
    if not tuned and not any(times[batch]["shrunk"].gains(times[batch][latency.AGAIN]) for batch in times):
        at = f"here at batch {', '.join(map(str, times))}"
        notes.append(found.report.no_gain([one["shrunk"] for one in times.values()], at, "the smaller file is worth it"))
    if tuned:
        notes += [*_safetensors(found.module, folder), *_onnx(found.module, inputs, folder)]
    titles = ["", "given", *(one.title for one in columns[1:])]
    where = formats.threads() if device == "cpu" else device
    table = Table(title=f"measured here, {where}; {latency.MEANING}", title_justify="left")
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200).print(table)
    print("\n".join(notes))
    return Shown(titles, rows, notes)


def _programs(module: torch.nn.Module, inputs: tuple[Any, ...], folder: Path) -> list[str]:
    """Write a program that loads without this package; return a line on how, or on why there is none."""
    path = folder / "model.pt2"
    path.unlink(missing_ok=True)  # because one of an earlier run would not belong to these weights
    try:
        limit = program.save(module, inputs, path).limit
    except Exception as error:  # torch.export may refuse a forward with any error
        return [f"no {path.name}: {in_words(error)[:120]}"]
    load = f"without this package: torch.export.load({str(path)!r}).module()"
    return [load, *([f"{path.name} {limit}"] if limit else [])]


def _safetensors(module: torch.nn.Module, folder: Path) -> list[str]:
    """Write the weights of ``model.pt`` once more as safetensors; return a line on it, or on why there is none."""
    path = folder / "model.safetensors"
    try:
        from safetensors.torch import save_file
    except ImportError:
        return [f"no {path.name}: pip install 'lightning-sparse[export]'"]
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}, path)
    return [f"weights alone: {path}"]


def _onnx(module: torch.nn.Module, inputs: tuple[Any, ...], folder: Path) -> list[str]:
    try:
        export.to_onnx(module, folder / "model.onnx", inputs)
    except Exception as error:  # no extra `export`, or a forward that cannot be exported
        return [f"no model.onnx: {in_words(error)}"]
    return [f"ONNX: {folder / 'model.onnx'}"]


def _int8(saved: Saved, scratch: Path) -> Format | str:
    """Return the column of torch's dynamic int8 on Linear layers, or why there is none."""
    if not any(isinstance(layer, torch.nn.Linear) for layer in saved.module.modules()):
        return "the network has no Linear layer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it moves
        try:
            made = torch.ao.quantization.quantize_dynamic(saved.module, {torch.nn.Linear}, dtype=torch.qint8)
            conversion.leave_fused_paths(made, _has_int8)
            made(*saved.inputs())
            file = scratch / "int8.pt"
            torch.save(made.state_dict(), file)
        except Exception as error:  # an engine that is missing, a forward that reads its weights
            return in_words(error)[:120]
    return Format(_INT8, file, made, made)


def _has_int8(layer: torch.nn.Module) -> bool:
    return any(isinstance(part, torch.ao.nn.quantized.dynamic.Linear) for part in layer.modules())
