"""Measure a callback's cost by number of weights and tensors, relative to the floor: python tests/benchmarks/performance scaling

A Trainer runs a network whose gradients are filled by hand and whose optimiser does nothing; a form's cost is what a step
takes beyond the same step without a callback, which runs twice in each round (A/A). The floor is the form's least memory
traffic (performance/per_weight.py) at the bandwidth of a copy of 128 MB that is measured in the same rounds. The mask form draws
Bernoulli masks on the weights, calibrated by a given curvature. Ratios are medians over rounds, with quartiles; a goal is met
where the ratio, less what the A/A arm strays, is at most the goal. --clock cpu counts processor time instead of the wall
clock's, for a busy machine, and then wants --threads 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.curvature import Curvature
from lightning_sparse.weights import Attachment
from performance import arguments, compared, per_weight, record, rounds, tables
from performance.arms import COMPILED
from performance.compared import above
from performance.filled import Filled, seconds
from performance.jobs import be_quiet
from performance.runs import CLOCKS

LOG_SUM = penalties.LogSum(eps=2.0)
COUNTS = [10**power for power in range(4, 9)]
TENSORS = [1, 10, 100, 1000, 2000]
TOTAL = 10**7  # weights, spread over the tensors
LARGE = 10**7  # from there on the goals hold
STEEP = 10**6  # from there on the slope is taken: below, the Trainer's own time is more than the weights'
OWN = 20_000  # weights that a tensor's own time is worth, about
COPIED = 2**25  # float32 in each array of the copy, 128 MB
Rows = list[dict[str, Any]]


class Given(Curvature):
    """A curvature estimate H = 1 that is never updated."""

    def attach(self, module: nn.Module, attachment: Attachment) -> None:
        self.mean = {name: torch.ones_like(weight.detach()) for name, weight in attachment.parameters.items()}
        self.weight = dict.fromkeys(self.mean, 1.0)


def mask(compiled: bool) -> Callback:
    return AdaptiveMask(LOG_SUM, 1e-3, noise=noise.ScaledBernoulli(), curvature=Given(), compile=compiled)


@dataclass(frozen=True)
class Form:
    """``goal``: how often the floor it may cost; ``fused``: one pass for all tensors, so that their number may cost 20 % only."""

    make: Callable[[], Callback]
    goal: float | None = None
    fused: bool = False


def forms(compiled: bool) -> dict[str, Form]:
    """Return each callback once."""
    return {
        "penalty": Form(lambda: ReweightedPenalty(LOG_SUM, 1e-3, compile=compiled), 2.0, compiled),
        "prox": Form(lambda: AdaptiveProx(LOG_SUM, 1e-6, compile=compiled), None, compiled),  # so weak that its weights last
        "mask": Form(lambda: mask(compiled), 4.0, compiled),
    }


FORMS = forms(compiled=False) | {f"{name}{COMPILED}": form for name, form in forms(compiled=True).items()}


def arms_of(forms: Sequence[str], module: Filled, clock: Callable[[], float]) -> dict[str, Callable[[], float]]:
    """Make a plain arm of ``module`` and one per callback; 3 to 100 steps per round, depending on the size."""
    work = module.count + OWN * len(module.layers)
    steps = max(3, min(100, 30_000_000 // work))
    made = {name: lambda name=name: seconds(module, [FORMS[name].make()], steps, clock) for name in forms}
    return {"plain": partial(seconds, module, (), steps, clock), **made}


def by_size(forms: Sequence[str], counts: Sequence[int], turns: int, clock: Callable[[], float]) -> Rows:
    """Return a row for each number of weights and callback."""
    rows = []
    for count in counts:
        module = Filled(count)
        arms = arms_of(forms, module, clock) | {"copy": per_weight.copier(COPIED, clock)}
        times = rounds.measure(arms, "plain", turns)
        rows += [size_row(name, module.count, times) for name in forms]
    return rows


def size_row(form: str, count: int, times: rounds.Times) -> dict[str, Any]:
    """Make a row of nanoseconds per weight and ratio to the floor; the goal applies from LARGE weights on."""
    floor = [per_weight.bytes_of(form.removesuffix(COMPILED)) * count * taken for taken in times["copy"]]
    cost, again = above(times[form], times["plain"]), above(times[rounds.AGAIN], times["plain"])
    goal = FORMS[form].goal if count >= LARGE * 0.99 else None
    found = compared.row(cost, again, ("floor_ns", floor), goal, "ns_per_weight")
    return {"form": form, "weights": count} | compared.scaled(found, 1e9 / count, "ns_per_weight", "floor_ns")


def slopes(rows: Rows) -> Rows:
    """Fit a line to each callback's costs from STEEP weights on."""
    found = []
    for form in dict.fromkeys(row["form"] for row in rows):
        large = [row for row in rows if row["form"] == form and row["weights"] >= STEEP * 0.99]
        if large:
            line = per_weight.line({row["weights"]: row["ns_per_weight"] * row["weights"] for row in large})
            floor = statistics.median(row["floor_ns"] for row in large)
            slope = {"slope_ns": line.slope, "floor_ns": floor, "ratio": line.slope / floor}
            found.append({"form": form} | slope | {"start_us": line.start / 1e3, "off_the_line": line.stray})
    return found


def by_tensors(forms: Sequence[str], numbers: Sequence[int], total: int, turns: int, clock: Callable[[], float]) -> Rows:
    """Return a row for each callback and number of tensors: cost relative to the first number, in the same round."""
    arms: dict[str, Callable[[], float]] = {}
    for number in numbers:
        module = Filled(total, number)
        own = arms_of(forms, module, clock)
        arms |= {f"{name} {number}": call for name, call in (own | {"again": own["plain"]}).items()}
    times = rounds.measure(arms, f"plain {numbers[0]}", turns)
    return [tensor_row(form, number, numbers[0], times) for form in forms for number in numbers]


def tensor_row(form: str, number: int, first: int, times: rounds.Times) -> dict[str, Any]:
    """Make a row of ms per step in ``number`` tensors and the ratio to ``first`` tensors; A/A is the plain step in ``number`` tensors."""
    cost, base = (above(times[f"{form} {n}"], times[f"plain {n}"]) for n in (number, first))
    again = above(times[f"again {number}"], times[f"plain {number}"])
    goal = None if number == first else 1.2 if FORMS[form].fused else 2.0
    found = compared.row(cost, again, (f"ms_in_{first}", base), goal, "ms")
    return {"form": form, "tensors": number} | compared.scaled(found, 1e3, "ms", f"ms_in_{first}")


def main() -> None:
    parser = arguments.parser(__doc__, "scaling")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--largest", type=arguments.whole(10**4), default=10**8, help="largest number of weights, 1e4 or more")
    parser.add_argument("--tensors", nargs="*", type=arguments.whole(), default=TENSORS, help="numbers of tensors; none leaves this out")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    given = parser.parse_args()
    be_quiet(given.threads)
    counts, clock, total = [count for count in COUNTS if count <= given.largest], CLOCKS[given.clock], min(TOTAL, given.largest)
    sizes = by_size(given.forms, counts, given.rounds, clock)
    results = {"sizes": sizes, "slopes": slopes(sizes), "floors": {form: dict(items) for form, items in per_weight.ITEMS.items()}}
    results["tensors"] = by_tensors(given.forms, given.tensors, total, given.rounds, clock) if given.tensors else []
    for part in ("sizes", "slopes", "tensors"):
        if results[part]:
            print(tables.aligned(results[part]), end="\n\n")
    settings = {"rounds": given.rounds, "clock": given.clock, "total_of_the_tensors": total, "bytes_copied": 8 * COPIED}
    print(record.write(given.out, arguments.command(), settings, results))


if __name__ == "__main__":
    main()
