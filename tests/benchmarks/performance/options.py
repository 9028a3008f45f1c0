"""The options of the commands that time training steps, checked before anything is run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from performance import arguments, jobs


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The shared ones, and which networks, how long a round, by which clock."""
    made = arguments.parser(description, name)
    made.add_argument("--nets", nargs="+", choices=list(jobs.JOBS), default=list(jobs.JOBS), help="networks (default: all)")
    made.add_argument("--steps", type=_steps, help=f"timed in a round, a multiple of {jobs.ROUND} (default: {_defaults()})")
    made.add_argument("--clock", choices=list(jobs.CLOCKS), default="wall", help="wall, or cpu: of all threads (default: wall)")
    return made


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
    """``given`` in the order of ``among``, with ``first`` before them."""
    return [first, *(name for name in among if name in given and name != first)]
