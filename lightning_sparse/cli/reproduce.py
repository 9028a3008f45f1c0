"""``lightning-sparse reproduce``: train the paper's case study and make its table and figures."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sparse import _checks
from lightning_sparse.cli import recipes
from lightning_sparse.cli.errors import UsageError

if TYPE_CHECKING:
    from lightning_sparse.reproduction.runs import Job

_ABOUT = (
    "Train every row of the paper's case study (LeNet-300-100 on MNIST) with each seed, and write the runs as CSV, the table "
    "with the published figures, figure 1 (penalties) and figure 2 (trajectories). To continue after an interruption, run the "
    "same command again. Further arguments override the recipes as in fit."
)


def run(verb: str, words: list[str]) -> int:
    """Train the runs that have no result yet, then write all files."""
    args, overrides = _parser(verb).parse_known_args(words)
    check(args)
    jobs = _jobs(args, [_recipe(name) for name in args.rows or _rows().values()], overrides)
    from lightning_sparse.reproduction import known, pool, written

    if args.known:
        take_known(args.known, lambda folder: known.lay_out(folder, jobs))
    check_kept(jobs)
    if args.finished:
        jobs = [job for job in jobs if job.result.is_file()]
    if not jobs:
        raise UsageError(f"--finished: no run in {args.out} is finished; leave it out to train them")
    args.out.mkdir(parents=True, exist_ok=True)
    left = f"{pool.jobs_left(jobs)} to go, {args.jobs} at once"
    print(f"{len(jobs)} runs of {args.epochs} epochs, {left}; files in {args.out}", flush=True)
    for file in written.write(pool.run(jobs, args.jobs), jobs, args.out):
        print(file)
    return 0


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=_ABOUT, allow_abbrev=False)
    add_options(parser, Path("runs/reproduce"), [0, 1, 2], "docs/reproduction")
    parser.add_argument("--epochs", type=int, default=200, help="200 as published; 20 for a quick look (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"only these, of {', '.join(_rows())}; or other recipes, by name or file")
    return parser


def add_options(parser: argparse.ArgumentParser, out: Path, seeds: list[int], recorded: str) -> None:
    """Add the options shared by all commands that train a list of jobs. ``recorded`` is the example folder for ``--known``."""
    parser.add_argument("--root", default="data", help="the folder above MNIST/raw (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, help="the folder for all output (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help=f"(default: {' '.join(map(str, seeds))})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each (default: %(default)s)")
    parser.add_argument(
        "--known", type=Path, metavar="FOLDER", help=f"use the runs recorded in the CSVs of this folder, such as {recorded}"
    )
    parser.add_argument("--finished", action="store_true", help="train nothing; write all files from the finished runs")


def take_known(folder: Path, lay_out: Callable[[Path], int]) -> None:
    """Use the recorded runs of ``folder``, copied by ``lay_out``. Raises UsageError for a folder without recorded runs."""
    try:
        print(f"{lay_out(folder)} of the runs are recorded in {folder}", flush=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--known must name a folder with the runs.csv and trajectories.csv of a reproduction, all runs of equal length: {error}"
        ) from error


def check(args: argparse.Namespace) -> None:
    """Raise UsageError if ``--epochs``, ``--jobs`` (unless None) or ``--seeds`` is out of range."""
    for name in ("epochs", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if min(args.seeds) < 0:
        raise UsageError(f"--seeds must be whole numbers >= 0, got {args.seeds}")


def _rows() -> dict[str, str]:
    """Return the recipe of each row of the table, by the row's key."""
    from lightning_sparse.reproduction.rows import ROWS

    return {row.key: row.recipe for row in ROWS}


def _recipe(name: str) -> str:
    """Resolve a row's key, a packaged name or a path to a recipe. Raises UsageError with the closest names if unknown."""
    named = _rows().get(name, name)
    packaged = recipes.names()
    if Path(named).is_file() or named in packaged:
        return named
    known = [*_rows(), *packaged]
    raise UsageError(f"no row {name!r}{_checks.closest(name, known)}; one of {', '.join(_rows())}, or a recipe's name or file")


def _jobs(args: argparse.Namespace, chosen: Sequence[str], overrides: Sequence[str]) -> list[Job]:
    """Return one job per recipe and seed. Raises UsageError if two recipes would share a folder."""
    from lightning_sparse.reproduction.rows import key_of
    from lightning_sparse.reproduction.runs import Job

    chosen, seeds = list(dict.fromkeys(chosen)), list(dict.fromkeys(args.seeds))
    shared = [key for key, count in Counter(map(key_of, chosen)).items() if count > 1]
    if shared:
        raise UsageError(f"two of the recipes are named {shared[0]!r}, but the name is the folder of the runs: {', '.join(chosen)}")
    extra = {recipe: (*_root(recipe, args.root), *overrides) for recipe in chosen}
    folders = {recipe: f"{key_of(recipe)}-{args.epochs}" for recipe in chosen}
    return [
        Job(recipe, seed, args.epochs, args.out / f"{folders[recipe]}-seed{seed}", extra[recipe]) for seed in seeds for recipe in chosen
    ]


def check_kept(jobs: Iterable[Job]) -> None:
    """Raise UsageError if a finished run was trained with other overrides than the job has now."""
    for job in jobs:
        if job.result.is_file():
            _check_kept(job)


def _check_kept(job: Job) -> None:
    from lightning_sparse.reproduction.written import portable

    recorded: str = json.loads(job.result.read_text(encoding="utf-8"))["overrides"]
    before, now = (portable(words.split()) for words in (recorded, " ".join(job.overrides)))
    if before != now:
        raise UsageError(f"{job.folder} contains a run with the overrides {before!r}, not {now!r}; choose another folder with --out")


def _root(recipe: str, root: str) -> tuple[str, ...]:
    """Return the ``--data.root`` option, for recipes whose data module has a ``root``."""
    data = recipes.content(recipes.find(recipe)).get("data")
    has_root = isinstance(data, dict) and "root" in (data.get("init_args") or {})
    return ("--data.root", root) if has_root else ()
