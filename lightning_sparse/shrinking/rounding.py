"""Choose the multiple that widths are rounded to: a number, or the one whose network is measured to be the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from lightning_sparse import _checks
from lightning_sparse.export import latency
from lightning_sparse.shrinking.report import time_all

Module = TypeVar("Module", bound=nn.Module)
FASTEST, UNITS = "fastest", (1, 4, 8, 16, 32)
_AS_FAST = 0.02  # networks this close to the fastest are as fast, and more if the base differs by more from itself


@dataclass(frozen=True)
class Rounding(Generic[Module]):
    """The network that was chosen, its multiple, and the median seconds of each multiple that gave another network."""

    module: Module
    unit: int
    seconds: dict[int, float]

    def __str__(self) -> str:
        times = ", ".join(f"{unit}: {1e3 * seconds:.3f} ms" for unit, seconds in self.seconds.items())
        return f"widths are multiples of {self.unit}, measured ({times})"


def check(round_to: int | str) -> None:
    """Raise ValueError unless ``round_to`` is a whole number >= 1 or "fastest"."""
    if isinstance(round_to, str) and round_to != FASTEST:
        raise ValueError(f"round_to must be a whole number >= 1 or {FASTEST!r}, got {round_to!r}")
    if not isinstance(round_to, str):
        _checks.whole("round_to", round_to, 1)


def fastest(
    build: Callable[[int], Module | None],
    inputs: Any,
    device: str | None = None,
    seconds: float = 1.0,
    units: Sequence[int] = UNITS,
) -> Rounding[Module] | None:
    """Return the network of the multiple with the shortest median latency; of networks as fast as it, the one with the fewest parameters.

    ``build`` returns the network of a multiple, or None if that leaves nothing to remove; None is returned if all do. All are timed in
    interleaved rounds on ``inputs`` for about ``seconds`` altogether, on ``device`` if it is given.
    """
    found: dict[int, Module] = {}
    for unit in units:
        module = build(unit)
        if module is not None and _shapes(module) not in map(_shapes, found.values()):
            found[unit] = module
    if not found:
        return None
    timings = time_all({str(unit): module for unit, module in found.items()}, inputs, seconds, device)
    taken = {unit: timings[str(unit)].seconds for unit in found}
    noise = max(_AS_FAST, abs(1 - timings[latency.AGAIN].times_faster))
    as_fast = [unit for unit in found if taken[unit] <= (1 + noise) * min(taken.values())]
    unit = min(as_fast, key=lambda unit: sum(p.numel() for p in found[unit].parameters()))
    return Rounding(found[unit], unit, taken)


def _shapes(module: nn.Module) -> list[Any]:
    return [p.shape for p in module.parameters()]
