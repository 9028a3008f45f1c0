"""Measure the cost of start and end of a run: python tests/benchmarks/performance start_end

imports: processor time of fresh interpreters, `import lightning_sparse` against `import torch` and `lightning-sparse --help`
against `import lightning`. set-up: seconds in a callback's constructor and hooks from setup to the first batch, and in its
teardown, on a network of --weights weights. end: what --tensors tensors of 70 x 70 add after the last step of a fit (the final
thresholding, figures for each tensor, Lightning's logging of them to CSV), as a share of an epoch of 500 plain steps. Arms take
turns in every round, the base twice (A/A); medians over rounds with quartiles.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback

from performance import arguments, compared, hooks, record, rounds, tables
from performance.cases import FORMS, Make
from performance.compared import above
from performance.filled import Asked, Filled, fit
from performance.jobs import be_quiet
from performance.tail import END, Wide, after_the_last_step

EPOCH = 500  # steps
STARTS = [  # base, what is held against it, goal
    (("import torch", ["-c", "import torch"]), ("import lightning_sparse", ["-c", "import lightning_sparse"]), 1.3),
    (("import lightning", ["-c", "import lightning"]), ("lightning-sparse --help", ["-m", "lightning_sparse.cli", "--help"]), 2.0),
]
BEGIN = ("setup", "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start")
UNDO = ("on_exception", "teardown")
USUAL = ["ReweightedPenalty", "AdaptiveProx", "AdaptiveMask", "VariationalDropout"]
LIMIT = 2.0  # seconds
SHARE = 0.01  # of an epoch
Rows = list[dict[str, Any]]


def processor_seconds(words: Sequence[str]) -> float:
    """Measure user and system time of a new interpreter, because load affects wall-clock time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imports(turns: int) -> Rows:
    """Return a row per arm, with its base."""
    found = []
    for (base, words), (name, others), goal in STARTS:
        times = rounds.measure({base: partial(processor_seconds, words), name: partial(processor_seconds, others)}, base, turns)
        lines = rounds.lines(rounds.ratios(times, base, {name: goal}))
        found += [{"what": line.pop("arm"), "seconds": line.pop("value"), "against": base} | line for line in lines]
    return found


def begun(module: Filled, make: Make) -> tuple[float, float]:
    """Measure seconds to set up a callback for ``module`` and to tear it down, without a step."""
    start = time.perf_counter()
    callback = make()
    made = time.perf_counter() - start
    spent = hooks.timed(callback)
    fit(module, [callback], Asked(0, lambda: None))
    return made + sum(spent[name] for name in BEGIN), sum(spent[name] for name in UNDO)


def set_up(forms: Sequence[str], weights: int, turns: int) -> Rows:
    """Return a row per callback: median seconds, and quartiles of the sum; without a ratio and A/A."""
    module = Filled(weights)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for turn in range(turns + 1):
        for name in forms if turn % 2 else reversed(forms):
            taken = begun(module, FORMS[name])
            times[name] += [taken] if turn else []  # the first warms up
    return [_set_up_row(name, module.count, times[name]) for name in forms]


def _set_up_row(name: str, weights: int, times: list[tuple[float, float]]) -> dict[str, Any]:
    both = [sum(pair) for pair in times]
    low, middle, high = statistics.quantiles(both, n=4) if len(both) > 1 else both * 3
    parts = {"set_up_seconds": statistics.median(t[0] for t in times), "tear_down_seconds": statistics.median(t[1] for t in times)}
    return {"form": name, "weights": weights} | parts | {"both": middle, "low": low, "high": high, "goal": LIMIT, "met": middle <= LIMIT}


def end(forms: Sequence[str], tensors: int, steps: int, turns: int) -> Rows:
    """Return a row per callback; the hooks' seconds are part of the total, the rest is Lightning's."""
    notes: dict[str, list[dict[str, float]]] = {name: [] for name in ("plain", *forms)}

    def run(name: str, make: Callable[[], list[Callback]]) -> float:
        notes[name].append(after_the_last_step(Wide(tensors), make(), steps))
        return notes[name][-1]["tail"]

    arms = {name: partial(run, name, lambda name=name: [FORMS[name]()]) for name in forms}
    times = rounds.measure({"plain": partial(run, "plain", list), **arms}, "plain", turns)
    epoch = [EPOCH * statistics.median(note["step"] for note in notes["plain"])] * turns
    return [_end_row(name, tensors, times, epoch, notes[name][1:]) for name in forms]


def _end_row(name: str, tensors: int, times: rounds.Times, epoch: list[float], notes: list[dict[str, float]]) -> dict[str, Any]:
    cost, again = above(times[name], times["plain"]), above(times[rounds.AGAIN], times["plain"])
    found = compared.row(cost, again, ("epoch_seconds", epoch), SHARE, "seconds")
    parts = {f"in_{hook.removeprefix('on_')}": statistics.median(note[hook] for note in notes) for hook in END}
    return {"form": name, "tensors": tensors} | found | parts


def main() -> None:
    parser = arguments.parser(__doc__, "start_end")
    parser.add_argument("--parts", nargs="+", choices=["imports", "set_up", "end"], default=["imports", "set_up", "end"])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=USUAL, metavar="FORM", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--weights", type=arguments.whole(10**4), default=10**8, help="for the set-up")
    parser.add_argument("--tensors", type=arguments.whole(), default=2000, help="for the end")
    parser.add_argument("--steps", type=arguments.whole(2), default=5, help="to take a step's length from, for the end")
    given = parser.parse_args()
    be_quiet(given.threads)
    runs: dict[str, Callable[[], Rows]] = {
        "imports": lambda: imports(given.rounds),
        "set_up": lambda: set_up(given.forms, given.weights, given.rounds),
        "end": lambda: end(given.forms, given.tensors, given.steps, given.rounds),
    }
    results = {part: [] for part in runs} | {part: runs[part]() for part in given.parts}
    for part in given.parts:
        print(tables.aligned(results[part]), end="\n\n")
    settings = {"rounds": given.rounds, "weights": given.weights, "tensors": given.tensors, "steps": given.steps, "epoch": EPOCH}
    print(record.write(given.out, arguments.command(), settings, results))


if __name__ == "__main__":
    main()
