"""Profiles of training steps: time by operator, and by the calling function of this package."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from lightning_sparse.conformance import toys
from performance.jobs import Batch, Job

WARM_UP = 20  # steps; then every lazily made thing is there
PREFIX = "aten::"
_FRAME = re.compile(r"lightning_sparse/(?P<file>[\w/]+\.py)\(\d+\): (?P<function>\S+)")
_USERS = ("examples/", "conformance/")  # the network and the Trainer are the user's part of a run
_CALLS_THE_USERS = "step.py: watched"  # around the optimiser's own step, in which Lightning runs forward and backward


class Cost(NamedTuple):
    """Microseconds and calls per step."""

    us: float
    calls: float


class Profiled:
    """A loader that records ``steps`` steps after a warm-up."""

    def __init__(self, batches: Sequence[Batch], steps: int, stack: bool) -> None:
        self.batches, self.steps, self.seconds = batches, steps, 0.0
        self.profile = profile(activities=[ProfilerActivity.CPU], with_stack=stack)

    def __len__(self) -> int:
        return WARM_UP + self.steps + 1

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            if step == WARM_UP:
                self.profile.__enter__()
                self.seconds -= time.perf_counter()
            if step == WARM_UP + self.steps:
                self.seconds += time.perf_counter()
                self.profile.__exit__(None, None, None)
            yield self.batches[step % len(self.batches)]


def profiled(job: Job, callbacks: Sequence[Callback], steps: int, stack: bool = False) -> Profiled:
    """Profile ``steps`` steps; ``stack`` also records Python functions, which is slow and lengthens the times."""
    loader = Profiled(job.batches(), steps, stack)
    toys.trainer(*callbacks, epochs=1).fit(job.build(), loader)
    return loader


def by_operator(run: Profiled) -> dict[str, Cost]:
    """Return the self time of each operator."""
    return _summed(run, lambda event: str(event.name).removeprefix(PREFIX))


def by_function(run: Profiled) -> dict[str, Cost]:
    """Return operator time by the innermost calling function of this package; needs ``stack``."""
    return _summed(run, caller)


def _summed(run: Profiled, key: Callable[[Any], str | None]) -> dict[str, Cost]:
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in run.profile.events() or ():
        if is_operator(str(event.name)) and (name := key(event)) is not None:
            spent[name] += event.self_cpu_time_total
            calls[name] += 1
    return {name: Cost(us / run.steps, calls[name] / run.steps) for name, us in spent.most_common()}


def is_operator(name: str) -> bool:
    """Return True for an operator or compiled kernel; False for autograd nodes and Python functions."""
    return ("::" in name and not name.startswith("autograd::")) or "cpp_fused" in name


def caller(event: Any) -> str | None:
    """Return ``file.py: function`` of the package's innermost frame around an event, or None."""
    above = event.cpu_parent
    while above is not None:
        found = _FRAME.search(str(above.name))
        name = f"{found['file']}: {found['function']}" if found and not found["file"].startswith(_USERS) else _CALLS_THE_USERS
        if name != _CALLS_THE_USERS:
            return name
        above = above.cpu_parent
    return None


def beyond(own: dict[str, Cost], plain: dict[str, Cost]) -> dict[str, float]:
    """Return microseconds per step by operator in addition to the plain run, largest first."""
    extra = {name: cost.us - plain.get(name, Cost(0, 0)).us for name, cost in own.items()}
    return dict(sorted(extra.items(), key=lambda pair: -pair[1]))
