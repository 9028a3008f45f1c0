"""Compare training steps with this package and with other packages, in the same run:

    python tests/benchmarks/performance peers [--nets lenet resnet18 transformer] [--peers NAME ...] [--rounds 9] [--threads 2]

Fixed masks: Lightning's ModelPruning, torch.nn.utils.prune, torch.nn.utils.parametrize. A penalty as a term of the loss.
torchao's PruneOptimizer. KL-regularised layers of bayesian-torch. Jobs, turns and clock are those of step_cost.py. The ratio
is ours to the peer's, round by round: ahead where it is under 1 by more than the plain run beside itself (A/A) strays, behind
where it is above 1 by more. --still and --tries are as in step_cost.py. What is not installed is a line that says how to get it.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from performance import arguments, arms, jobs, options, record, rounds, runs
from performance.peer_list import PEERS, Peer, installed, obstacle, of


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one network: a row per peer, timed or with the reason why it is missing."""
    job, chosen = jobs.JOBS[name], [peer for peer in PEERS if peer.name in given.peers]
    absent = {peer.name: why for peer in chosen if (why := obstacle(peer, job))}
    times = run(name, [peer for peer in chosen if peer.name not in absent], given)
    stray = rounds.stray(rounds.ratios(times, arms.PLAIN))
    lines = [missing(peer, absent[peer.name]) if peer.name in absent else pair(peer, times, stray) for peer in chosen]
    return {"steps": given.steps or job.steps, "stray": stray, "pairs": lines, "seconds": times}


def run(name: str, present: list[Peer], given: argparse.Namespace) -> rounds.Times:
    """Measure seconds per step of the plain run, of each peer and of its counterpart in each round."""
    names = [arms.PLAIN, *(one for peer in present for one in (peer.ours, peer.name))]
    with runs.calls(options.setting(name, given), of, {one: one for one in names} | {rounds.AGAIN: arms.PLAIN}) as calls:
        return rounds.measure(calls, arms.PLAIN, given.rounds)


def pair(peer: Peer, times: rounds.Times, stray: float) -> dict[str, Any]:
    """Compare ours with a peer; ``stray`` is the deviation of A/A from 1."""
    theirs, ours = rounds.ratios({peer.name: times[peer.name], peer.ours: times[peer.ours]}, peer.name)
    spread = {"ratio": ours.ratio, "low": ours.low, "high": ours.high, "stray": stray, "standing": standing(ours.ratio, stray)}
    return {"peer": peer.name, "ours": peer.ours, "peer_ms": 1e3 * theirs.value, "our_ms": 1e3 * ours.value} | spread


def missing(peer: Peer, why: str) -> dict[str, Any]:
    """Make the row of a peer that is not timed."""
    return {"peer": peer.name, "ours": peer.ours, "peer_ms": None, "our_ms": None, "standing": why}


def standing(ratio: float, stray: float) -> str:
    """Return ``ahead``, ``behind``, or ``even`` if the ratio differs from 1 by at most A/A."""
    return "ahead" if ratio < 1 - stray else "behind" if ratio > 1 + stray else "even"


HEAD = f"{'peer':36} {'ours':40} {'peer ms':>9} {'our ms':>9} {'ratio':>6} {'quartiles':>15} {'A/A':>6}"


def table(name: str, found: dict[str, Any]) -> str:
    """Format one network's rows."""
    title = f"\n{jobs.JOBS[name].name}, {found['steps']} steps a turn, try {found['tries']}"
    return "\n".join([title, HEAD, *map(_line, found["pairs"])])


def _line(line: dict[str, Any]) -> str:
    names = f"{line['peer']:36} {line['ours']:40}"
    if "ratio" not in line:
        return f"{names} {line['standing']}"
    spread = f"{line['low']:.3f} to {line['high']:.3f}"
    return f"{names} {line['peer_ms']:9.3f} {line['our_ms']:9.3f} {line['ratio']:6.3f} {spread:>15} {line['stray']:6.3f} {line['standing']}"


def main() -> None:
    parser = options.parser(__doc__, "peers")
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="(default: all)")
    given = parser.parse_args()
    jobs.be_quiet(given.threads)
    print(f"{given.threads} threads, {given.rounds} rounds, {given.clock} clock")
    kept = {"rounds": given.rounds, "still": given.still, "tries": given.tries, "clock": given.clock} | jobs.settings()
    found = {}
    for name in given.nets:
        found[name] = options.stillest(partial(measure, name, given), given)
        print(table(name, found[name]), flush=True)
        print(f"written: {record.write(given.out, arguments.command(), kept, found, ['torchvision', *installed()])}")


if __name__ == "__main__":
    main()
