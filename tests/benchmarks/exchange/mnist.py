"""Compare penalty and mask on MNIST: the grid of networks, penalties, forms, strengths and seeds, and the studies.

    python tests/benchmarks/exchange mnist --root data [--arms 'lenet_300_100/logsum/*' ...] [--study NAME ...] [--list]

Interrupted, the same command goes on where it stopped. Every finished run in --out, of whichever command, goes into its
runs.csv (one line a run) and trajectories.csv (one line an epoch, with the duality gap of mask forms), from which
page.py makes docs/exchange.md. Further arguments override the recipes as in `lightning-sparse fit`; a run is kept
in a folder named by its arm, strength, epochs and seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from exchange import records, switch
from exchange.plan import Planned, arms, plan
from exchange.studies import STUDIES
from lightning_sparse.cli import reproduce
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.reproduction import pool


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command's options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    reproduce.add_options(made, Path("runs/exchange"), [0, 1], str(records.FOLDER))
    made.add_argument("--arms", nargs="+", default=[], metavar="GLOB", help="only the arms whose names these patterns fit")
    made.add_argument("--study", nargs="+", default=[], choices=STUDIES, help="these studies in the place of the grid")
    made.add_argument("--strengths", type=float, nargs="+", default=[], help="lam (or pruning's share of zeros) in the place of the arm's")
    made.add_argument("--epochs", type=int, help="in the place of the recipe's 60 or 12; such runs are named apart")
    made.add_argument("--list", action="store_true", help="print the chosen runs and how far they are, and do nothing")
    return made


def chosen(given: argparse.Namespace, overrides: list[str]) -> list[Planned]:
    """Return the selected runs. Raises UsageError if there are none, or for a run recorded with other arguments."""
    reproduce.check(given)
    if any(strength <= 0 for strength in given.strengths):
        raise UsageError(f"--strengths must be > 0, got {given.strengths}")
    common = ("--data.root", given.root, *overrides)
    return plan(arms(given.arms, given.study), given.seeds, given.out, common, given.epochs, given.strengths)


def run(given: argparse.Namespace, overrides: list[str]) -> None:
    """Train the missing runs, then write the CSVs of all runs."""
    planned = chosen(given, overrides)
    if given.known:
        reproduce.take_known(given.known, lambda folder: records.lay_out(folder, given.out))
    jobs = [run.job for run in planned]
    reproduce.check_kept(jobs)
    print(f"{len(jobs)} runs, {pool.jobs_left(jobs)} of them and {pool.epochs_left(jobs)} epochs to go, {given.jobs} at once", flush=True)
    if given.list:
        print(*(f"{run.job.epochs_done():3}/{run.job.epochs} {run.job.folder.name}" for run in planned), sep="\n")
        return
    if not given.finished:
        records.announce(planned)
        pool.run(jobs, given.jobs, switch.train)
    if not any(given.out.glob("*/result.json")):
        raise UsageError(f"no run in {given.out} is finished; leave --finished out to train them")
    print(*records.write(given.out), sep="\n")


def main() -> None:
    front = parser()
    try:
        run(*front.parse_known_args())
    except UsageError as error:
        front.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
