"""Time a training step of each method with two versions of this package, in one run:

    git worktree add ../before COMMIT && pip install --no-deps --target ../old ../before
    python tests/benchmarks/performance before_after --before ../old [--nets lenet resnet18] [--arms penalty ...] [--rounds 9] [--threads 1]

Each arm is a run in a process of its own, with the package of the folder ``--before`` or with the installed one, and they take turns of an
epoch of --steps steps. A row has the ratio of the later version's time to the earlier one's in the same round; "A/A" is that of two plain
runs. Only arguments that both versions know are given, so each has its own defaults: ``mask`` draws noise for as long as each version does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from performance import arguments, jobs, options, record, rounds, runs, sections

LAM = 1e-3
PLAIN, BEFORE = "plain", ", before"


def _forms() -> dict[str, Callable[[], Callback]]:
    """Return how to create each method; imported here because the process decides which version that is."""
    from lightning_sparse import callbacks, noise
    from lightning_sparse.penalties import LogSum

    penalty = LogSum(2.0)
    return {
        "penalty": lambda: callbacks.ReweightedPenalty(penalty, LAM),
        "loss": lambda: callbacks.PenaltyLoss(penalty, LAM),
        "prox": lambda: callbacks.AdaptiveProx(penalty, LAM, metric="adam"),
        "mask": lambda: callbacks.AdaptiveMask(penalty, LAM),
        "bernoulli": lambda: callbacks.AdaptiveMask(penalty, LAM, noise=noise.ScaledBernoulli()),
        "eta-trick": lambda: callbacks.EtaTrick(penalty, LAM),
        "variational": lambda: callbacks.VariationalDropout(1e-5),
        "gates": lambda: callbacks.HardConcrete(1e-4),
        "pruning": lambda: callbacks.MagnitudePruning(0.9, every=100),
        "monitor": lambda: callbacks.SparsityMonitor(),
    }


ARMS = ["penalty", "loss", "prox", "mask", "bernoulli", "eta-trick", "variational", "gates", "pruning", "monitor"]


def of(arm: str) -> jobs.Prepare:
    """Return an arm by name, for a child process."""
    return jobs.plain if arm == PLAIN else lambda module: [_forms()[arm]()]


@contextmanager
def _first_on_path(folder: Path | None) -> Iterator[None]:
    """Import from ``folder`` first, also in the processes that are started meanwhile."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one network: a row for each arm."""
    setting, names = options.setting(name, given), [arm for arm in ARMS if arm in given.arms]
    with ExitStack() as stack:
        with _first_on_path(given.before):
            calls = stack.enter_context(runs.calls(setting, of, {f"{arm}{BEFORE}": arm for arm in names}))
        calls |= stack.enter_context(runs.calls(setting, of, {PLAIN: PLAIN, rounds.AGAIN: PLAIN} | {arm: arm for arm in names}))
        pairs = {one: calls[one] for arm in names for one in (f"{arm}{BEFORE}", arm)}
        times = rounds.measure({PLAIN: calls[PLAIN], rounds.AGAIN: calls[rounds.AGAIN]} | pairs, PLAIN, given.rounds)
    to_plain = rounds.ratios(times, PLAIN)
    plain, stray = {line.arm: line.ratio for line in to_plain}, rounds.stray(to_plain)
    lines = [row(arm, times, plain, stray) for arm in names]
    return {"steps": setting.steps, "stray": stray, "arms": lines, "seconds": times}


def row(arm: str, times: rounds.Times, plain: Mapping[str, float], stray: float) -> dict[str, Any]:
    """Compare an arm with the same arm of the earlier version; a difference counts where its quartiles exclude 1 by more than ``stray``."""
    earlier = f"{arm}{BEFORE}"
    found = next(line for line in rounds.ratios(times, earlier) if line.arm == arm)
    standing = "slower" if found.low - stray > 1 else "faster" if found.high + stray < 1 else "even"
    shown = {"arm": arm, "before_to_plain": plain[earlier], "now_to_plain": plain[arm]}
    return shown | {"ratio": found.ratio, "low": found.low, "high": found.high, "stray": stray, "standing": standing}


def options_of() -> argparse.ArgumentParser:
    """Parse the command line."""
    parser = options.parser(__doc__, "before_after")
    parser.add_argument("--before", type=Path, required=True, help="a folder with the earlier version, installed by pip --target")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="methods (default: all)")
    return parser


def main() -> None:
    parser = options_of()
    given = parser.parse_args()
    if not (given.before / "lightning_sparse").is_dir():
        parser.error(
            f"--before: there is no package lightning_sparse in {given.before}; install one there with pip install --no-deps --target"
        )
    jobs.be_quiet(given.threads)
    kept = {"rounds": given.rounds, "clock": given.clock} | jobs.settings()
    found = {}
    for name in given.nets:
        found[name] = measure(name, given)
        print(f"\n{jobs.JOBS[name].name}\n\n{sections.markdown(found[name]['arms'])}", flush=True)
        print(f"written: {record.write(given.out, arguments.command(), kept, found, ['torchvision'])}")


if __name__ == "__main__":
    main()
