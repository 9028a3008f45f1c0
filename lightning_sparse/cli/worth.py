"""Report what is zero in a network, what removing it would leave, and what each export gains here, measured on the spot."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lightning_sparse
from lightning_sparse import counts, coupling, export, surgery
from lightning_sparse.cli import formats
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.failures import in_words
from lightning_sparse.cli.saved import Saved
from lightning_sparse.cli.text import as_flags
from lightning_sparse.export import conversion, latency, program
from lightning_sparse.export.gains import Gain, Table
from lightning_sparse.shrinking.report import FASTER

_SECONDS = 2.0  # for measuring layers; as much again for the whole network
_SAMPLES = 64  # on which the shrunk network is compared
_FEW = 0.01  # share of zeros below which a network is dense
_SMALLER = 0.95  # a second step, or shrink without rounding, is named if it makes a file or the network at most so large
_REMEDY = "for speed train with structure=Channels() and shrink, or Linear layers to more zeros"
_UNROUNDED = "--round_to 1"
_SLOW = 0.1  # seconds of one call; slower batch sizes are left to `export`


class _Best(NamedTuple):
    """An export that is faster than the dense network, at a batch size, its command, and whether the gain is beyond the noise."""

    times_faster: float
    batch: int
    command: str
    is_clear: bool


class _Cut(NamedTuple):
    """A shrunk network, and the command that makes it."""

    module: nn.Module
    command: str


class _Spot(Table):
    """A table that is measured now, within a time limit; what comes later counts as no gain."""

    def __init__(self, limit: float) -> None:
        super().__init__(budget=0.02)
        self.end = time.perf_counter() + limit
        self.late = 0

    def gain(self, weight: Tensor, bias: Tensor | None, layout: str, block: int, batch_size: int) -> Gain:
        if time.perf_counter() > self.end:
            self.late += 1
            return Gain(0.0, 0.0, 1.0)
        return super().gain(weight, bias, layout, block, batch_size)


def at_end(saved: Saved) -> None:
    """Print the report after ``fit``; a network that cannot be measured is no error there."""
    try:
        print("\n".join(lines(saved)))
    except Exception as error:  # the run has ended well, and its files are there
        print(f"what the zeros are worth was not measured: {in_words(error)}")


def lines(saved: Saved, more: list[str] | None = None) -> list[str]:
    """Return the report: zeros, shrink, files, sparse layers, and the commands for the best. ``more`` is added to each command."""
    with surgery.evaluating(saved.module):
        return _lines(saved, more)


def _lines(saved: Saved, more: list[str] | None) -> list[str]:
    began = time.perf_counter()
    words = " ".join([shlex.quote(str(saved.file)), *(more or [])])
    command = f"lightning-sparse export {words}"
    found = [*_zeros(saved.module, saved.selected)]
    why, cuts, unmeasured = "", list[_Cut](), ""
    best: list[_Best] = []
    batches: Sequence[int] = ()
    try:
        inputs: tuple[Any, ...] | None = saved.inputs()
    except UsageError as error:
        inputs, why = None, str(error)
    if inputs is not None:
        try:
            batches = _quick(saved.module, inputs)
        except Exception as error:  # a module without a forward, or with another one than the data is for
            shapes = [tuple(x.shape) for x in inputs if isinstance(x, Tensor)]
            inputs, why = None, f"the network fails for inputs of the shapes {shapes}: {in_words(error)[:200]}"
    if inputs is not None:
        line, cuts, unmeasured = _shrunk(saved, inputs, batches, words, best)
        found.append(line)
    size, smaller = _files(saved.module, cuts, command)
    found.append(size)
    found += [f"sparse layers:  not measured, {why}"] if inputs is None else _layers(saved.module, inputs, batches, command, best)
    most = max((one for one in best if one.is_clear), default=None)
    faster = f"for the most speed:     {most.command}  ({most.times_faster:.1f}x at batch {most.batch})" if most else ""
    if inputs is not None and most is None and counts.share(counts.count_zeros(_matrices(saved.module))) >= _FEW:
        faster = f"nothing is faster here with these zeros: {_REMEDY}"
        if best or cuts:
            longer = f"{max(best).command if best else cuts[0].command} measures for longer. If that gains nothing: {_REMEDY}"
            faster = f"no gain is beyond the noise of this short measurement, its lower quartile above all of A/A: {longer}"
        if unmeasured:
            faster = f"sparse layers are not faster here with these zeros, and shrink was not measured: {unmeasured}"
    took = f"measured in {time.perf_counter() - began:.1f} s with {formats.threads()}; {latency.MEANING}"
    head = f"what the zeros are worth here, {took}:"
    return [head, *(f"  {line}" for line in [*found, *filter(None, [faster, *smaller])])]


def _zeros(module: nn.Module, selected: Iterable[str]) -> list[str]:
    chosen = {name: p.detach() for name, p in module.named_parameters() if name in set(selected)}
    weights = _matrices(module)
    counted = counts.count_zeros(weights)
    zeros, size = (sum(pair[i] for pair in counted.values()) for i in (0, 1))
    rows = sum(int((~weights[name].flatten(1).any(1)).sum()) for name in counted)
    outputs = sum(len(weights[name]) for name in counted)
    kind = "matrices" if all(p.dim() == 2 for p in weights.values()) else "tensors"
    line = f"zeros:          {zeros:,} of {size:,} weights in {len(counted)} {kind} ({100 * zeros / max(size, 1):.2f} %)"
    if chosen and chosen.keys() != weights.keys():
        line += f" ({100 * counts.share(counts.count_zeros(chosen)):.2f} % of those selected in training)"
    found = [line, f"rows:           {rows:,} of {outputs:,} output neurons and channels have no weight left"]
    unread, inputs = _unread([weights[name] for name in counted])
    return found + ([f"columns:        {unread:,} of {inputs:,} input neurons and channels that nothing reads"] if unread else [])


def _unread(weights: Iterable[Tensor]) -> tuple[int, int]:
    """Return how many inputs of layers no weight reads, and how many inputs there are."""
    used = [weight.transpose(0, 1).flatten(1).any(1) for weight in weights]
    return sum(int((~mask).sum()) for mask in used), sum(len(mask) for mask in used)


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.dim() > 1}


def _shrunk(saved: Saved, inputs: tuple[Any, ...], batches: Sequence[int], words: str, best: list[_Best]) -> tuple[str, list[_Cut], str]:
    """Return the line about shrink, the shrunk networks, and what to do where a remedy is known; add to ``best``.

    There are up to two networks: with widths rounded as by default, and without rounding where that is much smaller, or all that can go.
    """
    command = f"lightning-sparse shrink {words}"
    try:
        cuts = _cuts(conversion.copied(saved.module), program.sized(inputs, _SAMPLES), command)
    except ImportError as error:
        return f"shrink:         not measured, {error}", [], "pip install 'lightning-sparse[shrink]'"
    except coupling.ForwardBranches as error:
        return f"shrink:         not measured, {as_flags(str(error))}", [], f"{command} --allow_branches"
    except Exception as error:  # a report names the reason and goes on
        return f"shrink:         {in_words(error)}", [], ""
    times = _timings({cut.command: cut.module for cut in cuts}, saved.module, inputs, batches)
    said = []
    for number, cut in enumerate(cuts):
        for batch, timing in times.items():
            # without rounding only where that is clearly faster than with it
            if not number or timing[cut.command].times_faster >= FASTER * timing[cuts[0].command].times_faster:
                _compare(timing, cut.command, batch, cut.command, best)
        speeds = "; ".join(f"batch {batch}: {_ratio(timing, cut.command)}" for batch, timing in times.items())
        option = f" with {_UNROUNDED}" if cut.command.endswith(_UNROUNDED) else ""
        said.append(f"{_size(cut.module):,} parameters{option}; {speeds}")
    return f"shrink:         {_size(saved.module):,} -> {', or '.join(said)}", cuts, ""


def _cuts(module: nn.Module, inputs: tuple[Any, ...], command: str) -> list[_Cut]:
    """Return the shrunk networks, of the default rounding first. Raises an error of ``shrink`` if nothing can go without rounding."""
    groups = coupling.groups(module, inputs)
    tight = lightning_sparse.shrink(module, inputs, 1, groups=groups)
    try:
        cuts = [_Cut(lightning_sparse.shrink(module, inputs, groups=groups), command)]
    except ValueError:  # rounding keeps every zero group
        cuts = []
    if not cuts or _size(tight) <= _SMALLER * _size(cuts[0].module):
        cuts.append(_Cut(tight, f"{command} {_UNROUNDED}"))
    return cuts


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _files(module: nn.Module, cuts: Sequence[_Cut], command: str) -> tuple[str, list[str]]:
    """Return the line about files, and lines on the smallest one: of the network, and of the first of the shrunk ones."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        torch.save(module.state_dict(), dense)
        whole = dense.stat().st_size
        try:
            sizes = _compact(module, Path(folder))
            shrunk = _compact(cuts[0].module, Path(folder)) if cuts else None
        except (ImportError, ValueError) as error:
            return f"compact file:   not measured, {in_words(error)}", []
    exact, half = sizes
    line = (
        f"compact file:   {exact:,} bytes, rounded to fp16 {half:,}, dense {whole:,}: {whole / exact:.1f} and {whole / half:.1f}x smaller"
    )
    line += f"; after shrink {shrunk[0]:,}, rounded to fp16 {shrunk[1]:,}" if shrunk else ""
    words, size, rounded = f"{command} --to compact", exact, half < exact
    if rounded:
        words, size = f"{words} --fp16", half
    found = [f"for a small file:  {words}  {_bytes(size, rounded)}"] if size < whole else []
    if shrunk and min(shrunk) < min(_SMALLER * size, whole):
        rounded = shrunk[1] < shrunk[0]
        kind = ', "fp16"' if rounded else ""
        words = f"{cuts[0].command}, then in Python export.save_compact(load_shrunk(FOLDER, ...), FILE{kind})"
        found.append(f"for a smaller one yet:  {words}  {_bytes(min(shrunk), rounded)}")
    return line, found


def _bytes(size: int, rounded: bool) -> str:
    return f"({size:,} bytes{', values rounded to fp16' if rounded else ''})"


def _compact(module: nn.Module, folder: Path) -> tuple[int, int]:
    """Return the bytes of a compact file, as it is and rounded to fp16."""
    exact, half = (export.save_compact(module, folder / "compact", dtype).stat().st_size for dtype in (None, "fp16"))
    return exact, half


def _layers(module: nn.Module, inputs: tuple[Any, ...], batches: Sequence[int], command: str, best: list[_Best]) -> list[str]:
    """Return the line about sparse layers; add what they gain to ``best``."""
    table, said = _Spot(_SECONDS), []
    for batch in batches:
        try:
            found = export.plan(module, batch_size=batch * formats.rows_of_a_sample(module, inputs), table=table)
        except ValueError as error:
            return [f"sparse layers:  {in_words(error)}"]
        sparse = conversion.replaced(module, found, "auto")
        taken = len(export.sparse_layers(sparse))
        if not taken:
            said.append(f"batch {batch}: none is faster")
            continue
        timing = _timings({"sparse": sparse}, module, inputs, (batch,))[batch]
        said.append(f"batch {batch}: {_ratio(timing, 'sparse')} with {taken} of them")
        _compare(timing, "sparse", batch, f"{command} --to auto --batch_size {batch}", best)
    late = f"; {table.late} layers were not measured in the time" if table.late else ""
    longer = f" (each layer measured briefly{late}: `export` measures them for longer and may take others)"
    slow = [batch for batch in formats.BATCHES if batch not in batches]
    more = f"; batch {', '.join(map(str, slow))}: `export` measures it, one call is slow" if slow else ""
    return [f"sparse layers:  {'; '.join(said)}{longer}{more}"]


def _quick(module: nn.Module, inputs: tuple[Any, ...]) -> list[int]:
    """Return the batch sizes at which one call is quick enough for a report of a few seconds, at least the first."""
    found: list[int] = []
    for batch in formats.BATCHES:
        given = program.sized(inputs, batch)
        spent = []
        for _ in range(2):  # because the first call also allocates
            began = time.perf_counter()
            with torch.inference_mode():
                module(*given)
            spent.append(time.perf_counter() - began)
        if found and min(spent) > _SLOW:
            break
        found.append(batch)
    return found


def _compare(timing: dict[str, latency.Timing], name: str, batch: int, command: str, best: list[_Best]) -> None:
    """Add an export to ``best`` if it is at least 5 % faster; by more than two runs of the dense network differ by, it is clear."""
    if timing[name].times_faster >= FASTER:
        best.append(_Best(timing[name].times_faster, batch, command, timing[name].gains(timing[latency.AGAIN])))


def _timings(
    arms: dict[str, nn.Module], dense: nn.Module, inputs: tuple[Any, ...], batches: Sequence[int]
) -> dict[int, dict[str, latency.Timing]]:
    found = {}
    for batch in batches:
        given = program.sized(inputs, batch)
        calls = {name: formats.call(module, given) for name, module in {formats.DENSE: dense, **arms}.items()}
        with torch.inference_mode():
            found[batch] = latency.measure(calls, formats.DENSE, 0.3)
    return found


def _ratio(timing: dict[str, latency.Timing], name: str) -> str:
    own, again = timing[name], timing[latency.AGAIN]
    return f"{own.times_faster:.2f}x (A/A {again.low:.2f} to {again.high:.2f})"
