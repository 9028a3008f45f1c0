"""``lightning-sparse report CKPT``: print what the zeros of a checkpoint are worth on this machine."""

from __future__ import annotations

import argparse
import shlex

from lightning_sparse.cli import worth
from lightning_sparse.cli.opened import add_arguments, open_checkpoint, parsed

_ABOUT = (
    "Print what is zero in a checkpoint, what shrink would remove, what the exports gain on this machine (measured now, in a few seconds), "
    "and the command for the best. Further arguments override the recipe as in fit."
)


def run(verb: str, words: list[str]) -> int:
    """Print the report of a checkpoint."""
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=_ABOUT)
    add_arguments(parser)
    args, overrides = parsed(parser, words)
    saved = open_checkpoint(args.checkpoint, args.config, overrides, args.script)
    more = [f"--{name} {shlex.quote(given)}" for name, given in (("config", args.config), ("script", args.script)) if given]
    print("\n".join(worth.lines(saved, [*more, *map(shlex.quote, overrides)])))
    return 0
