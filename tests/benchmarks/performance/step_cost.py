"""Measure each callback's cost per training step, compared with the plain step and the memory floor:

    python tests/benchmarks/performance step_cost [--nets lenet resnet18 transformer] [--arms penalty ...] [--rounds 9] [--threads 2]

Three networks on data in memory: LeNet-300-100 (batch 128), ResNet-18 on 32x32 (batch 32), a transformer of 6 layers (width
256, sequence 128, batch 16). Each arm is a run in a process of its own, and they take turns of an epoch of --steps steps; the
logging at an epoch's end is charged in proportion to an epoch of the usual length. A second plain run is the A/A arm: a goal
is met when the median ratio, less what the A/A arm strays, is under it. A network whose A/A arm strays by more than --still is
measured again, --tries times in all, and the run in which it strayed least counts, whatever the others show. The floor is the
extra bytes that must be read and written (performance/floor.py counts them) at the bandwidth of a copy of as many values as
there are weights. The noise of masks stays for the whole run, but in the arm "mask, default": its noise fades as in any run, and its
ratio is the mean over the rounds, which are one run.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

from performance import arguments, arms, floor, jobs, options, record, rounds, runs


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one network: rows of its table, and parts of the floors."""
    job, setting = jobs.JOBS[name], options.setting(name, given)
    names = options.picked(given.arms, list(arms.ARMS), arms.PLAIN)
    with runs.calls(setting, arms.of, {arm: arm for arm in names} | {rounds.AGAIN: arms.PLAIN}) as calls:
        times = rounds.measure(calls, arms.PLAIN, given.rounds)
    found, size = [_over_the_run(line, times) for line in rounds.ratios(times, arms.PLAIN, arms.GOALS[name])], floor.size_of(job)
    rate = floor.bandwidth(size.weights)
    lines = [line | distance(line, found[0].value, size, rate, job) for line in rounds.lines(found)]
    made = {"steps": setting.steps, "weights": size.weights, "bytes_per_second": rate, "stray": rounds.stray(found)}
    return made | {"arms": lines, "seconds": times}


def _over_the_run(line: rounds.Ratio, times: rounds.Times) -> rounds.Ratio:
    """Return the line, for the default mask with means over the run in place of medians.

    The first round counts twice, because the one that warms up is not measured: the noise is as large in both.
    """
    if line.arm != arms.WHOLE:
        return line
    seconds = times[line.arm]
    quotients = [own / plain for own, plain in zip(seconds, times[arms.PLAIN], strict=True)]
    value, ratio = (statistics.mean([each[0], *each]) for each in (seconds, quotients))
    return replace(line, value=value, ratio=ratio)


def distance(line: dict[str, Any], plain: float, size: floor.Size, rate: float, job: jobs.Job) -> dict[str, Any]:
    """Return extra milliseconds, the floor, and their ratio; None for arms without a floor."""
    traffic = floor.of_arm(line["arm"], job)
    if traffic is None:
        return dict.fromkeys(("extra_ms", "floor_ms", "times_floor", "floor"))
    extra, least = 1e3 * (line["value"] - plain), 1e3 * size.bytes_of(traffic) / rate
    return {"extra_ms": extra, "floor_ms": least, "times_floor": extra / least, "floor": traffic.why}


HEAD = f"{'':20} {'ms a step':>9} {'ratio':>6} {'quartiles':>15} {'goal':>5} {'met':>4} {'extra ms':>9} {'floor ms':>9} {'times':>6}"


def table(name: str, found: dict[str, Any]) -> str:
    """Format one network's rows."""
    title = f"\n{jobs.JOBS[name].name}, batch {jobs.JOBS[name].batch}: {found['weights']:,} weights, {found['steps']} steps a turn"
    title += f", try {found['tries']}"
    copy = f"copy of as many values: {found['bytes_per_second'] / 1e9:.1f} GB/s read and written; A/A strays {found['stray']:.3f}"
    return "\n".join([f"{title}; {copy}", HEAD, *map(_line, found["arms"])])


def _line(line: dict[str, Any]) -> str:
    spread = f"{line['low']:.3f} to {line['high']:.3f}"
    goal, met = ("", "") if line["goal"] is None else (f"{line['goal']:.2f}", "yes" if line["met"] else "no")
    shown = f"{line['arm']:20} {1e3 * line['value']:9.3f} {line['ratio']:6.3f} {spread:>15} {goal:>5} {met:>4}"
    if line["floor_ms"] is None:
        return shown
    return f"{shown} {line['extra_ms']:9.3f} {line['floor_ms']:9.4f} {line['times_floor']:6.1f}"


def options_of() -> argparse.ArgumentParser:
    """Parse the command line."""
    parser = options.parser(__doc__, "step_cost")
    parser.add_argument("--arms", nargs="+", choices=list(arms.ARMS), default=list(arms.ARMS), help="beside the plain one (default: all)")
    return parser


def main() -> None:
    given = options_of().parse_args()
    jobs.be_quiet(given.threads)
    large = floor.bandwidth()
    print(f"{given.threads} threads, {given.rounds} rounds, {given.clock} clock; a copy beyond the caches: {large / 1e9:.1f} GB/s")
    kept = {
        "rounds": given.rounds,
        "still": given.still,
        "tries": given.tries,
        "clock": given.clock,
        "large_copy_bytes_per_second": large,
    } | jobs.settings()
    found = {}
    for name in given.nets:
        found[name] = options.stillest(partial(measure, name, given), given)
        print(table(name, found[name]), flush=True)
        print(f"written: {record.write(given.out, arguments.command(), kept, found, ['torchvision'])}")


if __name__ == "__main__":
    main()
