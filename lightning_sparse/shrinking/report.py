"""What shrinking changed: widths, parameters, multiply-adds and latency, counted and measured on the example inputs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from lightning_sparse import _checks, surgery
from lightning_sparse.coupling import Group
from lightning_sparse.export import latency

FASTER = 1.05  # a smaller ratio of latencies is no gain
MUCH = 0.8  # a network with more of its parameters left has few whole groups that are zero


@dataclass(frozen=True)
class Report:
    """Figures of a shrunk network beside those of the network it was cut from.

    Args:
        widths: (groups before, groups after, kind) of each axis that lost groups.
        parameters: number of parameters before and after.
        multiply_adds: of one call on the example inputs, before and after (FLOPs / 2, see :func:`count_multiply_adds`).
        difference: max |before - after| / max |before| of the outputs on the example inputs, in the module's own precision.
        folded: number of constant groups that went into a bias.
        left_out: (axis, number of groups, reason) of what cannot be removed.
        constants: constant groups that stay, with the reason.
        timings: median seconds before, again (A/A) and after, and the ratios; empty if not measured.
        rounding: what the multiple of the widths was chosen by, if it was measured.
        stayed: {axis: (number, kind)} of zero groups that stay because widths are rounded up to multiples of ``unit``.
        unit: that multiple.
        samples: number of samples in the example inputs, by which ``multiply_adds`` is divided in the printed rows; None if unknown.
    """

    widths: dict[str, tuple[int, int, str]]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    difference: float
    folded: int = 0
    left_out: list[tuple[str, int, str]] = field(default_factory=list)
    constants: dict[str, str] = field(default_factory=dict)
    timings: dict[str, latency.Timing] = field(default_factory=dict)
    rounding: str = ""
    stayed: dict[str, tuple[int, str]] = field(default_factory=dict)
    unit: int = 1
    samples: int | None = None

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return rows (label, before, after, ratio) of the widths that changed, parameters and multiply-adds."""
        counted = {f"{kind}s of {axis}": (before, after) for axis, (before, after, kind) in self.widths.items()}
        of = "the example inputs" if self.samples is None else "one sample"
        before, after = (count // (self.samples or 1) for count in self.multiply_adds)
        counted |= {"parameters": self.parameters, f"multiply-adds of {of}": (before, after)}
        return [(name, f"{a:,}", f"{b:,}", f"{a / b:.2f}x" if b else "-") for name, (a, b) in counted.items()]

    def notes(self) -> list[str]:
        """Return lines about the rounding and the zero groups that it keeps, about constants and about what was left out."""
        lines = [self.rounding] if self.rounding else []
        lines += [self._kept_zeros()] if self.stayed else []
        lines += [f"{_checks.counted(self.folded, 'constant group was', 'constant groups were')} added to biases"] if self.folded else []
        lines += [f"kept {name}: {why}" for name, why in list(self.constants.items())[:5]]
        return lines + [f"left out: {count} group{'s'[: count != 1]} of {axis}: {why}" for axis, count, why in self.left_out]

    def _kept_zeros(self) -> str:
        """Say how many zero groups stay because of the rounding, and what removes them."""
        count, kinds = sum(number for number, _ in self.stayed.values()), dict.fromkeys(kind for _, kind in self.stayed.values())
        groups = " and ".join(kind if count == 1 else f"{kind}s" for kind in kinds)
        stay, them = ("stays", "it") if count == 1 else ("stay", "them")
        return (
            f"{count} zero {groups} of {_checks.counted(len(self.stayed), 'axis', 'axes')} {stay}, because widths are rounded up to "
            f"multiples of {self.unit}: round_to=1 removes {them}"
        )

    def lines(self) -> list[str]:
        """Return the whole report as lines of text."""
        rows = [("", "before", "after", "ratio"), *self.rows()]
        if self.timings:
            base, again, cut = (self.timings[name] for name in ("before", latency.AGAIN, "after"))
            noise = f"{cut.times_faster:.2f}x ({cut.low:.2f} to {cut.high:.2f}; {latency.MEANING}, {again.low:.2f} to {again.high:.2f})"
            rows.append(("latency, ms", f"{1e3 * base.seconds:.3f}", f"{1e3 * cut.seconds:.3f}", noise))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2)), row[3]]).rstrip() for row in rows]
        lines.append(f"largest difference of the outputs on the example inputs: {self.difference:.1e} of the largest output")
        lines += self.notes()
        if self.timings and not self.timings["after"].gains(self.timings[latency.AGAIN]):
            lines.append(self.no_gain([self.timings["after"]], "here", "fewer parameters are worth it"))
        return lines

    def no_gain(self, timings: Iterable[latency.Timing], where: str, unless: str) -> str:
        """Return what to do where no timing of the smaller network is clearly below that of the given one."""
        if any(timing.times_faster >= FASTER for timing in timings):
            text = f"no gain in speed {where} is beyond the noise, its lower quartile above A/A: measure again, or at a larger batch; else"
        else:
            text = f"no gain in speed {where}:"
        little = self.parameters[1] > MUCH * self.parameters[0]
        hint = ". Training with structure=Channels() makes whole channels zero" if little else ""
        return f"{text} keep the given network, unless {unless}{hint}"


def changed_widths(before: Iterable[Group], after: Iterable[Group]) -> dict[str, tuple[int, int, str]]:
    """Return (groups before, groups after, kind) of each axis that lost groups."""
    before = list(before)
    was, left = Counter(group.axis for group in before), Counter(group.axis for group in after)
    kinds = {group.axis: group.kind for group in before}
    return {axis: (was[axis], left[axis], kind) for axis, kind in kinds.items() if was[axis] != left[axis]}


def count_multiply_adds(module: nn.Module, inputs: Any) -> int:
    """Return the multiply-adds of one call in evaluation mode: matrix products, convolutions and both products of attention.

    They are the FLOPs / 2 of torch's FlopCounterMode, which sees neither the fused encoder layers of evaluation mode nor
    scaled_dot_product_attention on the CPU: the first are switched off while counting, the second is counted here.
    """
    with _unfused(), FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops}) as counter:
        surgery.outputs(module, inputs)
    return int(counter.get_total_flops()) // 2


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return 2 n m (d + d') of each head and batch entry, from the shapes of queries (n, d), keys (m, d) and values (m, d')."""
    *heads, n, d = map(int, query)
    return 2 * math.prod(heads) * n * int(key[-2]) * (d + int(value[-1]))


@contextmanager
def _unfused() -> Iterator[None]:
    """Switch off torch's fused path of attention and encoder layers, and restore it."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def count_samples(inputs: Any) -> int | None:
    """Return the length of the first axis that all tensors of the inputs share; None if they share none."""
    shapes = [x.shape for x in _pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    lengths = {shape[0] if len(shape) > 1 else 0 for shape in shapes}
    return next(iter(lengths)) or None if len(lengths) == 1 else None


def measure(before: nn.Module, after: nn.Module, inputs: Any, budget: float, device: str | None = None) -> dict[str, latency.Timing]:
    """Time both networks ("before", "after") in interleaved rounds, in evaluation mode; None for ``device`` moves nothing."""
    return time_all({"before": before, "after": after}, inputs, budget, device)


def time_all(modules: Mapping[str, nn.Module], inputs: Any, budget: float, device: str | None = None) -> dict[str, latency.Timing]:
    """Time networks against the first of them in interleaved rounds, in evaluation mode; None for ``device`` moves nothing."""
    arms = {name: surgery.duplicate(module).eval() for name, module in modules.items()}
    if device is not None:
        arms = {name: module.to(device) for name, module in arms.items()}
        inputs = _pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)
    is_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in _pytree.tree_leaves(inputs))

    def call(module: nn.Module) -> None:
        surgery.call(module, inputs)
        if is_cuda:
            torch.cuda.synchronize()

    with torch.inference_mode():
        calls = {name: partial(call, module) for name, module in arms.items()}
        return latency.measure(calls, next(iter(calls)), budget, clock=time.perf_counter if is_cuda else None)
