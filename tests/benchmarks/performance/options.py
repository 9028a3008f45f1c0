"""Options of the commands that time training steps, checked before any run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from performance import arguments, jobs, rounds, runs


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Make a parser with the shared options, networks, length of a round and clock."""
    made = arguments.parser(description, name)
    made.add_argument("--nets", nargs="+", choices=list(jobs.JOBS), default=list(jobs.JOBS), help="networks (default: all)")
    made.add_argument("--steps", type=_steps, help=f"of a turn, a multiple of {jobs.ROUND} (default: {_defaults()})")
    made.add_argument("--clock", choices=list(runs.CLOCKS), default="wall", help="wall, or cpu: of all threads (default: wall)")
    made.add_argument(
        "--still", type=float, default=0.1, help="an A/A arm that strays by more has its network measured again (default: 0.1)"
    )
    made.add_argument("--tries", type=arguments.whole(), default=3, help="at most so often; the stillest counts (default: 3)")
    return made


def stillest(measure: Callable[[], dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Repeat ``measure`` until A/A is small enough; return that result, or the one with the smallest A/A."""
    tried: list[dict[str, Any]] = []
    while not tried or (tried[-1]["stray"] > given.still and len(tried) < given.tries):
        tried.append(measure())
    return min(tried, key=lambda found: found["stray"]) | {"tries": len(tried)}


def setting(name: str, given: argparse.Namespace) -> runs.Setting:
    """Make the setting of job ``name``, with one turn per round and one for warm-up."""
    return runs.Setting(name, given.steps or jobs.JOBS[name].steps, given.rounds + rounds.WARM_UP, given.clock, given.threads)


def _defaults() -> str:
    return ", ".join(f"{name} {job.steps}" for name, job in jobs.JOBS.items())


def _steps(text: str) -> int:
    steps = arguments.whole(jobs.ROUND)(text)
    if steps % jobs.ROUND:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of {jobs.ROUND}, so that a window holds whole rounds of the curvature, got {text!r}"
        )
    return steps


def picked(given: Sequence[str], among: Sequence[str], first: str) -> list[str]:
    """Return ``first``, then ``given`` in the order of ``among``."""
    return [first, *(name for name in among if name in given and name != first)]
