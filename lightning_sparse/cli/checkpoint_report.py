"""``lightning-sparse report CKPT``: print what the zeros of a checkpoint are worth on this machine."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lightning_sparse.cli import worth
from lightning_sparse.cli.opened import open_checkpoint

_ABOUT = (
    "Print what is zero in a checkpoint, what shrink would remove, what the exports gain on this machine (measured now, in a few seconds), "
    "and the command for the best. Further arguments override the recipe as in fit."
)


def run(verb: str, words: list[str]) -> int:
    """Print the report of a checkpoint."""
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=_ABOUT)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--config", help="recipe or YAML of the run (default: the config.yaml beside the checkpoint)")
    args, overrides = parser.parse_known_args(words)
    saved = open_checkpoint(args.checkpoint, args.config, overrides)
    more = [f"--config {shlex.quote(args.config)}"] if args.config else []
    print("\n".join(worth.lines(saved, [*more, *map(shlex.quote, overrides)])))
    return 0
