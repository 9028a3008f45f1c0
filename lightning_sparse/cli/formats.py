"""What an export is worth: size, latency beside dense in one run, test metrics and difference of outputs, each measured."""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_sparse import export, surgery
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.saved import Saved
from lightning_sparse.cli.text import as_flags
from lightning_sparse.export import conversion, latency, onnx_file, program
from lightning_sparse.export.program import relative_difference, sized

BATCHES = (1, 32, 256)
DENSE = "dense"
_NAMED = 4  # sparse layers that a note names
_WIDTH = 160  # characters, where the output is a file


@dataclass(frozen=True)
class Format:
    """One column of the table.

    Args:
        title: its name.
        file: the file that was written, or None.
        call: the function that is timed; None if it is the dense network's.
        tested: a module whose ``test_step`` uses this format.
        load: a line of Python that loads the file.
        notes: what a user should know.
        batch: the only batch size that ``call`` takes; None if it takes any.
    """

    title: str
    file: Path | None
    call: Callable[..., Any] | None
    tested: Any
    load: str = ""
    notes: list[str] = field(default_factory=list)
    batch: int | None = None


def dense(saved: Saved, folder: Path) -> Format:
    """Return the column of the dense network: its weights as ``torch.save`` writes them."""
    file = folder / "dense.pt"
    torch.save(saved.module.state_dict(), file)
    return Format(DENSE, file, saved.module, saved.module)


def sparse(saved: Saved, layout: str, batch_size: int, path: Path | None, fixed_batch: bool = False) -> Format | str:
    """Return the column of sparse layers, or why there is none; write them as a program of torch.export, unless ``path`` is None.

    With ``fixed_batch`` the program is for ``batch_size`` alone.
    """
    try:
        rows = rows_of_a_sample(saved.module, saved.inputs()) if layout == "auto" else 1
        found = export.plan(saved.module, layout, batch_size * rows)
        module = conversion.replaced(saved.module, found, layout)
    except ValueError as error:
        raise UsageError(str(error)) from error
    layers = export.sparse_layers(module)
    if not layers:
        why = conversion.describe_dense(saved.module, found)
        return f"{layout}: no layer of this network would be faster at batch {batch_size} here: {why}"
    taken = ", ".join(f"{name} ({layer.layout})" for name, layer in list(layers.items())[:_NAMED])
    more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
    notes = [f"{layout}: {len(layers)} sparse layer{'s' * (len(layers) > 1)}: {taken}{more}"]
    if left := conversion.describe_dense(saved.module, found):
        notes.append(f"{layout}: dense stay {left}")
    load = ""
    if path is not None:
        try:
            limit = program.save(module, sized(saved.inputs(), batch_size), path, fixed_batch).limit
            load = f'import torch, lightning_sparse.export; net = torch.export.load("{path}").module()'
            if limit:
                load, notes = f"{load}  # {limit.partition(',')[0].partition(' (')[0]}", [*notes, f"{layout}: {path.name} {limit}"]
        except Exception as error:  # torch.export has many classes of errors
            path.unlink(missing_ok=True)
            notes.append(
                f"no file, because torch.export cannot trace the network ({' '.join(str(error).split())[:150]}): use to_sparse in Python"
            )
            path = None
    return Format(layout, path, module, module, load, notes)


def rows_of_a_sample(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return the most rows that one sample gives a Linear layer: the length of a sequence in a transformer, 1 where no layer was called."""
    most = [0]

    def count(layer: nn.Module, given: tuple[Any, ...]) -> None:
        most.extend(x.numel() // x.shape[-1] for x in given[:1] if isinstance(x, Tensor) and x.numel())

    hooks = [layer.register_forward_pre_hook(count) for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        with torch.inference_mode():
            call(module, inputs)()
    finally:
        for hook in hooks:
            hook.remove()
    return max(max(most) // max(program.batch_size(inputs), 1), 1)


def onnx(saved: Saved, path: Path, fixed: int | None = None) -> Format:
    """Return the column of the ONNX file, run by ONNX Runtime; ``fixed`` is the only batch size that it takes."""
    try:
        export.to_onnx(saved.module, path, sized(saved.inputs(), fixed or 2), dynamic_batch=fixed is None)
    except (ValueError, ImportError) as error:
        raise UsageError(as_flags(str(error))) from error
    running = onnx_file.session(path)
    tested = conversion.copied(saved.module)
    used: list[int] = []

    def forward(*inputs: Any) -> Any:
        used.append(1)
        return running(*inputs)

    tested.forward = forward  # type: ignore[method-assign]
    tested.forward_calls = used  # type: ignore[assignment]
    load = f'import onnxruntime; net = onnxruntime.InferenceSession("{path}")'
    notes = ["onnx: what is gained is ONNX Runtime's own, because it does not use zeros in dense matrices"]
    if fixed is not None:
        load, notes = f"{load}  # takes batches of {fixed} only", [*notes, f"onnx: {path.name} takes batches of {fixed} only, as asked for"]
    return Format("onnx", path, running, tested, load, notes, fixed)


def compact(saved: Saved, path: Path, dtype: str | None) -> Format:
    """Return the column of the compact file; in memory the network is the dense one."""
    try:
        export.save_compact(saved.module, path, dtype)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    loaded = conversion.copied(saved.module)
    loaded.load_state_dict(export.load_compact(path))
    load = f'from lightning_sparse.export import load_compact; module.load_state_dict(load_compact("{path}"))'
    return Format("compact" if dtype is None else f"compact {dtype}", path, None, loaded, load)


def semi_structured(saved: Saved) -> Format:
    """Return the column of 2:4 layers, which torch makes when the network is loaded; no file is written. The module must be on CUDA."""
    try:
        module = export.semi_structured(saved.module)
    except ValueError as error:
        raise UsageError(str(error)) from error
    load = "from lightning_sparse.export import semi_structured; net = semi_structured(module.cuda().bfloat16())"
    return Format("2:4", None, module, module, load)


def latencies(
    formats: Sequence[Format], inputs: tuple[Any, ...], budget: float = 1.0, batches: Sequence[int] = BATCHES
) -> dict[int, dict[str, latency.Timing]]:
    """Time the formats against the dense one, in interleaved rounds in evaluation mode, at these batch sizes."""
    found = {}
    modules = [one.call for one in formats if isinstance(one.call, nn.Module)]
    for batch in batches:
        given = sized(inputs, batch)
        arms = {one.title: call(one.call, given) for one in formats if one.call is not None}
        with surgery.evaluating(*modules), torch.inference_mode():
            try:
                found[batch] = latency.measure(arms, DENSE, budget, clock=time.perf_counter if _first(inputs).is_cuda else None)
            except Exception as error:
                shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
                raise UsageError(f"the network fails for inputs of the shapes {shapes}: {' '.join(str(error).split())[:200]}") from error
    return found


def call(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """Return the function without arguments that runs ``function`` on these inputs, and waits for the device if they are on CUDA."""
    if not _first(inputs).is_cuda:
        return lambda: function(*inputs)

    def waiting() -> Any:
        result = function(*inputs)
        torch.cuda.synchronize()
        return result

    return waiting


def sizes(file: Path | None) -> tuple[int, int] | None:
    """Return the bytes of a file as it is and gzipped."""
    if file is None:
        return None
    with tempfile.TemporaryFile() as packed, file.open("rb") as plain, gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6) as into:
        shutil.copyfileobj(plain, into)
        into.close()
        return file.stat().st_size, packed.tell()


def metrics(saved: Saved, one: Format) -> dict[str, float]:
    """Return the test metrics of a format; empty where the test step does not use it."""
    found = {} if one.batch else saved.test(one.tested)  # because the batches of the data have other sizes
    return {} if getattr(one.tested, "forward_calls", None) == [] else found


def difference(saved: Saved, one: Format, inputs: tuple[Any, ...]) -> float:
    """Return the largest difference of the outputs from the dense network's in evaluation mode, relative to the largest output."""
    function = one.call or one.tested
    modules = [module for module in (function, saved.module) if isinstance(module, nn.Module)]
    with surgery.evaluating(*modules), torch.inference_mode():
        return relative_difference(function(*inputs), saved.module(*inputs))


def show(saved: Saved, formats: Sequence[Format], budget: float = 1.0, batches: Sequence[int] = BATCHES) -> None:
    """Measure and print the table, then how each file is loaded."""
    inputs = saved.inputs()
    times = latencies(formats, inputs, budget, batches)
    table = Table(title=f"measured here, {threads()}; {latency.MEANING}", title_justify="left")
    table.add_column("")
    for one in formats:
        table.add_column(one.title, justify="right")
    for label, cells in rows(saved, formats, times, sized(inputs, batches[0] if len(batches) == 1 else min(len(_first(inputs)), 256))):
        table.add_row(label, *cells)
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    for one in formats:
        print("".join(f"{note}\n" for note in one.notes), end="")
    for one in formats:
        if one.load:
            print(f"{one.title + ':':13} {one.load}")


def threads() -> str:
    """Return the number of CPU threads in words."""
    return f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def rows(
    saved: Saved, formats: Sequence[Format], times: Mapping[int, Mapping[str, latency.Timing]], inputs: tuple[Any, ...]
) -> list[tuple[str, list[str]]]:
    """Return rows (label, one cell for each format)."""
    kept = [sizes(one.file) for one in formats]
    tested = [metrics(saved, one) for one in formats]
    names = list(dict.fromkeys(name for found in tested for name in found))
    found = [
        ("bytes", [f"{size[0]:,}" if size else "-" for size in kept]),
        ("bytes, gzipped", [f"{size[1]:,}" if size else "-" for size in kept]),
    ]
    for batch, timings in times.items():
        again = timings[latency.AGAIN]
        cells = [_time(one, timings, f"A/A {again.low:.2f} to {again.high:.2f}") for one in formats]
        found.append((f"latency at batch {batch}", cells))
    found += [(name, [f"{one[name]:.4f}" if name in one else "-" for one in tested]) for name in names]
    differences = ["-" if one.title == DENSE else f"{difference(saved, one, inputs):.1e}" for one in formats]
    return [*found, ("largest difference of outputs", differences)]


def _time(one: Format, timings: Mapping[str, latency.Timing], again: str) -> str:
    if one.call is None:
        return "as dense"
    timing = timings[one.title]
    took = f"{1000 * timing.seconds:.3f} ms"
    return f"{took} ({again})" if one.title == DENSE else f"{took}, {timing.times_faster:.2f}x ({timing.low:.2f} to {timing.high:.2f})"


def _first(inputs: tuple[Any, ...]) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
